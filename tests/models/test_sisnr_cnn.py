"""REAL-M's estimator against its arithmetic in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sepdist.models.sisnr_cnn import SISNREstimator
from sepdist.objectives.quality import Quality
from tests.support.batches import batch_of, voices


def built(**changes: bool) -> SISNREstimator:
    torch.manual_seed(0)
    return SISNREstimator(**changes)


def by_hand(model: SISNREstimator, mixture: Tensor, estimate: Tensor) -> float:
    """The logit of one estimate, in numpy."""
    x = np.stack(
        [(w.numpy() - w.numpy().mean()) / w.numpy().std() for w in (estimate, mixture)]
    ).astype(np.float64)
    kernels = [p.detach().double().numpy() for p in model.convolutions.parameters()]
    for layer, stride in enumerate([1, 2, 2, 2, 2]):
        weight, bias = kernels[2 * layer : 2 * layer + 2]
        count = (x.shape[1] - 4) // stride + 1
        x = np.stack(
            [(weight * x[:, n * stride : n * stride + 4]).sum((1, 2)) + bias for n in range(count)],
            1,
        )
        x = np.maximum(x, 0) if layer < 4 else x
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in model.head.parameters())
    hidden = np.maximum(w1 @ np.concatenate([x.mean(1), x.std(1)]) + b1, 0)
    return float((w2 @ hidden + b2)[0])


def test_it_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in built().parameters()) == 329_857


def test_predictions_are_those_worked_out_by_hand() -> None:
    mixture = 0.1 * torch.randn(2, 200)
    estimates = 0.1 * torch.randn(2, 3, 200)
    expected = [
        [by_hand(built(), m, e) for e in row] for m, row in zip(mixture, estimates, strict=True)
    ]
    np.testing.assert_allclose(
        built(clipped=False)(mixture, estimates).detach(), expected, atol=1e-5
    )
    clipped = 10 / (1 + np.exp(-np.array(expected)))
    np.testing.assert_allclose(built(clipped=True)(mixture, estimates).detach(), clipped, atol=1e-4)


def test_levels_and_the_other_estimates_do_not_matter() -> None:
    mixture, estimates = torch.randn(1, 300), torch.randn(1, 2, 300)
    model = built(clipped=False)
    both = model(mixture, estimates)
    torch.testing.assert_close(model(0.01 * mixture, 5 * estimates + 1), both, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(mixture, estimates.flip(1)), both.flip(1))


def test_any_length_from_min_length_up_is_estimated_and_less_is_refused() -> None:
    model = built()
    assert model.min_length == 49
    for length in (49, 50, 333):
        prediction = model(torch.randn(1, length), torch.randn(1, 2, length))
        assert prediction.shape == (1, 2) and ((prediction > 0) & (prediction < 10)).all()
    with pytest.raises(ValueError, match="T >= 49"):
        model(torch.randn(1, 48), torch.randn(1, 2, 48))


def test_silent_estimates_have_finite_predictions_and_gradients() -> None:
    estimates = torch.zeros(1, 2, 300, requires_grad=True)
    prediction = built()(torch.randn(1, 300), estimates)
    prediction.sum().backward()
    assert torch.isfinite(prediction).all() and torch.isfinite(estimates.grad).all()


def test_a_hundred_steps_on_one_batch_learn_it() -> None:
    torch.manual_seed(0)
    batch = batch_of(voices(2, 2, 400))
    noise = torch.randn(2, 2, 400) * torch.tensor([0.005, 0.05]).view(2, 1, 1)
    batch.estimates = batch.sources + noise * torch.tensor([1.0, 0.3]).view(1, 2, 1)
    model = built(clipped=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = Quality()(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 12 and np.mean(losses[-5:]) < 4
