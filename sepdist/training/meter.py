"""Measure speed and goodput: means over the steps since the last log line, and wall time by kind.

    step        training steps that count          checkpoint  training held up by a checkpoint
    data_wait   waiting for batches                validation  including audio and pictures
    restart     from an attempt's last log line to the end of the next attempt's first step
    redone      work of a dead attempt after the checkpoint that the next one started from

The kinds add up to all wall time of a run, over all its attempts.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sepdist import storage
from sepdist.data.stream import TrainStream
from sepdist.reporting import to_json
from sepdist.training.engine import StepResult
from sepdist.training.world import World, sum_over_world

WORK = ("step", "data_wait", "checkpoint", "validation")
KINDS = (*WORK, "restart", "redone")
GOODPUT_FILE = "goodput.json"


class Goodput:
    """Seconds by kind since the run first started.

    `rows` are those of metrics.jsonl up to the step that the run continues from, `last` is the
    `note` of the attempt before (None in the first), `now` is the time of day in seconds.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], last: str | None, now: float) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.last_note = now
        for row in rows:
            if "goodput/step_seconds" in row:
                self.seconds |= {kind: row[f"goodput/{kind}_seconds"] for kind in WORK}
        if last is None:
            return
        before = json.loads(last)
        self.last_note = before["time"]
        lost = sum(before["seconds"][kind] - self.seconds[kind] for kind in WORK)
        self.seconds["restart"] = before["seconds"]["restart"]
        self.seconds["redone"] = before["seconds"]["redone"] + lost

    def started(self, now: float) -> None:
        """Count the time until the end of the attempt's first step as restart."""
        self.seconds["restart"] += now - self.last_note

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count work."""
        for kind, value in seconds.items():
            self.seconds[kind] += value

    def read(self) -> dict[str, float]:
        """Return the seconds by kind and the share of `step` as metrics."""
        total = sum(self.seconds.values())
        share = self.seconds["step"] / total if total else 0.0
        rounded = {f"goodput/{kind}_seconds": round(s, 3) for kind, s in self.seconds.items()}
        return rounded | {"goodput/share": share}

    def note(self, now: float) -> str:
        """Return what the next attempt needs if this one dies."""
        return to_json({"time": now, "seconds": self.seconds})


def continue_goodput(run_dir: str, rows: Sequence[Mapping[str, Any]]) -> Goodput:
    """Continue the account of earlier attempts, and note at once what the last one lost."""
    url = storage.join(run_dir, GOODPUT_FILE)
    last = storage.read_bytes(url).decode() if storage.exists(url) else None
    goodput = Goodput(rows, last, time.time())
    storage.put_bytes(url, goodput.note(goodput.last_note).encode())
    return goodput


class Meter:
    """Collects the results of steps and the time that they took.

    The attempt's first step, which compiles the model, counts as restart, and validation does not
    count towards the speed. `goodput` is None except on the main worker.
    """

    def __init__(self, stream: TrainStream, world: World, goodput: Goodput | None) -> None:
        self._stream = stream
        self._world = world
        self._goodput = goodput
        self._first = True
        self._start()

    def _start(self) -> None:
        self._results: list[StepResult] = []
        self._began = time.monotonic()
        self._seconds = {"checkpoint": 0.0, "validation": 0.0}
        self._data_before = self._stream.seconds_waited
        self._silent_before = self._stream.num_silent

    def add(self, result: StepResult) -> None:
        """Count one step."""
        if self._first:
            self._first = False
            self._start()
            if self._goodput:
                self._goodput.started(time.time())
        self._results.append(result)

    @contextlib.contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`, "checkpoint" or "validation"."""
        began = time.monotonic()
        yield
        self._seconds[kind] += time.monotonic() - began

    def read(self, step_seconds_of_audio: float) -> dict[str, float]:
        """Return the metrics of the steps since the last reading; collective."""
        results, applied = self._results, [one for one in self._results if one.applied]
        seconds = max(time.monotonic() - self._began - self._seconds["validation"], 1e-9)
        waited = self._stream.seconds_waited - self._data_before
        checkpoint = self._seconds["checkpoint"]
        by_rank = torch.zeros(3, self._world.size, dtype=torch.float64)
        by_rank[0, self._world.rank] = waited / seconds
        by_rank[1, self._world.rank] = self._stream.num_damaged
        by_rank[2, self._world.rank] = self._stream.num_silent - self._silent_before
        data_wait, damaged, silent = sum_over_world(by_rank, self._world)
        metrics = {
            "loss/total": _mean([one.loss for one in applied]),
            "optim/grad_norm": _mean([one.grad_norm for one in applied]),
            "optim/skipped_steps": float(len(results) - len(applied)),
            "speed/steps_per_second": len(results) / seconds,
            "speed/audio_seconds_per_second": len(results) * step_seconds_of_audio / seconds,
            "speed/data_wait_share": float(data_wait.max()),  # all wait for that worker
            "speed/checkpoint_share": checkpoint / seconds,
            "data/damaged_samples": float(damaged.sum()),
            "data/silent_sources": float(silent.sum()),
        }
        for name in sorted({name for one in results for name in one.means}):
            measured = [one.means[name] for one in applied if name in one.means]
            metrics[f"train/{name}"] = _mean(measured)
        if self._goodput:
            step = max(seconds - waited - checkpoint, 0.0)
            self._goodput.add(self._seconds | {"data_wait": waited, "step": step})
            metrics |= self._goodput.read()
        self._start()
        return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
