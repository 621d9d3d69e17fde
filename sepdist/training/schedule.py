"""The learning rate, early stopping and the limit on gradient norms, as functions of the history.

None of them depends on anything but the scores and norms seen, which are the same on all ranks at
every world size. So all ranks decide the same, and a resumed run decides as an uninterrupted one.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

NUM_NORMS = 100  # the limit is derived from this many norms
LEAST_NORMS = 50  # with fewer there is no limit
NO_SCORE = "no validation had a finite score"


@dataclass
class Schedule:
    """Warm-up and hold, then a fall of one of SHAPES; early stop on a plateau of a score.

    The higher the score the better. `plateau` multiplies the rate by `factor` after more than
    `patience` validations without a new best, of which those in warm-up and hold do not count.
    """

    base_lr: float
    warmup_steps: int
    factor: float
    patience: int
    min_lr: float
    early_stop_patience: int
    decay_steps: int = 0  # the rate falls linearly to 0 in the last steps before `max_steps`
    max_steps: int = 0
    shape: str = "plateau"
    hold_steps: int = 0
    scale: float = 1.0
    best: float | None = None
    num_stagnant: int = 0  # validations since the best, but for those of the warm-up
    num_since_halving: int = 0

    def __post_init__(self) -> None:
        self._start = max(self.warmup_steps, self.hold_steps)  # of the fall

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step` (the first is 0)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = (self.max_steps - step) / self.decay_steps if self.decay_steps else 1.0
        done = max(0, step - self._start) / max(1, self.max_steps - self._start)
        falls = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}
        lr = self.base_lr * self.scale * warmup * min(1.0, decay) * falls.get(self.shape, 1.0)
        return max(lr, min(self.min_lr, self.base_lr))

    def observe(self, score: float, step: int) -> bool:
        """Record the score after `step` steps; returns whether it is the best, and finite."""
        if math.isfinite(score) and (self.best is None or score > self.best):
            self.best = score
            self.num_stagnant = self.num_since_halving = 0
            return True
        self.num_stagnant += step > self.warmup_steps or self.best is None
        self.num_since_halving += self.shape == "plateau" and step > self._start
        if self.num_since_halving > self.patience:
            self.scale *= self.factor
            self.num_since_halving = 0
        return False

    @property
    def should_stop(self) -> bool:
        """Whether to stop early."""
        return 0 < self.early_stop_patience <= self.num_stagnant

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-able state."""
        names = ("scale", "best", "num_stagnant", "num_since_halving")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        vars(self).update(state)
        if self.best is not None and not math.isfinite(self.best):  # as runs once wrote it
            self.best = None

    def check_end(self) -> None:
        """Raise RuntimeError at the end of a run if it was validated without a finite score."""
        if self.best is None and self.num_stagnant:
            raise RuntimeError(
                f"{NO_SCORE} ({self.num_stagnant} in all), so the run has no best checkpoint: "
                f"lower optim.lr={self.base_lr:g} in another run_dir, or look at validation/loss "
                "and optim/grad_norm in metrics.jsonl"
            )


@dataclass
class GradientGuard:
    """Limit gradient norms to `spike_factor` times the median of the last ones; 0 sets no limit.

    A step whose norm is above it or not finite is skipped; `max_skipped` in a row are an error.
    """

    spike_factor: float
    max_skipped: int
    num_skipped: int = 0  # in a row
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_NORMS))  # as applied

    @property
    def limit(self) -> float:
        """The greatest norm that the next step may have."""
        if not self.spike_factor or len(self.norms) < LEAST_NORMS:
            return math.inf
        return self.spike_factor * statistics.median(self.norms)

    def observe(self, step: int, norm: float, applied: bool) -> None:
        """Record the norm of a step; RuntimeError if too many in a row were skipped."""
        if applied:
            self.norms.append(norm)
            self.num_skipped = 0
            return
        self.num_skipped += 1
        if self.num_skipped >= self.max_skipped:
            raise RuntimeError(
                f"steps {step + 1 - self.num_skipped} to {step} were skipped, as their gradients "
                f"were not finite or above the limit ({self.limit:.4g}); training.max_skipped="
                f"{self.max_skipped} in a row end the run: lower optim.lr, or look at "
                "optim/grad_norm in metrics.jsonl"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-able state."""
        return {"norms": list(self.norms), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.norms.extend(state["norms"])
        self.num_skipped = state.get("num_skipped", 0)
