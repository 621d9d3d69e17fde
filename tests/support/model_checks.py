"""Helpers of the model tests: distances, gradients, moved parameters, a batch to learn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sepdist.objectives.contract import mean_of
from sepdist.objectives.separation import Separation
from tests.support.batches import batch_of, voices


def shaken(model: Any) -> Any:
    """The model with weights that make every term of the arithmetic count."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))


def gradients(
    model: nn.Module, mixture: Tensor, forward: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """Gradients of a random linear function of the estimates: of the mixture, then parameters."""
    mixture = mixture.detach().requires_grad_()
    estimates = forward(model, mixture) if forward else model(mixture)
    weights = torch.randn(
        estimates.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    loss = (estimates * weights.to(estimates.dtype)).sum()
    return list(torch.autograd.grad(loss, [mixture, *model.parameters()]))


def moved_differ(model: nn.Module, mixture: Tensor) -> list[tuple[int, str]]:
    """(offset, name) of each gradient that changes when all parameters lie in one buffer.

    They do at ZeRO >= 1.
    """
    names = ["mixture", *(name for name, _ in model.named_parameters())]
    expected = gradients(model, mixture)
    parameters = list(model.parameters())
    differ = []
    for first in range(16):
        buffer = torch.cat([torch.zeros(first), *(p.detach().flatten() for p in parameters)])[
            first:
        ]
        for p, place in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
            p.data = place.view_as(p)
        pairs = zip(names, gradients(model, mixture), expected, strict=True)
        differ += [(first, name) for name, got, wanted in pairs if not torch.equal(got, wanted)]
    return differ


def depend_on_speakers(small: Callable[..., nn.Module]) -> set[str]:
    """The names of the parameters whose shape depends on the number of speakers."""
    one, two = (dict(small(num_speakers=n).named_parameters()) for n in (1, 2))
    return {name for name in one if one[name].shape != two[name].shape}


def improvement_learnt(model: nn.Module, rate: float) -> tuple[float, float]:
    """SI-SNRi of one batch of two voices at the first and at the last of 60 steps, in dB."""
    batch = batch_of(voices(1, 2, 1600))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    objective, scores = Separation(), []
    for _ in range(60):
        optimizer.zero_grad()
        loss, metrics = objective(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scores.append(float(mean_of(metrics["si_snri"])[0]))
    return scores[0], scores[-1]
