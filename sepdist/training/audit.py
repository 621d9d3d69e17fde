"""Check that a run consumed every position of its data exactly once.

The newest committed checkpoint names the ledger that leads to it (see training/ledger.py); the
positions that the ranks fetched are compared with [0, steps x global batch).
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np

from sepdist import storage
from sepdist.training import ledger
from sepdist.training.checkpoint import find_committed, read_file
from sepdist.training.ledger import LedgerError, SegmentRef

MAX_POSITIONS = 2**30  # 4 GiB of counts; a stranger's run may claim any number
MAX_OUTSIDE = 2**20  # positions of one rank and step beyond the end, to list


@dataclass
class Audit:
    """The committed history of a run; positions as [start, stop] ranges."""

    checkpoint: str
    steps: int
    positions: int  # that the steps should have consumed
    num_lost: int
    num_repeated: int
    lost: list[list[int]]
    repeated: list[list[int]]
    outcomes: dict[str, int]  # steps applied and skipped
    world_sizes: dict[int, int]  # steps by number of workers

    @property
    def sound(self) -> bool:
        """Whether every position was consumed exactly once."""
        return self.num_lost == 0 and self.num_repeated == 0


def audit(run_dir: str) -> Audit:
    """Check a run's committed history; LedgerError if damaged, FileNotFoundError if absent."""
    committed = find_committed(storage.join(run_dir, "checkpoints"))
    if not committed:
        raise FileNotFoundError(f"{run_dir}: no committed checkpoint, so no history to check")
    newest = committed[-1]
    state = json.loads(read_file(newest, "state.json"))
    if "ledger" not in state:
        raise LedgerError(f"{newest.url}: names no ledger")
    num_positions = newest.step * state["num_virtual_shards"] * state["micro_batch"]
    if not 0 <= num_positions <= MAX_POSITIONS:
        raise LedgerError(f"{newest.url}: {num_positions} positions are more than can be checked")
    fetched = np.zeros(num_positions, dtype=np.int32)  # how often, by position
    outside: list[int] = []
    outcomes: Counter[str] = Counter()
    world_sizes: Counter[int] = Counter()
    for _, outcome, ranks in ledger.read_history(run_dir, SegmentRef(**state["ledger"])):
        outcomes[outcome] += 1
        world_sizes[len(ranks)] += 1
        for start, stop in itertools.chain.from_iterable(ranks):
            fetched[start:stop] += 1
            outside.extend(range(max(start, num_positions), min(stop, start + MAX_OUTSIDE)))
    lost = np.flatnonzero(fetched == 0).tolist()
    repeated = [*np.flatnonzero(fetched > 1).tolist(), *sorted(outside)]
    return Audit(
        checkpoint=newest.url,
        steps=newest.step,
        positions=num_positions,
        num_lost=len(lost),
        num_repeated=len(repeated),
        lost=ledger.as_ranges(lost),
        repeated=ledger.as_ranges(repeated),
        outcomes={name: outcomes[name] for name in (ledger.APPLIED, ledger.SKIPPED)},
        world_sizes=dict(sorted(world_sizes.items())),
    )


def to_text(result: Audit) -> str:
    """The result in lines, with the first positions that were lost or repeated."""
    outcomes = ", ".join(f"{number} {name}" for name, number in result.outcomes.items())
    workers = ", ".join(f"{number} steps on {size}" for size, number in result.world_sizes.items())
    lines = [
        f"checkpoint  {result.checkpoint}",
        f"steps       {result.steps} ({outcomes})",
        f"workers     {workers}",
        f"positions   {result.positions}",
    ]
    for name, ranges in (("lost", result.lost), ("repeated", result.repeated)):
        if ranges:
            shown = ", ".join(f"[{start}, {stop})" for start, stop in ranges[:10])
            lines.append(f"{name}: {shown}{', ...' if len(ranges) > 10 else ''}")
    return "\n".join([*lines, f"{result.num_lost} lost, {result.num_repeated} repeated"])
