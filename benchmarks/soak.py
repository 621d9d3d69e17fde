"""Train for an hour under faults, and see whether memory, descriptors and files stay flat.

    python -m benchmarks.soak --minutes 60 --folder soak
    python -m benchmarks.soak --folder soak --report

A run of a tiny model with two Ray workers, its data and run_dir on an S3 server, is disturbed every
minute: the server is killed for 5 to 25 s, every request takes 0.3 s longer, a third of them are
answered by 503, or their connections are reset. In the first 20 minutes a worker is killed every
five; so the last workers live long enough to show a leak. Every 10 s a line is added to
FOLDER/samples.jsonl: resident memory, open descriptors and threads of the command, of Ray Train's
controller and of the workers, and the bytes of the run_dir. A soak that was killed goes on in its
folder; `--report` prints the result so far.

Prints one JSON line. A slope is that of a line through the samples, per hour. Processes are
replaced, so those of one role share a slope but not a level, and the first five minutes of each do
not count. Logs grow with the steps by design; their bytes per step are given. The exit status is 1
if something is not flat (see LIMITS), the command ended, or the audit found positions lost or
repeated.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.chaos import NUM_QUICK_MIXTURES, make_data
from benchmarks.kills import SETTINGS, Victim
from sepdist.training.audit import audit
from tests.support.disturb import FRESH, train_workers
from tests.support.lab.hosts import BUCKET, end
from tests.support.runs import train_arguments, upload
from tests.support.s3server import FaultyProxy, S3Server

RUN_DIR = f"s3://{BUCKET}/run"
SAMPLE_SECONDS = 10.0
WARM_UP_SECONDS = 300.0
KILL_MINUTES = (5, 10, 15, 20)
FAULTS = ("killed", "slow", "503", "reset")
# Most that counts as flat, per hour: a share of the mean, or a number.
LIMITS = {
    "rss": (0.03, 10e6),
    "descriptors": (0.03, 5.0),
    "threads": (0.03, 2.0),
    "checkpoint_bytes": (0.05, 50e3),  # one or two of the tiny model's checkpoints
}


class Faults(threading.Thread):
    """Disturbs the server, and the workers of `victim`, minute by minute until `stop` is set."""

    def __init__(self, server: S3Server, victim: Victim, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.victim, self.stop = server, victim, stop
        self.chance = random.Random(0)
        self.now = ""
        self.counts: dict[str, int] = defaultdict(int)

    def of_request(self, number: int, line: str) -> str:
        """What FaultyProxy does with a request."""
        if self.now == "slow":
            return "delay:0.3"
        return self.now if self.now in ("503", "reset") and number % 3 == 0 else ""

    def run(self) -> None:
        for minute in itertools.count(1):
            if self.stop.wait(30):
                return
            fault, seconds = FAULTS[minute % len(FAULTS)], self.chance.uniform(5.0, 25.0)
            self.counts[fault] += 1
            if fault == "killed":
                self.server.kill()
                self.stop.wait(seconds)
                self.server.start()
            else:
                self.now = fault
                self.stop.wait(seconds)
                self.now = ""
            if minute in KILL_MINUTES and self.victim.process is not None:
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    self.chance.choice(train_workers(self.victim.process)).kill()
                    self.counts["worker killed"] += 1
            if self.stop.wait(30 - seconds):
                return


def processes(command: psutil.Process) -> Iterable[tuple[str, psutil.Process]]:
    """The command, the controller and the workers, by role."""
    yield "command", command
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in command.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                if one.cmdline()[0].startswith("ray::TrainController"):
                    yield "controller", one
    yield from (("worker", one) for one in train_workers(command))


def sample(victim: Victim, server: S3Server) -> list[dict[str, Any]]:
    """One row per process, and one of the run_dir unless the server is away."""
    assert victim.process is not None
    now, rows = time.time(), []
    for role, one in processes(victim.process):
        with contextlib.suppress(psutil.NoSuchProcess), one.oneshot():
            rows.append(
                {
                    "role": role,
                    "id": f"{one.pid}-{one.create_time():.0f}",
                    "age": now - one.create_time(),
                    "rss": one.memory_info().rss,
                    "descriptors": one.num_fds(),
                    "threads": one.num_threads(),
                }
            )
    with contextlib.suppress(Exception):  # of any kind, where the server is away
        sizes: dict[str, int] = defaultdict(int)
        pages = (
            server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="run/")
        )
        for item in itertools.chain.from_iterable(page.get("Contents", []) for page in pages):
            sizes[item["Key"].split("/")[1]] += item["Size"]
        checkpoints = sizes.pop("checkpoints", 0)
        lines = victim.steps_file.read_text().splitlines()
        steps = max((int(line.split()[1]) for line in lines), default=0)
        rows.append(
            {
                "role": "run_dir",
                "id": "run_dir",
                "age": now - victim.began_at,
                "checkpoint_bytes": checkpoints,
                "log_bytes": sum(sizes.values()),
                "steps": steps,
            }
        )
    return [{"time": round(now, 1)} | row for row in rows]


def slope_per_hour(rows: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """The common slope of `name` over time of several processes, and the mean."""
    by_process: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        by_process[row["id"]].append((row["time"] / 3600, float(row[name])))
    spreads = [np.array(points) - np.mean(points, axis=0) for points in by_process.values()]
    times, values = np.concatenate(spreads).T
    mean = float(np.mean([row[name] for row in rows]))
    return float((times * values).sum() / max((times**2).sum(), 1e-12)), mean


def report(folder: Path) -> dict[str, Any]:
    """Slopes and means by role and quantity, each with whether it is flat."""
    text = (folder / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    by_role: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["age"] > WARM_UP_SECONDS:
            by_role[row["role"]].append(row)
    found: dict[str, Any] = {}
    for role, warm in by_role.items():
        for name, (share, number) in LIMITS.items():
            if name in warm[0]:
                slope, mean = slope_per_hour(warm, name)
                found[f"{role} {name}"] = {
                    "mean": round(mean, 1),
                    "slope_per_hour": round(slope, 1),
                    "processes": len({row["id"] for row in warm}),
                    "flat": abs(slope) <= max(share * mean, number),
                }
    result: dict[str, Any] = {
        "benchmark": "soak",
        "minutes": round((rows[-1]["time"] - rows[0]["time"]) / 60, 1),
        "samples": len(rows),
        "flat": all(one["flat"] for one in found.values()),
        "slopes": found,
    }
    if logs := by_role.get("run_dir"):
        steps = max(1, logs[-1]["steps"] - logs[0]["steps"])
        grown = logs[-1]["log_bytes"] - logs[0]["log_bytes"]
        result["log_bytes_per_step"] = round(grown / steps, 1)
        result["steps"] = logs[-1]["steps"]
    return result


def soak(given: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is over; returns the report, with faults and the audit."""
    folder, stop = given.folder, threading.Event()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        make_data(folder / "data", NUM_QUICK_MIXTURES)
    local = {split: str(folder / "data" / split) for split in ("train", "dev")}
    server = S3Server(folder / "store").start()
    os.environ.update(server.environment())
    with contextlib.suppress(server.client().exceptions.BucketAlreadyOwnedByYou):
        server.client().create_bucket(Bucket=BUCKET)
    data = upload(local, f"s3://{BUCKET}/data")
    victim = Victim(folder, pace=0.2)
    faults = Faults(server, victim, stop)
    proxy = FaultyProxy(server.ports["s3"], faults.of_request)
    victim.environment["AWS_ENDPOINT_URL"] = proxy.endpoint
    words = ["training.max_steps=1000000", f"data.cache_dir={folder / 'cache'}"]
    words += ["cluster.num_workers=2", "training.early_stop_patience=0", *FRESH]
    command = train_arguments("demo/finetune", data, RUN_DIR, *words, settings=SETTINGS)
    ended = []
    deadline = time.monotonic() + given.minutes * 60
    try:
        victim.start(*command)
        faults.start()
        with open(folder / "samples.jsonl", "a") as file:
            while time.monotonic() < deadline:
                assert victim.process is not None
                if victim.process.poll() is not None:
                    ended.append(victim.log.read_text(errors="replace").strip()[-300:])
                    victim.start(*command)
                for row in sample(victim, server):
                    file.write(json.dumps(row) + "\n")
                file.flush()
                time.sleep(SAMPLE_SECONDS)
        stop.set()
        faults.join(60)
        victim.kill()
        server.kill()  # the one that runs now ended with the thread that started it
        server.start()
        audited = audit(RUN_DIR)
    finally:
        stop.set()
        if victim.process is not None:
            end([victim.process])
        proxy.close()
        server.kill()
    more = {"faults": dict(faults.counts), "ended": ended}
    return report(folder) | more | {"lost": audited.num_lost, "repeated": audited.num_repeated}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, default=Path("soak"))
    parser.add_argument("--report", action="store_true", help="of what was sampled so far")
    given = parser.parse_args(arguments)
    result = report(given.folder) if given.report else soak(given)
    print(json.dumps(result))
    whole = not result.get("ended") and not result.get("lost") and not result.get("repeated")
    return 0 if result["flat"] and whole else 1


if __name__ == "__main__":
    sys.exit(main())
