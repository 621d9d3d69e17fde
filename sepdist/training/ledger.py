"""Record the positions that each step of a run consumed, for `sepdist audit` to check.

    run_dir/ledger/step-<step>-<attempt>.json

A segment holds the positions that each rank fetched in the steps since the checkpoint before: those
of the first of like steps, which the others shift by a global batch each, and how many there are.
It is written before the checkpoint commits, whose state.json holds its name and sha256, as each
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

Ranges = list[list[int]]  # [[start, stop], ...]
# [first step, number of steps, positions from one to the next, outcome, ranges in the first step]
Run = list[Any]
RunsByRank = list[list[Run]]  # of all ranks, from one snapshot to the next

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

    def __init__(self, stride: int) -> None:
        self._stride = stride  # positions from one step to the next
        self._runs: list[Run] = []

    def record(self, step: int, outcome: str, batches: Iterable[Batch] = ()) -> None:
        """Record the positions of this rank's batches in one step."""
        ranges = as_ranges(itertools.chain(*(batch.positions.tolist() for batch in batches)))
        if self._runs:
            first, number, stride, its_outcome, before = self._runs[-1]
            expected = first + number, its_outcome, _shifted(before, number * stride)
            if expected == (step, outcome, ranges):
                self._runs[-1][1] += 1
                return
        self._runs.append([step, 1, self._stride, outcome, ranges])

    def take(self) -> list[Run]:
        """Return what was recorded since the last call."""
        runs, self._runs = self._runs, []
        return runs


def _shifted(ranges: Ranges, distance: int) -> Ranges:
    return [[start + distance, stop + distance] for start, stop in ranges]


def as_ranges(numbers: Iterable[int]) -> Ranges:
    """Return runs of consecutive numbers as [start, stop]; a repeated number begins a new run."""
    # In a run of consecutive numbers, number minus place is constant.
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    lists = ([number for _, number in run] for _, run in runs)
    return [[run[0], run[-1] + 1] for run in lists]


def steps_of(runs: list[Run]) -> Iterator[tuple[int, str, Ranges]]:
    """Yield (step, outcome, ranges) of each step of a rank."""
    for first, number, stride, outcome, ranges in runs:
        for i in range(number):
            yield first + i, outcome, _shifted(ranges, i * stride)


def put_segment(
    run_dir: str, name: str, consumed: list[RunsByRank], previous: SegmentRef | None
) -> SegmentRef:
    """Write a segment to run_dir/ledger/<name>.json; returns its reference for the checkpoint."""
    before = asdict(previous) if previous else None
    segment = to_json({"previous": before, "runs": consumed}, separators=(",", ":")).encode()
    name = f"ledger/{name}.json"
    storage.put_bytes(storage.join(run_dir, name), segment)
    return SegmentRef(name, hashlib.sha256(segment).hexdigest())


def read_history(run_dir: str, newest: SegmentRef | None) -> Iterator[tuple[int, str, list]]:
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
            lost = "the history before it cannot be checked"
            raise LedgerError(f"{url} is missing: {lost}") from error
        if hashlib.sha256(data).hexdigest() != newest.sha256:
            raise LedgerError(f"{url} is damaged: its sha256 is not the one that was committed")
        segment = json.loads(data)
        yield from segment.get("steps", ())  # of older versions
        for by_rank in segment.get("runs", ()):
            for steps in zip(*map(steps_of, by_rank), strict=True):
                if len({(step, outcome) for step, outcome, _ in steps}) > 1:
                    raise LedgerError(f"{url}: ranks disagree on step {steps[0][0]}")
                yield *steps[0][:2], [ranges for _, _, ranges in steps]
        newest = SegmentRef(**segment["previous"]) if segment["previous"] else None
