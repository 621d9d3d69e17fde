"""When a checkpoint is due: every so many steps, or as often as its cost and failures suggest."""

import contextlib
import math
import time
from collections.abc import Iterator

from sepdist.config import TrainingConfig
from sepdist.training.world import World, broadcast_object

FIRST_STEPS = 100  # to the first checkpoint of an attempt, which measures its cost
MOST_SECONDS = 3600.0  # a run is also killed by what no failure rate counts


class Pace:
    """After which steps of an attempt, which begins at `step`, to write a checkpoint.

    `training.checkpoint_every=auto` means Young's interval, from the mean seconds for which a
    checkpoint has held training up and those of a step. The main rank measures them for all.
    """

    def __init__(self, training: TrainingConfig, step: int, world: World) -> None:
        self._world = world
        self._auto = training.checkpoint_every == "auto"
        self._every = FIRST_STEPS if self._auto else int(training.checkpoint_every)
        self._failure_seconds = training.worker_mtbf_hours * 3600 / world.size
        self._first = self._last = step
        self._num_saved, self._cost, self._began = 0, 0.0, time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether to write one after `step` steps of the run, the same on all ranks."""
        return step >= self._last + self._every if self._auto else step % self._every == 0

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Measure a checkpoint written inside; collective for "auto"."""
        began = time.monotonic()
        yield
        now = time.monotonic()
        self._last, self._num_saved, self._cost = (
            step,
            self._num_saved + 1,
            now - began + self._cost,
        )
        if self._auto and step > self._first:
            step_seconds = (now - self._began - self._cost) / (step - self._first)
            seconds = young(self._cost / self._num_saved, self._failure_seconds)
            steps = max(1, round(min(seconds, MOST_SECONDS) / max(step_seconds, 1e-9)))
            self._every = broadcast_object(steps, self._world)


def young(cost: float, failure_seconds: float) -> float:
    """The seconds between checkpoints that lose least (Young, 1974), a checkpoint taking `cost`."""
    return math.sqrt(2 * cost * failure_seconds)
