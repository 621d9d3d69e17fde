"""Run an objective on several batches with one forward pass of the model for all of them.

An objective that takes the mean over items is called once, on all of them, which spares a GPU many
launches. Others are still called for each batch, so that losses are those of the batch: first up to
their call of the model, for the inputs, and once more to receive their share of the outputs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from sepdist.data.records import AUDIO, Batch
from sepdist.objectives.contract import Metrics, is_mean_of_items


class _Asked(BaseException):  # not an Exception, so that no objective catches it
    """Ends an objective at a call of the model whose outputs are not known yet."""


class _Answers:
    """Stands for the model: gives the `outputs` of its calls in order, and raises _Asked after."""

    def __init__(self, model: Any, outputs: Sequence[Any]) -> None:
        self._model, self._outputs = model, iter(outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        for output in self._outputs:
            return output
        raise _Asked((inputs, options), torch.is_grad_enabled())


def run_merged(
    objective: Any, model: Any, batches: Sequence[Batch]
) -> list[tuple[Tensor, Metrics]]:
    """Return loss and metrics of each batch; equal to separate calls up to rounding and dropout.

    Batches that are alike all get the mean of their losses from an objective that is a mean itself.
    Calls merge, whatever the data sets of the batches, if their tensors differ in the first axis
    alone. The model must treat items apart, as batch normalisation does not.
    """
    if len(batches) == 1:
        return [objective(model, batches[0])]
    if is_mean_of_items(objective) and (whole := _joined(batches)):
        loss, metrics = objective(model, whole)
        count = len(batches)
        shares = {k: x.chunk(count, -1) if x.ndim else [x] * count for k, x in metrics.items()}
        return [(loss, {k: own[i] for k, own in shares.items()}) for i in range(count)]
    outputs: list[list[Any]] = [[] for _ in batches]
    results: dict[int, tuple[Tensor, Metrics]] = {}
    while len(results) < len(batches):
        asked: dict[str, list[tuple[int, Any]]] = {}
        for number in sorted(set(range(len(batches))) - results.keys()):
            try:
                results[number] = objective(_Answers(model, outputs[number]), batches[number])
            except _Asked as call:
                kind = tree_map_only(Tensor, lambda x: (x.dtype, x.shape[1:]), call.args)
                asked.setdefault(repr(kind), []).append((number, call.args))
        for calls in asked.values():
            for (number, _), output in zip(calls, _answer(model, calls), strict=True):
                outputs[number].append(output)
    return [results[number] for number in range(len(batches))]


def _joined(batches: Sequence[Batch]) -> Batch | None:
    """Return one batch of all items; None unless all are of one data set and of one shape."""
    audio = [[getattr(batch, name) for name in AUDIO] for batch in batches]
    kinds = {
        (batch.data_set, *(None if x is None else x.shape for x in own))
        for batch, own in zip(batches, audio, strict=True)
    }
    if len(kinds) > 1:
        return None
    parts = zip(AUDIO, zip(*audio, strict=True), strict=True)
    joined: Any = {name: None if own[0] is None else torch.cat(own) for name, own in parts}
    for name in ("positions", "lengths"):
        joined[name] = torch.cat([getattr(batch, name) for batch in batches])
    for name in ("ids", "speakers"):
        joined[name] = [one for batch in batches for one in getattr(batch, name)]
    return replace(batches[0], num_silent=sum(one.num_silent for one in batches), **joined)


def _answer(model: Any, calls: Sequence[tuple[int, Any]]) -> list[Any]:
    """Return the model's outputs of each call, from one call on all of them."""
    rows, shape = [tree_flatten(one)[0] for _, (one, _) in calls], tree_flatten(calls[0][1][0])[1]
    sizes = [next(len(x) for x in row if torch.is_tensor(x)) for row in rows]
    columns = [torch.cat(x) if torch.is_tensor(x[0]) else x[0] for x in zip(*rows, strict=True)]
    inputs, options = tree_unflatten(columns, shape)
    with torch.set_grad_enabled(calls[0][1][1]):
        leaves, shape = tree_flatten(model(*inputs, **options))
    pieces = [x.split(sizes) if torch.is_tensor(x) else [x] * len(sizes) for x in leaves]
    return [tree_unflatten(own, shape) for own in zip(*pieces, strict=True)]
