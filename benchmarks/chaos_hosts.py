"""Disturb a training run on three hosts with a network between them, and compare its bits.

    python -m benchmarks.chaos_hosts --output chaos_hosts.json

Three hosts of a lab (tests/support/lab: namespaces and a switch in user space; needs root) train
the demo's model, one worker on each; the command and Ray's head are on h0, data and run_dir on the
S3 server of a fourth host. Faults are inflicted in turn, each after the run has recovered from the
one before:

    delay:20-100      every host's link delays frames by 20 to 100 ms, for 20 s
    loss:1            every host's link loses 1 % of the frames, for 20 s
    worker-cut:60     host h2 is cut off for 60 s
    head-cut:60       host h0, with the command and Ray's head, is cut off for 60 s
    s3-killed:30      the S3 server is killed and refuses connections for 30 s
    s3-cut:180        the S3 server's host is cut off for 180 s: connections hang
    host-lost:20      h1 loses its power, and is back after 20 s
    sigterm:command   SIGTERM to the command, which is started again
    sigterm:all       SIGTERM to every process of every host; all is started again
    rotate:20         hosts' credentials files are rewritten; 20 s later the old key is refused

A step is slowed down to half a second, so that faults fall into steps. Prints a table on stderr
and one JSON line. The exit status is 1 unless losses, weights and optimizer state are, to the bit,
those of a single process that was left alone, and the audit finds that every position was consumed
exactly once. Standstill is the longest time without a step from the fault to the recovery.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos import NUM_QUICK_MIXTURES, QUICK_SETTINGS, make_data
from sepdist import storage
from sepdist.training.audit import audit
from sepdist.training.checkpoint import find_committed
from tests.support.disturb import left_alone
from tests.support.lab.hosts import BUCKET, Lab, why_not_here
from tests.support.lab.training import RUN_DIR, HostsRun, events_between, longest_gap, redone
from tests.support.runs import final_files, history, upload

FAULTS = (
    "delay:20-100 loss:1 loss:5 worker-cut:10 worker-cut:60 head-cut:10 head-cut:60 s3-killed:30 "
    "s3-cut:30 s3-cut:180 host-lost:20 sigterm:command sigterm:all rotate:20"
)
SLOW_SECONDS = 20  # how long delay and loss last
PACE_SECONDS = 0.5
RECOVERY_SECONDS = 300  # after which a fault counts as not recovered from
SETTINGS = [
    *(one for one in QUICK_SETTINGS if not one.startswith("cluster.hang_seconds")),
    "training.checkpoint_every=20",
    "validation.every_steps=100",
    "validation.num_listening=0",
]


class Faults:
    """Faults by name: each method inflicts one, waits as long as it lasts, and ends it."""

    def __init__(self, run: HostsRun) -> None:
        self.run, self.lab = run, run.lab
        self.num_keys = 0

    def inflict(self, fault: str) -> str:
        """Inflict a fault; returns what the command did if the fault ended it."""
        kind, _, value = fault.partition(":")
        return getattr(self, kind.replace("-", "_"))(value) or ""

    def delay(self, value: str) -> None:
        least, most = (float(part) / 1000 for part in value.split("-"))
        self._impair(SLOW_SECONDS, *self.lab.hosts, delay=[least, most])

    def loss(self, value: str) -> None:
        self._impair(SLOW_SECONDS, *self.lab.hosts, loss=float(value) / 100)

    def worker_cut(self, value: str) -> None:
        self._impair(float(value), "h2", cut=True)

    def head_cut(self, value: str) -> None:
        self._impair(float(value), "h0", cut=True)

    def s3_cut(self, value: str) -> None:
        self._impair(float(value), "s3", cut=True)

    def s3_killed(self, value: str) -> None:
        self.lab.s3.kill()
        time.sleep(float(value))
        self.lab.s3.start()

    def host_lost(self, value: str) -> None:
        host = self.lab.hosts["h1"]
        host.lose_power()
        time.sleep(float(value))
        host.boot()
        self.lab.switch.heal()
        self.run.start_ray(host)

    def sigterm(self, value: str) -> str:
        status = self.run.terminate(everything=value == "all")
        if value == "all":
            for host in self.lab.workers:
                self.run.start_ray(host)
        self.run.start_driver()
        return f"status {status}, started again"

    def rotate(self, value: str) -> None:
        self.num_keys += 1
        new = f"access{self.num_keys}", f"secret-{self.num_keys}-0123456789"
        self.lab.s3.allow(self.lab.s3.key, new)
        self.lab.set_key(new)
        time.sleep(float(value))
        self.lab.s3.allow(new)
        os.environ.update(self.lab.s3.environment())

    def _impair(self, seconds: float, *names: str, **impairments: Any) -> None:
        for name in names:
            self.lab.switch.impair(name, **impairments)
        time.sleep(seconds)
        self.lab.switch.heal()


def disturb(run: HostsRun, faults: Sequence[str]) -> list[dict[str, Any]]:
    """Inflict each fault on a run that goes well; returns what each one did.

    The run has recovered when every host has made a step, and a checkpoint of a later step than any
    before is committed.
    """
    inflict = Faults(run).inflict
    windows: list[tuple[float, float, float, list[str], list[str]]] = []
    # On a busy machine a raylet gives up its own agent after seconds, and is started again.
    behind = run.wait_for_steps(0.0, 2 * RECOVERY_SECONDS)
    assert not behind, f"{behind} made no step:\n{run.tail()}"
    for fault in faults:
        time.sleep(5.0)
        began = time.time()
        say(f"{fault} at step {run.steps()[-1][1]}")
        stopped = inflict(fault)
        healed, reached = time.time(), run.steps()[-1][1]
        ended = [stopped] if stopped else []
        while True:
            behind = run.wait_for_steps(healed + 2.0, RECOVERY_SECONDS)
            if not behind and newest_commit() > reached:
                break
            if time.time() > healed + 2 * RECOVERY_SECONDS or len(ended) > 3:
                behind = behind or ["checkpoint"]
                break
            if run.ended().startswith("status 0:"):
                raise RuntimeError(f"the run finished during {fault}: give it more --steps")
            if run.ended():
                ended.append(run.ended())
                run.start_driver()
            time.sleep(1.0)
        windows.append((began, healed, time.time(), ended, behind))
        say(f"  over after {healed - began:.0f} s, recovered after {time.time() - healed:.0f} more")
    return [measure(run, fault, *window) for fault, window in zip(faults, windows, strict=True)]


def newest_commit() -> int:
    return max((one.step for one in find_committed(f"{RUN_DIR}/checkpoints")), default=-1)


def measure(
    run: HostsRun,
    fault: str,
    began: float,
    healed: float,
    recovered: float,
    ended: list[str],
    missing: list[str],
) -> dict[str, Any]:
    steps = run.steps()
    events = events_between(storage.read_bytes(f"{RUN_DIR}/events.jsonl"), began, recovered)
    return {
        "fault": fault,
        "fault_seconds": round(healed - began, 1),
        "standstill_seconds": round(longest_gap(steps, began, recovered), 1),
        "recovered_seconds": round(recovered - healed, 1),
        "restarts": events.count("started"),
        "steps_redone": redone(steps, began, recovered),
        "ended": ended,
        "missing": missing,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    head = ["fault", "standstill, s", "restarts", "steps redone", "the command", "missing"]
    rows = [
        [
            one["fault"],
            one["standstill_seconds"],
            one["restarts"],
            one["steps_redone"],
            "; ".join(one["ended"]) or "went on",
            ", ".join(one["missing"]) or "nothing",
        ]
        for one in results
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos_hosts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--faults", default=FAULTS, help="separated by blanks; default: %(default)s")
    add("--steps", type=int, default=1500, help="of the run; default: %(default)s")
    add("--hosts", type=int, default=3, help="default: %(default)s")
    add("--own-names", choices=("address", "debian"), default="address", help="see lab/hosts.py")
    add("--output", type=Path, help="a file for the JSON too")
    add("--keep", type=Path, help="a folder for all files and logs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if reason := why_not_here():
        say(reason)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        data = make_data(folder / "data", NUM_QUICK_MIXTURES)
        losses, _ = left_alone(data, folder / "alone", given.steps, SETTINGS)
        files = final_files(folder / "alone")
        began = time.monotonic()
        lab = Lab(folder / "lab", given.hosts, given.own_names)
        os.environ.update(lab.s3.environment())  # this process looks at the bucket too
        urls = upload(data, f"s3://{BUCKET}/data")
        run = HostsRun(lab, urls, settings=SETTINGS, steps=given.steps)
        try:
            for host in lab.workers:
                run.start_ray(host)
            run.set_pace(PACE_SECONDS)
            run.start_driver()
            results = disturb(run, given.faults.split())
            run.set_pace(0.0)
            assert run.driver is not None
            run.driver.wait(1800)
            result = {
                "benchmark": "chaos_hosts",
                "hosts": given.hosts,
                "steps": given.steps,
                "same_losses": history(RUN_DIR) == losses,
                "same_weights": final_files(RUN_DIR)[0] == files[0],
                "same_optimizer": final_files(RUN_DIR)[1] == files[1],
                "weights_sha256": files[0],
                "optimizer_sha256": files[1],
                "last_loss": losses[given.steps].hex(),
            }
            audited = audit(RUN_DIR)
        finally:
            run.close()
            lab.close()
    result |= {
        "lost": audited.num_lost,
        "repeated": audited.num_repeated,
        "steps_by_workers": audited.world_sizes,
        "faults": results,
        "wall_seconds": round(time.monotonic() - began, 1),
    }
    say(table(results))
    print(json.dumps(result))
    if given.output:
        given.output.write_text(json.dumps(result) + "\n")
    same = result["same_losses"] and result["same_weights"] and result["same_optimizer"]
    return 0 if same and audited.sound else 1


if __name__ == "__main__":
    sys.exit(main())
