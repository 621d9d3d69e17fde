"""Record the positions that each step of a run consumed, for `sepdist audit` to check.

    run_dir/ledger/step-<step>-<attempt>.json

A segment holds the positions that each rank fetched in the steps since the checkpoint before. It
is written before the checkpoint commits, whose state.json holds its name and sha256, as each
segment holds those of its predecessor. So the newest commit fixes the whole history of the run, and
segments of attempts that died do not count.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sepdist import storage
from sepdist.data.records import Batch
from sepdist.reporting import to_json

# [step, outcome, [[start, stop], ...]], or after `merge` one such list of ranges per rank.
Entry = list[Any]

APPLIED = "applied"
SKIPPED = "skipped"  # fetched, but the gradient was not applied


class LedgerError(ValueError):
    """A segment is missing or damaged."""


@dataclass(frozen=True)
class SegmentRef:
    """A segment's name below run_dir and the sha256 of its bytes."""

    name: str
    sha256: str


class Ledger:
    """The positions that this rank has fetched since the last checkpoint."""

    def __init__(self) -> None:
        self._steps: list[Entry] = []

    def record(self, step: int, outcome: str, batches: Iterable[Batch] = ()) -> None:
        """Record the positions of this rank's batches in one step."""
        positions = (int(position) for batch in batches for position in batch.positions)
        self._steps.append([step, outcome, as_ranges(positions)])

    def take(self) -> list[Entry]:
        """Return what was recorded since the last call."""
        steps, self._steps = self._steps, []
        return steps


def as_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Return runs of consecutive numbers as [start, stop]; a repeated number begins a new run."""
    # In a run of consecutive numbers, number minus place is constant.
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    lists = ([number for _, number in run] for _, run in runs)
    return [[run[0], run[-1] + 1] for run in lists]


def merge(by_rank: list[list[Entry]]) -> list[Entry]:
    """Join all ranks' records of the same steps into one list."""
    merged = []
    for entries in zip(*by_rank, strict=True):
        (step, outcome), *others = {(entry[0], entry[1]) for entry in entries}
        assert not others, f"ranks disagree on step {step}"
        merged.append([step, outcome, [ranges for _, _, ranges in entries]])
    return merged


def put_segment(
    run_dir: str, name: str, merged: list[Entry], previous: SegmentRef | None
) -> SegmentRef:
    """Write a segment to run_dir/ledger/<name>.json; returns its reference for the checkpoint."""
    before = asdict(previous) if previous else None
    segment = to_json({"previous": before, "steps": merged}, separators=(",", ":")).encode()
    name = f"ledger/{name}.json"
    storage.put_bytes(storage.join(run_dir, name), segment)
    return SegmentRef(name, hashlib.sha256(segment).hexdigest())


def read_history(
    run_dir: str, newest: SegmentRef | None
) -> Iterator[tuple[int, str, list[list[list[int]]]]]:
    """Yield (step, outcome, ranges by rank), beginning with the newest segment.

    LedgerError if a segment is missing or is not the one that was committed.
    """
    while newest is not None:
        if ".." in newest.name:  # of a stranger's run: nothing may lead out of its folder
            raise LedgerError(f"{run_dir}: {newest.name!r} is no segment of its ledger")
        url = storage.join(run_dir, newest.name)
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError as error:
            raise LedgerError(
                f"{url} is missing: the history before it cannot be checked"
            ) from error
        if hashlib.sha256(data).hexdigest() != newest.sha256:
            raise LedgerError(f"{url} is damaged: its sha256 is not the one that was committed")
        segment = json.loads(data)
        yield from ((step, outcome, ranks) for step, outcome, ranks in segment["steps"])
        newest = SegmentRef(**segment["previous"]) if segment["previous"] else None
