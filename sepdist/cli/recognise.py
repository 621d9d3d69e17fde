"""Measure word error rates of mixtures and, to compare, of a separator's estimates.

    sepdist recognise model=runs/ctn corpus=libricss corpus.root=for_release output=wer \\
        recogniser=transformers_ctc recogniser.folder=wav2vec2 num_workers=2

LibriCSS's utterance-wise scheme (paper 2, section 4.2 and table 4). A condition is a split of the
corpus. The recogniser gets the mixture itself, and each output of the separator on the whole
utterance; of the outputs, the one with the fewest word errors counts. Errors and words are added up
by condition. The reference is the first text of a mixture. Everything is recognised at the corpus's
sample_rate, mixtures too.

    output/utterances.csv    one line per utterance: reference, recognised words, errors
    output/results.json      `wer` in percent and `counts` by condition; model, recogniser,
                             versions; written last
"""

from sepdist.cli.compose import Program
from sepdist.config import RecogniseConfig

main = Program("recognise", RecogniseConfig, __doc__, "sepdist.inference.recognition:recognise")
