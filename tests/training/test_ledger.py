"""The audit finds all lost and repeated positions of the committed history, and only those."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from sepdist.cli.audit import main
from sepdist.data.order import owned_virtual_shards, positions_of
from sepdist.data.records import Batch
from sepdist.training.audit import audit
from sepdist.training.checkpoint import Checkpointer, OptimizerState, Snapshot
from sepdist.training.ledger import (
    APPLIED,
    SKIPPED,
    Ledger,
    LedgerError,
    SegmentRef,
    as_ranges,
    put_segment,
    read_history,
)

V, B = 4, 2


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch):
    """Run `sepdist audit` on a run_dir; returns its exit status."""

    def status(run_dir: Path, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sepdist audit", f"run_dir={run_dir}", *words])
        return main()

    return status


def batch(step: int, shard: int) -> Batch:
    positions = torch.tensor(list(positions_of(step, shard, V, B)))
    wave = torch.zeros(B, 4)
    return Batch([str(int(p)) for p in positions], positions, wave, None, None, torch.full((B,), 4))


class Run:
    """Commits steps as the loop does; `drop` and `again` spoil what rank 0 fetched."""

    def __init__(self, run_dir: Path, previous: SegmentRef | None = None) -> None:
        self.run_dir = run_dir
        node = {"_target_": "sepdist.models.conv_tasnet.ConvTasNet"}
        self.writer = Checkpointer(
            str(run_dir),
            model_node=node,
            sample_rate=8000,
            lineage={},
            keep_last=1,
            keep_best=False,
            previous=previous,
        )

    def steps(
        self, first: int, stop: int, world_size: int, *, outcome: str = APPLIED, drop=(), again=()
    ) -> "Run":
        ledgers = [Ledger(V * B) for _ in range(world_size)]
        for step in range(first, stop):
            for rank, ledger in enumerate(ledgers):
                shards = list(owned_virtual_shards(V, rank, world_size))
                if rank == 0:
                    shards = [s for s in shards if (step, s) not in drop] + [
                        s for s in shards if (step, s) in again
                    ]
                ledger.record(step, outcome, [batch(step, shard) for shard in shards])
        state = {"num_virtual_shards": V, "micro_batch": B}
        consumed = [[ledger.take() for ledger in ledgers]]
        self.writer.save(
            Snapshot(stop, {"w": torch.zeros(1)}, OptimizerState({}, {}), state, None, consumed)
        )
        self.writer.wait()
        return self

    def segment(self) -> SegmentRef:
        [folder] = (self.run_dir / "checkpoints").iterdir()
        return SegmentRef(**json.loads((folder / "state.json").read_text())["ledger"])


def test_a_history_over_attempts_and_world_sizes_is_sound(tmp_path: Path, status, capsys) -> None:
    first = Run(tmp_path).steps(0, 5, 2).steps(5, 7, 2)
    dead = Run(tmp_path, first.segment())
    Run(tmp_path, first.segment()).steps(7, 8, 3).steps(8, 12, 4)
    dead.writer.close()
    found = audit(str(tmp_path))
    assert found.sound and found.positions == 12 * V * B
    assert found.world_sizes == {2: 7, 3: 1, 4: 4}
    assert found.outcomes == {APPLIED: 12, SKIPPED: 0}
    assert status(tmp_path) == 0
    assert "0 lost, 0 repeated" in capsys.readouterr().out
    assert status(tmp_path, "json=true") == 0
    assert json.loads(capsys.readouterr().out)["positions"] == 12 * V * B
    assert status(tmp_path, "--json") == 2
    assert "as in: sepdist audit run_dir=runs/a\n" in capsys.readouterr().err


def test_skipped_steps_are_counted_and_lose_nothing(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 2, 1).steps(2, 5, 1, outcome=SKIPPED).steps(5, 6, 1)
    found = audit(str(tmp_path))
    assert found.sound and found.outcomes == {APPLIED: 3, SKIPPED: 3}


def test_lost_and_repeated_positions_are_named_and_the_status_is_1(
    tmp_path: Path, status, capsys
) -> None:
    Run(tmp_path).steps(0, 3, 2).steps(3, 6, 2, drop=[(4, 0)], again=[(5, 1)])
    found = audit(str(tmp_path))
    assert found.lost == [[4 * V * B, 4 * V * B + B]] and found.num_lost == B
    assert found.repeated == [[5 * V * B + B, 5 * V * B + 2 * B]] and found.num_repeated == B
    assert status(tmp_path) == 1
    out = capsys.readouterr().out
    assert "lost: [32, 34)" in out and "2 lost, 2 repeated" in out


def test_a_replayed_step_is_repeated_and_a_jump_is_lost(tmp_path: Path) -> None:
    Run(tmp_path).steps(0, 3, 1).steps(2, 4, 1).steps(5, 6, 1)
    found = audit(str(tmp_path))
    assert found.repeated == [[2 * V * B, 3 * V * B]] and found.lost == [[4 * V * B, 5 * V * B]]


def test_positions_beyond_the_committed_steps_are_repeated(tmp_path: Path) -> None:
    run = Run(tmp_path).steps(0, 2, 1)
    run.writer._consumed = [[[[9, 1, V * B, APPLIED, [[9 * V * B, 9 * V * B + 3]]]]]]
    run.steps(2, 3, 1)
    assert audit(str(tmp_path)).repeated == [[72, 75]]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_ledger_is_an_error_that_names_the_segment(
    damage: str, tmp_path: Path, status, capsys
) -> None:
    Run(tmp_path).steps(0, 3, 1).steps(3, 6, 1)
    segment = min((tmp_path / "ledger").iterdir())
    if damage == "missing":
        segment.unlink()
    else:
        segment.write_text(segment.read_text().replace("[0,8]", "[0,7]"))
    with pytest.raises(LedgerError, match=segment.name):
        audit(str(tmp_path))
    assert status(tmp_path) == 1
    assert segment.name in capsys.readouterr().err


def test_a_run_without_a_checkpoint_has_nothing_to_check(tmp_path: Path, status, capsys) -> None:
    assert status(tmp_path) == 2
    assert "no committed checkpoint" in capsys.readouterr().err


def test_a_failed_save_keeps_its_steps_for_the_next_segment(tmp_path: Path, monkeypatch) -> None:
    from sepdist import storage

    run, put = Run(tmp_path).steps(0, 2, 1), storage.put_bytes

    def fail_on_commit(url: str, data: bytes, **options: bool) -> None:
        if url.endswith("COMMIT"):
            raise OSError("no answer")
        put(url, data, **options)

    monkeypatch.setattr(storage, "put_bytes", fail_on_commit)
    with pytest.raises(OSError, match="no answer"):
        run.steps(2, 4, 1)
    monkeypatch.setattr(storage, "put_bytes", put)
    assert audit(str(tmp_path)).steps == 2
    run.steps(4, 5, 1)
    assert audit(str(tmp_path)).sound and audit(str(tmp_path)).steps == 5


def test_a_segment_of_a_thousand_ranks_takes_kilobytes_and_says_what_each_of_them_fetched(
    tmp_path: Path,
) -> None:
    ranks, steps = 1024, range(695, 705)
    by_rank = []
    for rank in range(ranks):
        ledger = Ledger(3 * ranks)
        for step in steps:
            positions = torch.tensor(list(positions_of(step, rank, ranks, 3)))
            one = Batch([], positions, torch.zeros(3, 1), None, None, positions)
            ledger.record(step, SKIPPED if step == 700 else APPLIED, [one])
        by_rank.append(ledger.take())
        assert ledger.take() == []
    segment = put_segment(str(tmp_path), "x", [by_rank], None)
    assert (
        tmp_path / segment.name
    ).stat().st_size < 150_000  # three runs of each rank, however long
    history = list(read_history(str(tmp_path), segment))
    assert [step for step, _, _ in history] == list(steps)
    assert [step for step, outcome, _ in history if outcome == SKIPPED] == [700]
    for step, _, ranges in history[::3]:
        assert ranges == [
            [[(step * ranks + rank) * 3, (step * ranks + rank) * 3 + 3]] for rank in range(ranks)
        ]


def test_a_history_begun_by_an_older_version_goes_on(tmp_path: Path) -> None:
    """Its segments list every step; the lost positions are found in them too."""
    steps = [
        [step, APPLIED, [[[8 * step, 8 * step + 4]], [[8 * step + 4, 8 * step + 8]]]]
        for step in range(3)
    ]
    steps[1][2][0] = [[8, 11]]
    text = json.dumps({"previous": None, "steps": steps}).encode()
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "older.json").write_bytes(text)
    older = SegmentRef("ledger/older.json", hashlib.sha256(text).hexdigest())
    Run(tmp_path, older).steps(3, 6, 4)
    found = audit(str(tmp_path))
    assert found.world_sizes == {2: 3, 4: 3} and found.outcomes == {APPLIED: 6, SKIPPED: 0}
    assert found.lost == [[11, 12]] and found.num_repeated == 0


def test_ranks_that_fetched_different_steps_are_an_error(tmp_path: Path) -> None:
    runs = [[[0, 2, 8, APPLIED, [[0, 4]]]], [[0, 1, 8, APPLIED, [[4, 8]]], [1, 1, 8, SKIPPED, []]]]
    segment = put_segment(str(tmp_path), "x", [runs], None)
    with pytest.raises(LedgerError, match="ranks disagree on step 1"):
        list(read_history(str(tmp_path), segment))


def test_ranges_join_only_what_follows_on() -> None:
    assert as_ranges([3, 4, 5, 5, 6, 1]) == [[3, 6], [5, 7], [1, 2]]
    assert as_ranges([]) == []
