"""Steps without a usable gradient are skipped at any world size; ledger and log record it."""

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from sepdist.cli.audit import audit
from sepdist.reporting import read_metrics
from sepdist.training.checkpoint import find_committed
from sepdist.training.ledger import APPLIED, SKIPPED
from tests.support.runs import final_hash, frozen

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
            model.training
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


def test_steps_that_are_not_finite_and_spikes_are_skipped_at_any_world_size(
    tiny_data, tmp_path: Path
) -> None:
    rows = run(tiny_data, tmp_path / "nan", 1, 3, 5, math.nan)
    assert [row["step"] for row in rows if row.get("optim/skipped_steps")] == [4, 5]
    losses = {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}
    assert [step for step, loss in losses.items() if loss is None] == [4, 5]
    assert list(losses) == list(range(1, 9))
    run(tiny_data, tmp_path / "two", 2, 3, 5, math.inf, "engine.zero_stage=1")
    rows = run(tiny_data, tmp_path / "spike", 1, 3, 5, 1e6)
    assert [row["step"] for row in rows if row.get("optim/skipped_steps")] == [4, 5]
    hashes = {final_hash(tmp_path / name) for name in ("nan", "two", "spike")}
    assert len(hashes) == 1, "why they were skipped, and where, does not matter"
    for name in ("two", "spike"):
        assert audit(str(tmp_path / name)).outcomes == {APPLIED: 6, SKIPPED: 2}


def test_a_run_without_usable_gradients_ends_with_what_to_do_also_after_a_restart(
    tiny_data, tmp_path: Path
) -> None:
    """Two steps of the spell are in the checkpoint that the second start continues from."""
    error = r"steps 2 to 4 were skipped.*training\.max_skipped=3.*lower optim\.lr"
    for _ in range(2):
        with pytest.raises(mp.ProcessRaisedException, match=error):
            run(tiny_data, tmp_path, 1, 2, 100, math.nan)
        (tmp_path / "store").unlink()
    assert find_committed(f"{tmp_path}/checkpoints")[-1].step == 4
