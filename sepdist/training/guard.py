"""Which steps to leave out: gradient norms in; a limit, and a rollback where steps went wrong in a row, out.

Norms are of the combined gradient, the same on all ranks at every world size, so all ranks decide alike and a run that
was interrupted decides as one that was not.
"""

import math
import statistics
from collections import deque
from typing import Any

HISTORY = 100  # norms that the limit is derived from
LEAST_HISTORY = 50  # before that there is no limit


class Rollback(Exception):  # noqa: N818 - a way back, and an error only where it happens too often
    """The steps [first, stop) went wrong; the run is to go on from the newest checkpoint without them."""

    def __init__(self, first: int, stop: int) -> None:
        super().__init__(f"no usable gradient in steps {first} to {stop - 1}")
        self.first = first
        self.stop = stop


class GradientGuard:
    """A step is skipped if its norm is not finite or above `spike_factor` times the median of the last ones applied.

    `spike_factor` 0 sets no limit. After `max_skipped` skipped steps in a row `observe` raises Rollback.
    """

    def __init__(self, *, spike_factor: float, max_skipped: int) -> None:
        self.spike_factor = spike_factor
        self.max_skipped = max_skipped
        self.num_in_a_row = 0
        self._norms: deque[float] = deque(maxlen=HISTORY)

    @property
    def limit(self) -> float:
        """The highest norm that the next step may have."""
        if not self.spike_factor or len(self._norms) < LEAST_HISTORY:
            return math.inf
        return self.spike_factor * statistics.median(self._norms)

    def observe(self, step: int, norm: float, applied: bool) -> None:
        """Note what became of a step."""
        if applied:
            self._norms.append(norm)
            self.num_in_a_row = 0
            return
        self.num_in_a_row += 1
        if self.num_in_a_row >= self.max_skipped:
            raise Rollback(step + 1 - self.num_in_a_row, step + 1)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; taken only between bad spells, so there is no count of them in it."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._norms.extend(state["norms"])
