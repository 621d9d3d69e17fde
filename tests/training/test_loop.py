"""Steps whose gradient is no use are left out alike at every world size, and the ledger and the log say so."""

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from sepdist.cli.audit import audit
from sepdist.reporting import read_metrics
from sepdist.training.ledger import APPLIED, LEFT_OUT, SKIPPED
from tests.support.runs import final_hash, frozen

GLOBAL_BATCH = 4  # of tests/runs.py
multiprocessing.set_forkserver_preload(["torch", "deepspeed", __name__])


def spoil(first: int, stop: int, factor: float) -> None:
    """From now on the loss of one item in each of the steps [first, stop) is multiplied by `factor`."""
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
    from sepdist.training import guard, loop
    from sepdist.training.world import World

    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    guard.LEAST_HISTORY = 3
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


def test_a_bad_spell_sends_the_run_back_to_its_checkpoint_and_on_without_it(
    tiny_data, tmp_path: Path
) -> None:
    rows = run(tiny_data, tmp_path / "one", 1, 3, 6, math.nan)
    steps = {row["step"]: row for row in rows if "loss/total" in row}
    assert sorted(steps) == list(range(1, 9))
    assert [step for step, row in steps.items() if row["loss/total"] is None] == [4, 5, 6]
    assert steps[3]["optim/rollbacks"] == 1.0, (
        "step 3 was done again, from the checkpoint of step 2"
    )
    found = audit(str(tmp_path / "one"))
    assert found.sound and found.outcomes == {APPLIED: 5, SKIPPED: 0, LEFT_OUT: 3}

    run(tiny_data, tmp_path / "two", 2, 3, 6, math.nan, "engine.zero_stage=1")
    assert final_hash(tmp_path / "two") == final_hash(tmp_path / "one")


def test_single_bad_steps_and_spikes_are_skipped(tiny_data, tmp_path: Path) -> None:
    rows = run(tiny_data, tmp_path / "nan", 1, 3, 5, math.inf)
    assert [row["step"] for row in rows if row.get("optim/skipped_steps")] == [4, 5]
    rows = run(tiny_data, tmp_path / "spike", 1, 3, 5, 1e6)
    assert [row["step"] for row in rows if row.get("optim/skipped_steps")] == [4, 5]
    assert final_hash(tmp_path / "nan") == final_hash(tmp_path / "spike"), (
        "why they were skipped does not matter"
    )
    assert audit(str(tmp_path / "spike")).outcomes == {APPLIED: 6, SKIPPED: 2, LEFT_OUT: 0}


def test_a_spell_that_never_ends_is_an_error_that_says_what_to_do(
    tiny_data, tmp_path: Path
) -> None:
    with pytest.raises(mp.ProcessRaisedException, match=r"after 1 rollbacks.*lower optim\.lr"):
        run(tiny_data, tmp_path, 1, 1, 100, math.nan, "training.max_rollbacks=1")
