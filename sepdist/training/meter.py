"""Means and times of the steps since the last log line. In: step results and the clock; out: metrics by name."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import torch

from sepdist.data.stream import TrainStream
from sepdist.training.engine import StepResult
from sepdist.training.goodput import Goodput
from sepdist.training.world import World, sum_over_world


class Meter:
    """Where wall time went: steps, waiting for data, checkpoints; validation is left out of the speed.

    The attempt's first step, which compiles the model, counts as start-up. `goodput` is None but on the main worker.
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
        self._paused = self._checkpoint = 0.0
        self._data_before = self._stream.seconds_waited

    def add(self, result: StepResult) -> None:
        """Count one step."""
        if self._first:
            self._first = False
            self._start()
            if self._goodput:
                self._goodput.started(time.time())
        self._results.append(result)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out of the account."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    @contextlib.contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Count the time inside as checkpointing."""
        began = time.monotonic()
        yield
        self._checkpoint += time.monotonic() - began

    def read(self, step_seconds_of_audio: float) -> dict[str, float]:
        """The metrics of the steps since the last reading, which starts the next interval; collective.

        The share of waiting for data is that of the worker that waited longest, because all wait for that one.
        """
        results = self._results
        seconds = max(time.monotonic() - self._began - self._paused, 1e-9)
        waited = self._stream.seconds_waited - self._data_before
        by_rank = torch.zeros(2, self._world.size, dtype=torch.float64)
        by_rank[0, self._world.rank] = waited / seconds
        by_rank[1, self._world.rank] = self._stream.num_damaged
        data_wait, damaged = sum_over_world(by_rank, self._world)
        applied = [result for result in results if result.applied]
        metrics = {
            "loss/total": _mean([result.loss for result in applied]),
            "optim/grad_norm": _mean([result.grad_norm for result in applied]),
            "optim/skipped_steps": float(len(results) - len(applied)),
            "speed/steps_per_second": len(results) / seconds,
            "speed/audio_seconds_per_second": len(results) * step_seconds_of_audio / seconds,
            "speed/data_wait_share": float(data_wait.max()),
            "speed/checkpoint_share": self._checkpoint / seconds,
            "data/damaged_samples": float(damaged.sum()),
        }
        for name in sorted({name for result in results for name in result.means}):
            metrics[f"train/{name}"] = _mean(
                [result.means[name] for result in applied if name in result.means]
            )
        if self._goodput:
            work = {"data_wait": waited, "checkpoint": self._checkpoint, "validation": self._paused}
            self._goodput.add(work | {"step": max(seconds - waited - self._checkpoint, 0.0)})
            metrics |= self._goodput.read()
        self._start()
        return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def readable(metrics: Mapping[str, float]) -> str:
    """Metrics in one line for a log."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
