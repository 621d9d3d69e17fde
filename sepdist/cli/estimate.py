"""Score an SI-SNR estimator: correlation and error of its predictions against the true SI-SNR.

    sepdist estimate model=runs/ssqp data=data/test-dprnn output=estimation num_workers=2

The data set is one of `corpus=separated`: mixtures, sources and a separator's estimates. Every
mixture is read whole and alone. Prediction and truth are averaged over the sources of a mixture
first, as in paper 2, section 4.1.

    output/results.json      lcc (Pearson's correlation), mae and bias in dB, of mixtures and of
                             single estimates; written last
    output/utterances.csv    id, true and predicted SI-SNR of each estimate
    output/scatter.png       predicted over true SI-SNR (paper 2, figure 4)
"""

from sepdist.cli.compose import Program
from sepdist.config import EvaluateConfig

main = Program(
    "evaluate", EvaluateConfig, __doc__, "sepdist.inference.estimation:evaluate_estimator"
)
