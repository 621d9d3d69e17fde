"""The exponential moving average (EMA) of a run's weights, which is validated and exported."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """A copy of a model: with d = `decay`, its weights become d times themselves plus 1 - d of it.

    d is at most (1 + n) / (10 + n) at update n, so that the initial weights are soon forgotten.
    Buffers are the model's own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow `model` after one of its steps; needs its whole parameters."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        pair = (list(one.parameters()) for one in (self.model, model))
        get_ema_multi_avg_fn(decay)(*pair, None)
        for mine, its in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(its)
