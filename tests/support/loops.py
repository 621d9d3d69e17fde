"""Runs of the training loop whose gradients are spoiled."""

from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor

from sepdist.reporting import read_metrics
from tests.support.runs import frozen

GLOBAL_BATCH = 4  # of tests/support/runs.py


def spoil(first: int, stop: int, factor: float) -> None:
    """Multiply the loss of one item in each of the steps [first, stop) by `factor` from now on."""
    from sepdist.objectives.separation import Separation

    def spoiled(
        self: Separation, model: torch.nn.Module, batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = sound(self, model, batch)
        position = int(batch.positions[0])
        hit = (
            torch.is_grad_enabled()  # not in validation
            and position % GLOBAL_BATCH == 3
            and first <= position // GLOBAL_BATCH < stop
        )
        return (loss * factor if hit else loss), metrics

    sound, Separation.__call__ = Separation.__call__, spoiled


def run_rank(
    rank: int, world_size: int, config_file: str, store: str, first: int, stop: int, factor: float
) -> None:
    import os

    import torch.distributed as dist

    from sepdist import config
    from sepdist.training import loop, schedule
    from sepdist.training.world import World

    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    schedule.LEAST_NORMS = 3
    spoil(first, stop, factor)
    loop.train(config.load_frozen(config_file), World(rank, world_size, torch.device("cpu")))
    dist.barrier()
    dist.destroy_process_group()


def run(
    data: dict[str, str],
    folder: Path,
    world_size: int,
    first: int,
    stop: int,
    factor: float,
    *more: str,
) -> list[dict]:
    """Train 8 steps with a checkpoint every 2; the rows of the log."""
    every = ["training.max_steps=8", "training.checkpoint_every=2", "validation.every_steps=100"]
    path = frozen(data, folder, "training.max_skipped=3", *every, *more)
    arguments = (world_size, path, str(folder / "store"), first, stop, factor)
    mp.start_processes(run_rank, arguments, nprocs=world_size, start_method="forkserver")
    return read_metrics(str(folder))
