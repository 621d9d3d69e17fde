"""Label assignments after the fact: every checkpoint of a run and a data set in, label tables and switch rates out.

    python -m sepdist labels model=runs/a data=data/train output=labels num_workers=2

It is how paper 1's authors measured figure 2 (c) and (d): each checkpoint is run over whole utterances in fixed order.
Keep a checkpoint of every epoch for it: training.keep_every=E training.checkpoint_every=E, E the steps of an epoch.

    output/step-000000500.csv   id,permutation: the rank of the best assignment of each utterance, by checkpoint
    output/switching.json       share of utterances whose label changed from one checkpoint to the next, and how far
                                that agrees with what was measured while training; written last

The tables are what objective `fixed_labels` reads.
"""

import hydra
from omegaconf import DictConfig

from sepdist import config
from sepdist.config import EvaluateConfig
from sepdist.console import user_console
from sepdist.inference.labels import label

config.register_schemas()
config.register_evaluate()


@hydra.main(version_base="1.3", config_path="pkg://hydra.conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Compose, label, print the rates; errors of the user are one line and exit status 1."""
    with user_console() as console:
        label(config.typed(composed, EvaluateConfig), console)


if __name__ == "__main__":
    main()
