"""Twenty faults of every kind, and the same bits at the end.

    python -m benchmarks.chaos --faults 20 --seed 0

A run of the demo's model is disturbed at random steps, on nodes that come and go (a Ray of up to three nodes on this
machine, 1 to 4 workers), and compared with one that a single process made without Ray and without faults. Faults:

    kill       SIGKILL to a worker                 node      a raylet and its workers killed; another joins later
    stop       SIGSTOP to a worker                 preempt   a node drained, and killed at its deadline
    livelock   a worker's step spins for ever      driver    SIGKILL to the command; started again at another size

Out: one JSON line, and exit status 1 unless losses (to the last bit) and weights (sha256) are those of the run left
alone and the audit finds every position consumed once. Recovery is from the fault to the first step after it.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sepdist.cli.audit import audit
from sepdist.config import ShardConfig
from sepdist.data.sharding import write_data_set
from sepdist.reporting import read_metrics
from tests.support.disturb import Nodes, Run, left_alone
from tests.support.runs import ROOT, final_hash, history

KINDS = ("kill", "stop", "livelock", "node", "preempt", "driver")
NOTICE_SECONDS = 12
SETTINGS = [
    "data.crop_seconds=0.5",
    "data.micro_batch=1",
    "data.num_virtual_shards=4",
    "validation.every_steps=50",
    "validation.num_mixtures=4",
    "validation.num_listening=1",
    "training.checkpoint_every=10",
    "training.log_every=1",
    "training.early_stop_patience=0",
    "cluster.elastic_check_seconds=10",
    "cluster.preemption_check_steps=5",
]


def make_data(folder: Path) -> dict[str, str]:
    corpus = {
        "_target_": "sepdist.corpora.demo.DemoCorpus",
        "num_train": 240,
        "num_dev": 8,
        "num_test": 8,
    }
    places = {split: str(folder / split) for split in ("train", "dev")}
    for split, place in places.items():
        write_data_set(ShardConfig(corpus=corpus, split=split, output=place, samples_per_shard=40))
    return places


class Chaos:
    """Faults, each a function that disturbs `run` and returns the seconds to the next step."""

    def __init__(self, run: Run, nodes: Nodes, chance: random.Random, most_workers: int) -> None:
        self.run = run
        self.nodes = nodes
        self.chance = chance
        self.most_ever = self.most_workers = most_workers

    def inflict(self, kind: str) -> float:
        return getattr(self, kind)()

    def _signal(self, number: int) -> float:
        worker = self.chance.choice(self.run.workers())
        return self.run.seconds_to_next_step(lambda: worker.send_signal(number))

    def kill(self) -> float:
        return self._signal(signal.SIGKILL)

    def stop(self) -> float:
        return self._signal(signal.SIGSTOP)

    def livelock(self) -> float:
        return self._signal(signal.SIGUSR1)

    def node(self) -> float:
        self._ensure_second()
        seconds = self.run.seconds_to_next_step(self.nodes.lose_second)
        self.nodes.join()
        return seconds

    def preempt(self) -> float:
        self._ensure_second()
        self.nodes.drain_second(NOTICE_SECONDS)
        time.sleep(NOTICE_SECONDS)
        return self.node()

    def driver(self) -> float:
        return self.run.seconds_to_next_step(
            lambda: self._start_again(self.chance.randint(1, self.most_ever))
        )

    def _start_again(self, most_workers: int) -> None:
        self.most_workers = most_workers
        self.run.kill_driver()
        self.run.start(f"cluster.num_workers=[1,{most_workers}]")

    def _ensure_second(self) -> None:
        """Workers on the second node, or else its loss disturbs nobody."""
        if self.most_workers <= self.most_ever // 2:  # they may all be on the first
            self._start_again(self.most_ever)
        self.run.until(self.nodes.second_is_used, "a worker on the second node", 120.0)


def disturb(
    data: dict[str, str],
    folder: Path,
    steps: int,
    faults: Sequence[str],
    most_workers: int,
    seed: int,
) -> dict[str, Any]:
    chance = random.Random(seed)
    nodes = Nodes(num_cpus=(most_workers // 2, most_workers // 2))
    elastic = f"cluster.num_workers=[1,{most_workers}]"
    run = Run(data, folder / "run", elastic, nodes.address, settings=SETTINGS, steps=steps)
    recovered: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(faults)}
    # In the first half: the run must not end while a fault waits for a node to be used.
    due = sorted(chance.sample(range(8, steps // 2), len(faults)))
    chaos = Chaos(run, nodes, chance, most_workers)
    began = time.monotonic()
    try:
        for number, (step, kind) in enumerate(zip(due, faults, strict=True), start=1):
            run.until_step(step, 600.0)
            workers, at = len(run.workers()), run.step()
            seconds = chaos.inflict(kind)
            recovered[kind].append(seconds)
            print(
                f"fault {number:2d} of {len(faults)}: {kind:8s} at step {at:3d} with {workers} workers, "
                f"{seconds:5.1f} s to the next step, now {len(run.workers())} workers",
                file=sys.stderr,
                flush=True,
            )
        run.finish(900.0)
    finally:
        run.end()
        nodes.end()
    return {"wall_seconds": round(time.monotonic() - began, 1), "recovery_seconds": recovered}


def in_short(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "max": round(max(values), 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", "--kills", type=int, default=20, metavar="N")
    parser.add_argument("--steps", type=int, default=0, help="default: 150 for every fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=4, help="at most, an even number; default: %(default)s"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    given = parser.parse_args(arguments)
    steps = given.steps or 150 * given.faults
    kinds = given.kinds.split(",")
    faults = [kinds[number % len(kinds)] for number in range(given.faults)]
    random.Random(given.seed).shuffle(faults)
    # Before any Ray starts, so that its workers have it.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks" / "chaos_site"), str(ROOT)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder / "data")
        losses, weights = left_alone(data, folder / "alone", steps, SETTINGS)
        result = disturb(data, folder, steps, faults, given.workers, given.seed)
        found, rows = audit(str(folder / "run")), read_metrics(str(folder / "run"))
        run = history(folder / "run"), final_hash(folder / "run")
    recovery: dict[str, list[float]] = result.pop("recovery_seconds")
    together = [seconds for values in recovery.values() for seconds in values]
    last = [row for row in rows if "goodput/share" in row][-1]
    verdict = {
        "same_losses": run[0] == losses,
        "same_weights": run[1] == weights,
        "lost": found.num_lost,
        "repeated": found.num_repeated,
    }
    print(
        json.dumps(
            {"benchmark": "chaos", "seed": given.seed, "steps": steps, "faults": len(together)}
            | verdict
            | {"weights_sha256": run[1], "last_loss": losses[steps].hex()}
            | {"steps_by_workers": found.world_sizes, "recovery_seconds": in_short(together)}
            | {
                "by_kind": {
                    kind: {"count": len(values)} | in_short(values)
                    for kind, values in recovery.items()
                }
            }
            | {
                "goodput": {
                    name.removeprefix("goodput/"): value
                    for name, value in last.items()
                    if "goodput/" in name
                }
            }
            | result
        )
    )
    return (
        0 if verdict == {"same_losses": True, "same_weights": True, "lost": 0, "repeated": 0} else 1
    )


if __name__ == "__main__":
    sys.exit(main())
