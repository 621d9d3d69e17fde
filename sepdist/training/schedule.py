"""The learning rate and the end of training: validation scores in, a rate for every step and a verdict out.

Warm-up, then halving on a plateau of the validation score and early stop, as both papers train. The rate is a function
of the step and of the scores seen, nothing else, so that a resumed run continues it exactly.
"""

from typing import Any


class PlateauSchedule:
    """`lr(step)` and `observe(score)`; a score is better when it is higher."""

    def __init__(
        self,
        base_lr: float,
        *,
        warmup_steps: int,
        factor: float,
        patience: int,
        min_lr: float,
        early_stop_patience: int,
        decay_steps: int = 0,
        max_steps: int = 0,
    ) -> None:
        self.base_lr = base_lr
        self.warmup_steps = warmup_steps
        self.factor = factor
        self.patience = patience
        self.min_lr = min_lr
        self.early_stop_patience = early_stop_patience
        self.decay_steps = decay_steps
        self.max_steps = max_steps
        self.scale = 1.0
        self.best: float | None = None
        self.num_stagnant = 0  # validations since the best
        self.num_since_halving = 0

    def lr(self, step: int) -> float:
        """The learning rate of step `step` (the first is 0)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = (self.max_steps - step) / self.decay_steps if self.decay_steps else 1.0
        lr = self.base_lr * self.scale * warmup * min(1.0, decay)
        return max(lr, min(self.min_lr, self.base_lr))

    def observe(self, score: float) -> bool:
        """Take a validation score; whether it is the best so far."""
        if self.best is None or score > self.best:
            self.best = score
            self.num_stagnant = self.num_since_halving = 0
            return True
        self.num_stagnant += 1
        self.num_since_halving += 1
        if self.num_since_halving > self.patience:
            self.scale *= self.factor
            self.num_since_halving = 0
        return False

    @property
    def should_stop(self) -> bool:
        """Whether early stopping has been reached."""
        return 0 < self.early_stop_patience <= self.num_stagnant

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        names = ("scale", "best", "num_stagnant", "num_since_halving")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, value)
