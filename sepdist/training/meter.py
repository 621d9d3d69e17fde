"""Means and times of the steps since the last log line. In: step results and the clock; out: metrics by name."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

from sepdist.data.stream import TrainStream
from sepdist.training.checkpoint import Checkpointer
from sepdist.training.engine import StepResult


class Meter:
    """Where wall time went: steps, waiting for data, checkpoints; validation is left out of the speed."""

    def __init__(self, stream: TrainStream, checkpointer: Checkpointer | None) -> None:
        self._stream = stream
        self._checkpointer = checkpointer
        self._start()

    def _start(self) -> None:
        self._results: list[StepResult] = []
        self._began = time.monotonic()
        self._paused = self._checkpoint = 0.0
        self._data_before = self._stream.seconds_waited

    def add(self, result: StepResult) -> None:
        """Count one step."""
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
        """The metrics of the steps since the last reading, which starts the next interval."""
        results = self._results
        seconds = max(time.monotonic() - self._began - self._paused, 1e-9)
        applied = [result for result in results if result.applied]
        metrics = {
            "loss/total": _mean([result.loss for result in applied]),
            "optim/grad_norm": _mean([result.grad_norm for result in applied]),
            "optim/skipped_steps": float(len(results) - len(applied)),
            "speed/steps_per_second": len(results) / seconds,
            "speed/audio_seconds_per_second": len(results) * step_seconds_of_audio / seconds,
            "speed/data_wait_share": (self._stream.seconds_waited - self._data_before) / seconds,
            "speed/checkpoint_share": self._checkpoint / seconds,
            "data/damaged_samples": float(self._stream.num_damaged),
        }
        for name in results[0].means if results else ():
            metrics[f"train/{name}"] = _mean([result.means[name] for result in applied])
        self._start()
        return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def readable(metrics: Mapping[str, float]) -> str:
    """Metrics in one line for a log."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
