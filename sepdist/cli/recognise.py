"""Word error rates: a corpus with transcripts, a recogniser and, to compare, a separator in; a table by condition out.

    python -m sepdist recognise model=runs/ctn corpus=libricss corpus.root=for_release output=wer \\
        recogniser=transformers_ctc recogniser.folder=wav2vec2 num_workers=2

LibriCSS's utterance-wise scheme (paper 2, section 4.2 and table 4): a condition is a split of the corpus; the mixture
itself is recognised, and each output of the separator on the whole utterance; of the outputs the one with the fewest
word errors counts; errors and words of a condition are added up. The reference is the first text of a mixture. All is
heard in the band of the corpus's sample_rate, the mixture too.

    output/utterances.csv    one line per utterance: reference, what was heard, errors
    output/results.json      `wer` in percent and `counts` by condition; model, recogniser, versions; written last
"""

import inspect
import sys
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sepdist import config
from sepdist.config import ConfigError, RecogniseConfig
from sepdist.console import user_console
from sepdist.inference.recognition import (
    recognise,
)


def main() -> None:
    """Compose, recognise, print the table; errors of the user are one line and exit status 1."""
    if {"-h", "--help"} & set(sys.argv):
        keys = [line for line in inspect.getsource(RecogniseConfig).splitlines() if " = " in line]
        print("\n".join([(__doc__ or "").strip(), "", "Keys, given as key=value:", *keys]))
        return
    with user_console() as console:
        recognise(read_config(sys.argv[1:]), console)


def read_config(overrides: Sequence[str]) -> RecogniseConfig:
    """configs/recognise.yaml with the command line's changes.

    Hydra never sees model=..., which it would take for a choice in the folder configs/model and refuse.
    """
    config.register_schemas()
    models = [word for word in overrides if word.startswith("model=")]
    try:
        with initialize_config_dir(config.config_dir(), version_base="1.3"):
            composed = compose(
                "recognise", overrides=[word for word in overrides if word not in models]
            )
        merged = OmegaConf.merge(composed, OmegaConf.from_dotlist(models))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    assert isinstance(merged, DictConfig)
    return config.typed(merged, RecogniseConfig)


if __name__ == "__main__":
    main()
