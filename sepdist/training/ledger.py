"""What a run has consumed: the positions of every step in, one segment per checkpoint out, each naming the one before.

    run_dir/ledger/step-<step>-<attempt>.json

A segment holds what every rank really fetched in the steps since the checkpoint before. It is put before the
checkpoint commits, whose state.json names it by its sha256, as the segment names its predecessor: so the newest
commit fixes the whole history of the run that led to it, and what dead attempts wrote beside it does not count.
`python -m sepdist audit` checks that history.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sepdist import storage
from sepdist.data.records import Batch

Entry = list[
    Any
]  # [step, what became of it, [[start, stop], ...]], or after `merge` a list of such ranges per rank

LEFT_OUT = "left out"  # by a rollback: the positions count as consumed, nobody trains on them
SKIPPED = "skipped"  # fetched, but the gradient was not applied
APPLIED = "applied"


class LedgerError(ValueError):
    """A segment is missing or damaged."""


@dataclass(frozen=True)
class Link:
    """The name of a segment below run_dir and the sha256 of its bytes."""

    name: str
    sha256: str


class Ledger:
    """What this rank has fetched since the last checkpoint."""

    def __init__(self) -> None:
        self._steps: list[Entry] = []

    def record(self, step: int, outcome: str, batches: Iterable[Batch] = ()) -> None:
        """Note one step and the positions of this rank's batches."""
        positions = (int(position) for batch in batches for position in batch.positions)
        self._steps.append([step, outcome, as_ranges(positions)])

    def take(self) -> list[Entry]:
        """What this rank recorded since the last call."""
        steps, self._steps = self._steps, []
        return steps


def as_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Runs of consecutive numbers as [start, stop], in the order given; a repeated number begins a run of its own."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges


def merge(by_rank: list[list[Entry]]) -> list[Entry]:
    """What every rank recorded over the same steps, as one list."""
    merged = []
    for entries in zip(*by_rank, strict=True):
        (step, outcome), *others = {(entry[0], entry[1]) for entry in entries}
        assert not others, f"ranks disagree on step {step}"
        merged.append([step, outcome, [ranges for _, _, ranges in entries]])
    return merged


def put_segment(run_dir: str, name: str, merged: list[Entry], previous: Link | None) -> Link:
    """Put a segment at run_dir/ledger/<name>.json; the link that a checkpoint has to hold."""
    before = asdict(previous) if previous else None
    segment = json.dumps({"previous": before, "steps": merged}, separators=(",", ":")).encode()
    name = f"ledger/{name}.json"
    storage.put_bytes(storage.join(run_dir, name), segment)
    return Link(name, hashlib.sha256(segment).hexdigest())


def read_history(
    run_dir: str, head: Link | None
) -> Iterator[tuple[int, str, list[list[list[int]]]]]:
    """(step, outcome, ranges by rank) of the history that ends at `head`, newest segment first.

    Raises:
        LedgerError: a segment is missing or not the one that was committed.
    """
    while head is not None:
        url = storage.join(run_dir, head.name)
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError as error:
            raise LedgerError(
                f"{url} is missing: the history before it cannot be checked"
            ) from error
        if hashlib.sha256(data).hexdigest() != head.sha256:
            raise LedgerError(f"{url} is damaged: its sha256 is not the one that was committed")
        segment = json.loads(data)
        yield from ((step, outcome, ranks) for step, outcome, ranks in segment["steps"])
        head = Link(**segment["previous"]) if segment["previous"] else None
