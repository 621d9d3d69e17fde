"""How well an SI-SNR estimator judges: its run and a data set with estimates in; correlation, error and scatter out.

    python -m sepdist estimate model=runs/ssqp data=data/test-dprnn output=judged num_workers=2

The data set is one of `corpus=separated`: mixtures, sources and a separator's estimates. Every mixture is judged whole
and alone. As in paper 2, section 4.1, prediction and truth are averaged over the sources of a mixture first.

    output/results.json      lcc (Pearson's correlation), mae and bias in dB, of mixtures and of single estimates
    output/utterances.csv    id, true and predicted SI-SNR of each estimate
    output/scatter.png       predicted over true SI-SNR (paper 2, figure 4)
"""

import hydra
from omegaconf import DictConfig

from sepdist import config
from sepdist.config import EvaluateConfig
from sepdist.console import user_console
from sepdist.inference.estimation import judge

config.register_schemas()
config.register_evaluate()


@hydra.main(version_base="1.3", config_path="pkg://hydra.conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Compose, judge, print the figures; errors of the user are one line and exit status 1."""
    with user_console() as console:
        judge(config.typed(composed, EvaluateConfig), console)


if __name__ == "__main__":
    main()
