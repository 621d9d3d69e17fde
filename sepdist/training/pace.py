"""When a checkpoint is due: after a fixed number of steps, or by costs and failure rates."""

import contextlib
import math
import time
from collections.abc import Iterator

from sepdist.config import TrainingConfig
from sepdist.training.world import World, broadcast_object

FIRST_STEPS = 100  # to the first checkpoint of an attempt, which measures its cost
MOST_SECONDS = 3600.0  # between two; not every end of a run is in a rate of failures


class Pace:
    """After which steps of an attempt, which begins at `step`, a checkpoint is due.

    "auto" takes Young's interval (1974), which loses least: sqrt(2 C M) if a checkpoint holds
    training up for C and failures come every M. The main rank measures C and steps by their means.
    """

    def __init__(self, training: TrainingConfig, step: int, world: World) -> None:
        self._world, self._first, self._last = world, step, step
        self._auto = training.checkpoint_every == "auto"
        self._every = FIRST_STEPS if self._auto else int(training.checkpoint_every)
        self._failure_seconds = training.worker_mtbf_hours * 3600 / world.size
        self._began, self._costs = time.monotonic(), list[float]()

    def due(self, step: int) -> bool:
        """Return whether one is due after `step` steps of the run, the same on all ranks."""
        return step >= self._last + self._every if self._auto else step % self._every == 0

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Measure the checkpoint that is written inside; collective for "auto"."""
        began = time.monotonic()
        yield
        now, self._last = time.monotonic(), step
        self._costs.append(now - began)
        if self._auto:
            total = sum(self._costs)
            young = math.sqrt(2 * total / len(self._costs) * self._failure_seconds)
            step_seconds = (now - self._began - total) / (step - self._first)
            steps = max(1, round(min(young, MOST_SECONDS) / step_seconds))
            self._every = broadcast_object(steps, self._world)
