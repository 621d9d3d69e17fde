"""Disturb a training run with twenty faults of every kind and check that its bits are unchanged.

    python -m benchmarks.chaos --faults 20 --seed 0

A run of the demo's model is disturbed at random steps, on nodes that come and go (a Ray of up to
three nodes on this machine, 1 to 4 workers), and compared with a run in a single process without
Ray and without faults. Faults:

    kill      SIGKILL to a worker
    stop      SIGSTOP to a worker
    livelock  a worker's step never returns
    node      a node and its workers are killed; another node joins
    preempt   a node is drained, and killed at its deadline
    driver    SIGKILL to the command, which is started again with another number of workers

Prints one JSON line. The exit status is 1 unless losses (to the last bit) and weights (sha256) are
those of the undisturbed run and the audit finds that every position was consumed exactly once.
Recovery is measured from the fault to the first step after it.
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

from sepdist.config import ShardConfig
from sepdist.data.sharding import write_data_set
from sepdist.reporting import read_metrics
from sepdist.training.audit import audit
from tests.support.disturb import Nodes, Run, left_alone
from tests.support.runs import ROOT, TINY, final_hash, history

KINDS = ("kill", "stop", "livelock", "node", "preempt", "driver")
NOTICE_SECONDS = 12
SETTINGS = [
    "data.crop_seconds=0.5",
    "data.micro_batch=1",
    "data.num_virtual_shards=4",
    "validation.every_steps=50",
    "validation.num_mixtures=4",
    "validation.num_listening=1",
    "schedule.decay_steps=0",
    "training.checkpoint_every=10",
    "training.log_every=1",
    "training.early_stop_patience=0",
    "cluster.elastic_check_seconds=10",
    "cluster.preemption_check_steps=5",
]
# A model without compilation, and a watchdog that does not wait long: most of the time is recovery.
QUICK_SETTINGS = [*SETTINGS, *TINY, "cluster.hang_seconds=10"]
NUM_MIXTURES, NUM_QUICK_MIXTURES = 240, 24


def make_data(folder: Path, num_mixtures: int) -> dict[str, str]:
    corpus = {
        "_target_": "sepdist.corpora.demo.DemoCorpus",
        "num_train": num_mixtures,
        "num_dev": 8,
    }
    urls = {split: str(folder / split) for split in ("train", "dev")}
    for split, url in urls.items():
        write_data_set(ShardConfig(corpus=corpus, split=split, output=url, samples_per_shard=40))
    return urls


class Chaos:
    """Faults by name: each method disturbs `run` and returns the seconds to its next step."""

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
        """Wait for workers on the second node, without which its loss would disturb nothing."""
        if self.most_workers <= self.most_ever // 2:  # they may all be on the first
            self._start_again(self.most_ever)
        self.run.until(self.nodes.second_is_used, "with a worker on the second node", 120.0)


def disturb(run: Run, nodes: Nodes, given: argparse.Namespace) -> dict[str, list[float]]:
    """Inflict the faults at random steps, wait for the end; returns seconds of recovery by kind."""
    kinds = given.kinds.split(",")
    faults = [kinds[number % len(kinds)] for number in range(given.faults)]
    random.Random(given.seed).shuffle(faults)
    chance = random.Random(given.seed)
    # In the first half: the run must not end while a fault waits for a node to be used.
    due = sorted(chance.sample(range(8, given.steps // 2), len(faults)))
    chaos = Chaos(run, nodes, chance, given.workers)
    recovered: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(faults)}
    for number, (step, kind) in enumerate(zip(due, faults, strict=True), start=1):
        run.until_step(step, 600.0)
        workers, at = len(run.workers()), run.step()
        seconds = chaos.inflict(kind)
        recovered[kind].append(seconds)
        print(
            f"fault {number:2d} of {len(faults)}: {kind:8s} at step {at:3d} with {workers} workers,"
            f" {seconds:5.1f} s to the next step, now {len(run.workers())} workers",
            file=sys.stderr,
            flush=True,
        )
    run.finish(900.0)
    return recovered


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--faults", type=int, default=20, metavar="N")
    add("--steps", type=int, default=0, help="default: 150 for every fault")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=4, help="at most, an even number; default: %(default)s")
    add("--kinds", default=",".join(KINDS), help="default: %(default)s")
    add("--quick", action="store_true", help="a tiny model that is not compiled, and less data")
    given = parser.parse_args(arguments)
    given.steps = given.steps or 150 * given.faults
    return given


def summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "max": round(max(values), 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    settings = QUICK_SETTINGS if given.quick else SETTINGS
    # Before any Ray starts, so that its workers have it.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks" / "chaos_site"), str(ROOT)])
    with tempfile.TemporaryDirectory() as name:
        folder, run_dir = Path(name), Path(name, "run")
        data = make_data(folder / "data", NUM_QUICK_MIXTURES if given.quick else NUM_MIXTURES)
        losses, weights = left_alone(data, folder / "alone", given.steps, settings)
        began = time.monotonic()
        spread = {"node", "preempt"} & set(given.kinds.split(","))  # else one node will do
        nodes = Nodes((given.workers // 2, given.workers // 2) if spread else (given.workers,))
        elastic = [f"cluster.num_workers=[1,{given.workers}]", nodes.address]
        run = Run(data, run_dir, *elastic, settings=settings, steps=given.steps)
        try:
            recovered = disturb(run, nodes, given)
        finally:
            run.end()
            nodes.end()
        wall_seconds = time.monotonic() - began
        audited, rows = audit(str(run_dir)), read_metrics(str(run_dir))
        same_losses, same_weights = history(run_dir) == losses, final_hash(run_dir) == weights
    last = [row for row in rows if "goodput/share" in row][-1]
    result = {
        "benchmark": "chaos",
        "seed": given.seed,
        "steps": given.steps,
        "faults": given.faults,
        "same_losses": same_losses,
        "same_weights": same_weights,
        "lost": audited.num_lost,
        "repeated": audited.num_repeated,
        "weights_sha256": weights,
        "last_loss": losses[given.steps].hex(),
        "steps_by_workers": audited.world_sizes,
        "recovery_seconds": summary([seconds for all in recovered.values() for seconds in all]),
        "by_kind": {
            kind: {"count": len(values)} | summary(values) for kind, values in recovered.items()
        },
        "goodput": {
            name.removeprefix("goodput/"): value
            for name, value in last.items()
            if name.startswith("goodput/")
        },
        "wall_seconds": round(wall_seconds, 1),
    }
    print(json.dumps(result))
    sound = same_losses and same_weights and audited.num_lost == audited.num_repeated == 0
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
