"""Runs to disturb, and the nodes they run on, for the tests of recovery and the chaos benchmark."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.support.runs import ROOT, final_hash, frozen, history, loop, train_arguments
from tests.support.s3server import free_ports

_T = TypeVar("_T")
# As cluster/README.md gives them to `ray start --head`.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 2000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 4,
}
FRESH = ["init.weights=null", "init.reinit=[]"]


def left_alone(
    data: dict[str, str], run_dir: Path, steps: int, settings: Sequence[str]
) -> tuple[dict[int, float], str]:
    """Losses by step and the hash of the last weights of a run in one process without Ray."""
    loop(frozen(data, run_dir, f"training.max_steps={steps}", settings=settings))
    losses = history(run_dir)
    assert list(losses) == list(range(1, steps + 1))
    return losses, final_hash(run_dir)


class Run:
    """A training command in the background, observed from outside."""

    def __init__(
        self,
        data: dict[str, str],
        run_dir: Path,
        *more: str,
        settings: Sequence[str],
        steps: int,
        **environment: str,
    ) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(exist_ok=True)
        whole = [f"training.max_steps={steps}", *FRESH, *more]
        self.command = [
            sys.executable,
            *train_arguments("demo/finetune", data, run_dir, *whole, settings=settings),
        ]
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            **environment,
        }
        self.environment.setdefault("PYTHONPATH", str(ROOT))
        self.log = run_dir / "driver.log"
        self.start()

    def start(self, *more: str) -> None:
        """Start the command; `more` settings override those of before."""
        with open(self.log, "ab") as log:
            self.driver = psutil.Popen(
                [*self.command, *more], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    def kill_driver(self) -> None:
        """SIGKILL the command, and wait until its workers are gone too."""
        workers = self.workers()
        self.driver.kill()
        self.driver.wait(10)
        assert not psutil.wait_procs(workers, timeout=60)[1]

    def workers(self) -> list[psutil.Process]:
        """The training workers below the driver, or below this process if it owns the nodes."""
        return train_workers(self.driver) or train_workers(psutil.Process())

    def until(self, ready: Callable[[], _T], what: str, seconds: float = 120.0) -> _T:
        """Wait until `ready()` is true, and return it; a driver that ends meanwhile is an error."""
        deadline = time.monotonic() + seconds
        while not (value := ready()):
            assert self.driver.poll() is None, (
                f"ended before {what}:\n{self.log.read_text()[-6000:]}"
            )
            assert time.monotonic() < deadline, (
                f"not {what} in {seconds} s:\n{self.log.read_text()[-6000:]}"
            )
            time.sleep(0.05)
        return value

    def step(self) -> int:
        return max(history(self.run_dir), default=0)

    def until_step(self, step: int, seconds: float = 120.0) -> None:
        self.until(lambda: self.step() >= step, f"at step {step}", seconds)

    def attempt(self) -> int:
        """The inode of metrics.jsonl, which each start of the loop writes anew."""
        try:
            return (self.run_dir / "metrics.jsonl").stat().st_ino
        except FileNotFoundError:
            return 0

    def seconds_to_next_step(self, disturb: Callable[[], object], seconds: float = 180.0) -> float:
        """Call `disturb` and return the seconds until the restarted workers make a step."""
        before = self.attempt()
        began = time.monotonic()
        disturb()
        self.until(lambda: self.attempt() != before, "started again", seconds)
        resumed_at = self.step()
        self.until(lambda: self.step() > resumed_at, "on its way again", seconds)
        return time.monotonic() - began

    def events(self) -> list[dict[str, Any]]:
        try:
            return [
                json.loads(line)
                for line in (self.run_dir / "events.jsonl").read_text().splitlines()
            ]
        except FileNotFoundError:
            return []

    def finish(self, seconds: float = 300.0) -> None:
        assert self.driver.wait(seconds) == 0, self.log.read_text()[-6000:]

    def family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.driver.children(recursive=True)
        return []

    def end(self) -> None:
        """Kill everything that this run started."""
        kill_all([*self.family(), self.driver])


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def train_workers(ancestor: psutil.Process) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in ancestor.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                if process.cmdline()[0].startswith("ray::RayTrainWorker"):
                    found.append(process)
    return sorted(found, key=lambda one: one.pid)


class Nodes:
    """A Ray of one node or two on this machine, with `num_cpus` logical CPUs."""

    def __init__(self, num_cpus: tuple[int, ...] = (1, 1)) -> None:
        import ray.util
        from ray.cluster_utils import Cluster

        self.num_cpus = num_cpus
        self.cluster = Cluster()
        # Some of Ray's own actors look for a Ray on this machine, and must find this one.
        address = f"{ray.util.get_node_ip_address()}:{free_ports(1)[0]}"
        os.environ["RAY_ADDRESS"] = address
        head = {
            "num_cpus": num_cpus[0],
            "include_dashboard": False,
            "_system_config": HEALTH_CHECKS,
        }
        self.head = self.cluster.add_node(gcs_server_port=int(address.rpartition(":")[2]), **head)
        assert self.cluster.address == address
        self.second = self.cluster.add_node(num_cpus=num_cpus[1]) if num_cpus[1:] else None

    @property
    def address(self) -> str:
        return f"cluster.address={self.cluster.address}"

    def lose_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def join(self) -> None:
        self.second = self.cluster.add_node(num_cpus=self.num_cpus[1])

    def second_is_used(self) -> bool:
        """Whether a training worker runs on the second node."""
        raylet = self.second.all_processes["raylet"][0].process.pid
        return psutil.pid_exists(raylet) and bool(train_workers(psutil.Process(raylet)))

    def drain_second(self, seconds: int) -> None:
        """Announce to Ray that the node will be taken away in `seconds`, as a cloud does."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + seconds) * 1000)
        client = GcsClient(address=self.cluster.address)
        accepted, why_not = client.drain_node(self.second.node_id, reason, "spot", deadline_ms)
        assert accepted, why_not

    def end(self) -> None:
        os.environ.pop("RAY_ADDRESS", None)
        mine = [
            one
            for node in filter(None, (self.head, self.second))
            for info in node.all_processes.values()
            for one in info
        ]
        family = [
            psutil.Process(one.process.pid) for one in mine if psutil.pid_exists(one.process.pid)
        ]
        family += [child for one in family for child in one.children(recursive=True)]
        with contextlib.suppress(Exception):
            self.cluster.shutdown()
        kill_all(family)
