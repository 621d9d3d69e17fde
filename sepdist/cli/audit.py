"""Check that a run consumed every position of its data exactly once: a run_dir in, a verdict and exit status out.

    python -m sepdist audit runs/a          # or s3://bucket/runs/a

It reads the newest committed checkpoint and the ledger that leads to it (sepdist/training/ledger.py), and checks the
positions that the ranks fetched against [0, steps x global batch). Status 0: none lost, none repeated; 1: some were,
or the ledger is damaged; 2: there is nothing to check.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from sepdist import storage
from sepdist.training.checkpoint import find_committed, read_file
from sepdist.training.ledger import (
    APPLIED,
    SKIPPED,
    LedgerError,
    SegmentRef,
    as_ranges,
    read_history,
)


@dataclass
class Audit:
    """What a run's committed history holds; positions as [start, stop] ranges."""

    checkpoint: str
    steps: int
    positions: int  # that the steps should have consumed
    num_lost: int = 0
    num_repeated: int = 0
    lost: list[list[int]] = field(default_factory=list)
    repeated: list[list[int]] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)  # steps applied and skipped
    world_sizes: dict[int, int] = field(default_factory=dict)  # steps by number of workers

    @property
    def sound(self) -> bool:
        """Whether every position was consumed exactly once."""
        return self.num_lost == 0 and self.num_repeated == 0


def audit(run_dir: str) -> Audit:
    """Check the committed history of a run.

    Raises:
        FileNotFoundError: the run has no committed checkpoint.
        LedgerError: its ledger is incomplete or damaged.
    """
    committed = find_committed(storage.join(run_dir, "checkpoints"))
    if not committed:
        raise FileNotFoundError(
            f"{run_dir}: no committed checkpoint, so there is no history to check"
        )
    newest = committed[-1]
    state = json.loads(read_file(newest, "state.json"))
    if "ledger" not in state:
        raise LedgerError(f"{newest.url}: names no ledger")
    global_batch = state["num_virtual_shards"] * state["micro_batch"]
    result = Audit(newest.url, newest.step, newest.step * global_batch)
    fetched = np.zeros(result.positions, dtype=np.int32)
    outside: list[int] = []
    outcomes: Counter[str] = Counter()
    world_sizes: Counter[int] = Counter()
    for _, outcome, ranks in read_history(run_dir, SegmentRef(**state["ledger"])):
        outcomes[outcome] += 1
        world_sizes[len(ranks)] += 1
        for start, stop in (span for spans in ranks for span in spans):
            fetched[start : min(stop, len(fetched))] += 1
            outside.extend(range(max(start, len(fetched)), stop))
    lost, repeated = (
        np.flatnonzero(fetched == 0),
        [*np.flatnonzero(fetched > 1).tolist(), *sorted(outside)],
    )
    result.num_lost, result.num_repeated = len(lost), len(repeated)
    result.lost, result.repeated = as_ranges(lost.tolist()), as_ranges(repeated)
    result.outcomes = {name: outcomes[name] for name in (APPLIED, SKIPPED)}
    result.world_sizes = dict(sorted(world_sizes.items()))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sepdist audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", help="a folder or s3://bucket/prefix")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    given = parser.parse_args(arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        result = audit(given.run_dir)
    except LedgerError as error:
        errors.print(f"error: {error}", markup=False)
        return 1
    except (OSError, ValueError) as error:
        errors.print(f"error: {error}", markup=False)
        return 2
    if given.json:
        print(json.dumps(asdict(result)))
    else:
        show(result, Console(highlight=False, soft_wrap=True))
    return 0 if result.sound else 1


def show(result: Audit, console: Console) -> None:
    """Print the table and the verdict."""
    table = Table(show_header=False)
    table.add_row("checkpoint", result.checkpoint)
    table.add_row(
        "steps",
        f"{result.steps} ({', '.join(f'{n} {name}' for name, n in result.outcomes.items())})",
    )
    table.add_row(
        "workers", ", ".join(f"{n} steps on {size}" for size, n in result.world_sizes.items())
    )
    table.add_row("positions", str(result.positions))
    console.print(table)
    for name, ranges in (("lost", result.lost), ("repeated", result.repeated)):
        if ranges:
            shown = ", ".join(f"[{start}, {stop})" for start, stop in ranges[:10])
            console.print(f"{name}: {shown}{', ...' if len(ranges) > 10 else ''}")
    console.print(f"{result.num_lost} lost, {result.num_repeated} repeated")


if __name__ == "__main__":
    sys.exit(main())
