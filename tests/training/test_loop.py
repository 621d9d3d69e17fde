"""Steps without a usable gradient are skipped at any world size; ledger and log record it."""

import math
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from sepdist.training.audit import audit
from sepdist.training.checkpoint import find_committed
from sepdist.training.ledger import APPLIED, SKIPPED
from tests.support.loops import run
from tests.support.runs import final_hash


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
