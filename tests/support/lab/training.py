"""A training run on the hosts of a lab: a Ray of all, the command on h0, the run_dir on S3."""

import contextlib
import itertools
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.support.disturb import FRESH, HEALTH_CHECKS
from tests.support.lab.hosts import BUCKET, Host, Lab, child_of, end
from tests.support.runs import ROOT, train_arguments

RUN_DIR = f"s3://{BUCKET}/run"
PORT = 6379


class HostsRun:
    """A training command on h0, with one worker on each host that is there.

    The file `pace` holds the seconds of sleep after each step; each host writes the times of its
    steps to a file of its own.
    """

    def __init__(
        self, lab: Lab, data: Mapping[str, str], *more: str, settings: Sequence[str], steps: int
    ) -> None:
        self.lab, self.head = lab, lab.workers[0]
        self.pace = lab.folder / "pace"
        self.set_pace(0.0)
        self.log = lab.folder / "driver.log"
        self.address = f"{self.head.address}:{PORT}"
        workers = f"cluster.num_workers=[1,{len(lab.workers)}]"
        place = [f"cluster.address={self.address}", workers, f"training.max_steps={steps}"]
        # Not in the home directory, which is another on each host.
        cache = "data.cache_dir=/dev/shm/sepdist"
        self.command = train_arguments(
            "demo/finetune", dict(data), RUN_DIR, cache, *place, *FRESH, *more, settings=settings
        )
        self._token = secrets.token_hex(32)
        self.supervisors: dict[str, psutil.Popen] = {}
        self.driver: psutil.Popen | None = None

    def set_pace(self, seconds: float) -> None:
        beside = self.pace.with_suffix(".new")
        beside.write_text(str(seconds))
        beside.replace(self.pace)

    def environment(self, host: Host) -> dict[str, str]:
        checks = {f"RAY_{name}": str(value) for name, value in HEALTH_CHECKS.items()}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        paced = {"LAB_PACE": str(self.pace), "LAB_STEPS": str(self._steps_file(host))}
        return {**self.lab.aws(), **checks, **token, **paced}

    def start_ray(self, host: Host) -> None:
        """Keep Ray running on a host, as cluster/README.md says."""
        where = [f"--address={self.address}"]
        if host is self.head:
            where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        own = [f"--node-ip-address={host.address}", "--num-cpus=1"]
        small = ["--object-store-memory=100000000", "--disable-usage-stats"]
        command = ["bash", str(ROOT / "cluster" / "keep-ray.sh"), *where, *own, *small]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # keep-ray.sh calls `ray`
        env = self.environment(host) | {"PATH": path}
        self.supervisors[host.name] = host.start(*command, log=host.folder / "ray.log", **env)

    def start_driver(self) -> None:
        env = self.environment(self.head)
        self.driver = self.head.start(sys.executable, *self.command, log=self.log, **env)

    def ended(self) -> str:
        """How the command ended: its status and last line; empty while it runs."""
        if self.driver is None or self.driver.poll() is None:
            return ""
        lines = [line for line in self.tail().splitlines() if line.strip()]
        return f"status {self.driver.returncode}: {lines[-1] if lines else ''}"

    def tail(self, num_characters: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-num_characters:]

    def _steps_file(self, host: Host) -> Path:
        return self.lab.folder / f"steps-{host.name}"

    def steps(self, *hosts: Host) -> list[tuple[float, int]]:
        """The steps made by some hosts (default: all): time and number, in the order of time."""
        found = []
        for host in hosts or self.lab.workers:
            path = self._steps_file(host)
            lines = path.read_text().splitlines() if path.exists() else []
            found += [(float(at), int(number)) for at, number in map(str.split, lines)]
        return sorted(found)

    def wait_for_steps(self, since: float, seconds: float) -> list[str]:
        """Wait until every host has made a step after `since`; returns the names that have not."""
        deadline = time.monotonic() + seconds
        while True:
            behind = [
                host.name
                for host in self.lab.workers
                if not any(at > since for at, _ in self.steps(host)[-1:])
            ]
            if not behind or self.ended() or time.monotonic() > deadline:
                return behind
            time.sleep(0.5)

    def terminate(self, *, everything: bool, seconds: float = 90.0) -> int | None:
        """SIGTERM the command, or every process on every host; returns the command's status.

        What still runs after `seconds` is killed, which counts as no status.
        """
        assert self.driver is not None
        if command := child_of(self.driver):
            command.send_signal(signal.SIGTERM)
        supervisors = list(self.supervisors.values()) if everything else []
        for supervisor in supervisors:
            for process in supervisor.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
        try:
            status = self.driver.wait(seconds)
        except psutil.TimeoutExpired:
            status = None
        orphans = [psutil.Process(host.pid) for host in self.lab.workers] if everything else []
        end([self.driver, *supervisors, *(one for host in orphans for one in host.children())])
        return status

    def close(self) -> None:
        end([*self.supervisors.values(), *([self.driver] if self.driver else [])])


def longest_gap(steps: Sequence[tuple[float, int]], begin: float, stop: float) -> float:
    """The longest time without a step that overlaps [begin, stop], from the step before it on."""
    before = [at for at, _ in steps if at <= begin][-1:] or [begin]
    times = [*before, *(at for at, _ in steps if begin < at < stop), stop]
    return max(later - at for at, later in itertools.pairwise(times))


def redone(steps: Sequence[tuple[float, int]], begin: float, stop: float) -> int:
    """The steps made again in [begin, stop], because the run went back to a checkpoint."""
    newest, count = max([number for at, number in steps if at <= begin][-3:], default=-1), 0
    for _, number in [one for one in steps if begin < one[0] < stop]:
        if number < newest - 1:  # hosts write the same step at slightly different times
            count += newest - number + 1
            newest = number
        newest = max(newest, number)
    return count


def events_between(run_dir_events: bytes, begin: float, stop: float) -> list[str]:
    rows = [json.loads(line) for line in run_dir_events.splitlines()]
    return [row["event"] for row in rows if begin <= row["time"] < stop]
