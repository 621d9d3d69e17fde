"""Kill a run with its checkpoints on S3 again and again, and compare its bits.

    python -m benchmarks.kills --training 30 --starting 20 --ray 6

A run of a tiny model, its data and run_dir on an S3 server, is killed by SIGKILL and started again:
at random times while it trains; at random times between the start of its process and its first
step; and under Ray with two workers, by turns a worker (which Ray replaces) and the command with
all workers. A checkpoint is due every five steps, so that many kills fall into one.

Prints one JSON line. The exit status is 1 unless losses, weights and optimizer state are, to the
bit, those of a run that was left alone, and every position was consumed exactly once.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from benchmarks.chaos import NUM_QUICK_MIXTURES, make_data
from benchmarks.chaos_hosts import say
from sepdist import storage
from sepdist.training.audit import audit
from tests.support.disturb import FRESH, left_alone, train_workers
from tests.support.lab.hosts import BUCKET, SITE, end
from tests.support.runs import (
    ROOT,
    TINY,
    final_files,
    frozen,
    history,
    train_arguments,
    upload,
)
from tests.support.s3server import S3Server

RUN_DIR = f"s3://{BUCKET}/run"
SETTINGS = [*TINY, "validation.every_steps=50", "training.checkpoint_every=5"]
START_SECONDS = 300.0


class Victim:
    """A command that trains, paced so that a kill falls into a step."""

    def __init__(self, folder: Path, pace: float) -> None:
        self.log = folder / "victim.log"
        self.steps_file, pace_file = folder / "steps", folder / "pace"
        self.steps_file.touch()
        pace_file.write_text(str(pace))
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{SITE}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "RAY_worker_niceness": "0",  # as in a lab
            "LAB_STEPS": str(self.steps_file),
            "LAB_PACE": str(pace_file),
        }
        self.process: psutil.Popen | None = None

    def start(self, *arguments: str) -> None:
        self.began, self.began_at = time.monotonic(), time.time()
        self.stepped = self.steps_file.stat().st_size
        with open(self.log, "ab") as log:
            self.process = psutil.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def has_stepped(self) -> bool:
        """Whether it made a step since it was started, or since `forget_steps`."""
        return self.steps_file.stat().st_size > self.stepped

    def forget_steps(self) -> None:
        self.stepped = self.steps_file.stat().st_size

    def wait_until(self, ready: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while not ready():
            tail = self.log.read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, f"it ended, {self.process.returncode}:\n{tail}"
            assert time.monotonic() < deadline, f"not in {seconds} s:\n{tail}"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL it, and wait until its Ray workers, if any, have ended as well."""
        assert self.process is not None
        workers = train_workers(self.process)
        self.process.kill()
        self.process.wait()
        assert not psutil.wait_procs(workers, timeout=60)[1]

    def finish(self) -> None:
        assert self.process is not None
        status = self.process.wait(1800)
        assert status == 0, self.log.read_text(errors="replace")[-3000:]


def kill_alone(victim: Victim, given: argparse.Namespace, chance: random.Random) -> float:
    """Kill single processes without Ray; returns the median seconds to the first step."""
    kinds = ["training"] * given.training + ["starting"] * given.starting
    chance.shuffle(kinds)
    starts = []
    for number, kind in enumerate(["training", *kinds]):  # the first measures the start
        victim.start("-m", "sepdist.training.loop", f"{RUN_DIR}/config.yaml")
        if kind == "starting":
            until = victim.began + chance.uniform(0.0, min(starts))
            victim.wait_until(lambda until=until: time.monotonic() > until or victim.has_stepped())  # type: ignore[misc]
        else:
            victim.wait_until(victim.has_stepped)
            starts.append(time.monotonic() - victim.began)
            time.sleep(chance.uniform(0.0, 3.0) if number else 0.0)
        say(
            f"kill {number} of {len(kinds)}, {kind}, {time.monotonic() - victim.began:.2f} s after "
            f"its start{', it had made a step' if victim.has_stepped() else ''}"
        )
        victim.kill()
    return sorted(starts)[len(starts) // 2]


def kill_under_ray(victim: Victim, arguments: list[str], count: int, chance: random.Random) -> None:
    """Kill workers and the command of a Ray run with two workers by turns."""
    for number in range(count):
        if victim.process is None or victim.process.poll() is not None:
            victim.start(*arguments)
        victim.wait_until(victim.has_stepped)
        time.sleep(chance.uniform(0.0, 3.0))
        victim.forget_steps()
        say(f"kill {number + 1} of {count} under Ray: {('a worker', 'the command')[number % 2]}")
        if number % 2:
            victim.kill()
        else:
            assert victim.process is not None
            worker = chance.choice(train_workers(victim.process))
            worker.kill()
            worker.wait(10)
            victim.forget_steps()


@contextlib.contextmanager
def store(folder: Path) -> Iterator[S3Server]:
    """An S3 server with an empty bucket, and the environment that finds it."""
    server = S3Server(folder / "store").start()
    try:
        server.client().create_bucket(Bucket=BUCKET)
        os.environ.update(server.environment())
        yield server
    finally:
        server.kill()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--training", type=int, default=30, help="kills while training; default: %(default)s")
    add("--starting", type=int, default=20, help="kills while starting; default: %(default)s")
    add("--ray", type=int, default=6, help="kills under Ray; default: %(default)s")
    add("--steps", type=int, default=1000, help="of the run; default: %(default)s")
    add("--seed", type=int, default=0)
    add("--keep", type=Path, help="a folder for all files and logs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    chance = random.Random(given.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        local = make_data(folder / "data", NUM_QUICK_MIXTURES)
        losses, _ = left_alone(local, folder / "alone", given.steps, SETTINGS)
        expected = final_files(folder / "alone")
        with store(folder):
            data = upload(local, f"s3://{BUCKET}/data")
            words = [f"training.max_steps={given.steps}", f"data.cache_dir={folder / 'cache'}"]
            words += ["cluster.num_workers=2"]
            alone = ["-m", "sepdist.training.loop", f"{RUN_DIR}/config.yaml"]
            ray = train_arguments("demo/finetune", data, RUN_DIR, *words, *FRESH, settings=SETTINGS)
            config = frozen(
                data, folder / "config", *words, f"run_dir={RUN_DIR}", settings=SETTINGS
            )
            storage.put_bytes(f"{RUN_DIR}/config.yaml", Path(config).read_bytes())
            victim = Victim(folder, pace=0.1)
            try:
                start = kill_alone(victim, given, chance)
                kill_under_ray(victim, ray, given.ray, chance)
                if victim.process is None or victim.process.poll() is not None:
                    victim.start(*(ray if given.ray else alone))
                (folder / "pace").write_text("0")
                victim.finish()
                found, audited = final_files(RUN_DIR), audit(RUN_DIR)
                same_losses = history(RUN_DIR) == losses
            finally:
                if victim.process is not None:
                    end([victim.process])
    result = {
        "benchmark": "kills",
        "kills": {name: getattr(given, name) for name in ("training", "starting", "ray")},
        "steps": given.steps,
        "same_losses": same_losses,
        "same_weights": found[0] == expected[0],
        "same_optimizer": found[1] == expected[1],
        "weights_sha256": found[0],
        "lost": audited.num_lost,
        "repeated": audited.num_repeated,
        "start_seconds": round(start, 1),
        "wall_seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result))
    same = result["same_losses"] and result["same_weights"] and result["same_optimizer"]
    return 0 if same and audited.sound else 1


if __name__ == "__main__":
    sys.exit(main())
