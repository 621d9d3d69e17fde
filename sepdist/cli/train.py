"""Train one stage in Ray Train workers, or a sweep of runs one after the other.

    sepdist train experiment=demo/finetune cluster.num_workers=2
    sepdist train experiment=demo/finetune run_dir=s3://bucket/runs/a engine.zero_stage=1
    sepdist train -m experiment=demo/finetune optim.lr=1e-3,1e-4 seed=0,1
    ray job submit --working-dir . -- python -m sepdist train run_dir=s3://bucket/runs/a ...

The same command again resumes from the newest checkpoint of its run_dir. In a sweep every run has a
folder of its own in run_dir, named after its values, such as optim.lr=0.001,seed=0; a table of the
best validation scores ends it; the exit status is 1 if every run failed. Keys of a part's file,
such as model.num_blocks, are changed alike; +KEY=VALUE adds a key, --cfg job shows what there is.
"""

from collections.abc import Sequence

from sepdist.cli.compose import read_config
from sepdist.config import TrainConfig
from sepdist.console import user_console


def main() -> None:
    """Compose, check, freeze and launch; exit 1 after an error of the user."""
    with user_console():
        cfg = read_config("train", TrainConfig, __doc__, sweep)
    train(cfg)


def train(cfg: TrainConfig) -> float | None:
    """Train one stage and return its best validation score."""
    from sepdist.training import launch
    from sepdist.training.run import run

    stopped = "the same command goes on from the newest checkpoint"
    with user_console(launch.TrainingFailedError, stopped=stopped) as console:
        return run(cfg, console)


def sweep(words: Sequence[str]) -> int:
    """Train every run of a sweep; returns the exit status."""
    from sepdist.cli.sweep import run_sweep

    return run_sweep(words, train)
