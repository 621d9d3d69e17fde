"""Replay the passes of a model as CUDA graphs: one launch each instead of hundreds.

Where the host launches kernels more slowly than the GPU runs them, as with Conv-TasNet, the step
then takes as long as its kernels.
"""

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

MAX_GRAPHS = 8  # each keeps the memory of its passes


class _Whole(nn.Module):
    """A model of its own to torch, which replaces the `forward` of what it captures."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


class Captured:
    """Stands for a model that trains on a GPU; calls for inputs of a new shape are captured.

    A graph keeps its outputs until its next replay, so every call of a pass has one of its own.
    The model is called itself for other arguments than tensors, without gradients, and after
    `MAX_GRAPHS`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._graphs: dict[Any, Any] = {}
        self._calls: Counter[Any] = Counter()
        # Torch captures on a stream of its own, and waits for it.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def begin(self) -> None:
        """Begin a pass: the outputs of the last one, and their gradients, are not needed again."""
        self._calls.clear()

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Call the model; the backward pass of what it returns comes before the next pass."""
        tensors = all(torch.is_tensor(x) for x in inputs) and not options
        if not tensors or not torch.is_grad_enabled():
            return self._model(*inputs, **options)
        kind = tuple((x.shape, x.dtype) for x in inputs)
        key = (*kind, self._calls[kind])
        self._calls[kind] += 1
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                return self._model(*inputs)
            self._graphs[key] = self._capture(inputs)
        return self._graphs[key](*inputs)

    def _capture(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run both passes a few times, then record them; leaves the random numbers as they were."""
        device = inputs[0].device
        state, dtype = torch.cuda.get_rng_state(device), torch.get_autocast_dtype(device.type)
        enabled = torch.is_autocast_enabled(device.type)
        sample = tuple(x.clone() for x in inputs)
        with torch.autocast(device.type, dtype, enabled, cache_enabled=False):
            graphed = torch.cuda.make_graphed_callables(
                _Whole(self._model), sample, allow_unused_input=True
            )
        torch.cuda.set_rng_state(state, device)
        return graphed
