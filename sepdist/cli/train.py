"""Train one stage in Ray Train workers.

    sepdist train experiment=demo/finetune cluster.num_workers=2
    ray job submit --working-dir . -- sepdist train experiment=demo/finetune

The same command again resumes from the newest checkpoint of its run_dir.
"""

import hydra
from omegaconf import DictConfig

from sepdist import config
from sepdist.config import TrainConfig
from sepdist.console import user_console
from sepdist.training.run import run

config.register_schemas()


@hydra.main(version_base="1.3", config_path=config.config_dir(), config_name="train")
def main(composed: DictConfig) -> None:
    """Compose, check, freeze and launch; exit 1 after an error of the user."""
    from sepdist.training import launch

    stopped = "the same command goes on from the newest checkpoint"
    with user_console(launch.TrainingFailedError, stopped=stopped) as console:
        run(config.typed(composed, TrainConfig), console)


if __name__ == "__main__":
    main()
