"""Soft PIT against a brute force over all permutations in float64, and between its two limits."""

import itertools

import numpy as np
import pytest
import torch

from sepdist.metrics.si_snr import pairwise_si_snr
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.separation import Separation
from sepdist.objectives.soft_pit import SoftPit
from tests.support.batches import Fixed, batch_of, values, voices


def mixed(num_sources: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    sources = torch.randn(3, num_sources, 500)
    return sources + 2.0 * torch.randn_like(sources), sources


@pytest.mark.parametrize("num_sources", [1, 2, 3, 4])
def test_the_loss_is_minus_the_log_of_the_mean_likelihood_of_all_assignments(
    num_sources: int,
) -> None:
    estimates, sources = mixed(num_sources)
    loss, metrics = SoftPit(temperature=0.7)(Fixed(estimates), batch_of(sources))
    scores = pairwise_si_snr(estimates.double(), sources.double()).numpy()
    per_item = []
    for item in scores:
        means = [
            np.mean([item[e, s] for s, e in enumerate(p)])
            for p in itertools.permutations(range(num_sources))
        ]
        per_item.append(-0.7 * np.log(np.mean(np.exp(np.array(means) / 0.7))))
    assert float(loss.detach()) == pytest.approx(np.mean(per_item), rel=1e-4)
    _, by_pit = Separation()(Fixed(estimates), batch_of(sources))
    assert all(
        torch.equal(metrics[name], by_pit[name]) for name in ("si_snr", "si_snri", "permutation")
    )


def test_cold_it_is_pit_and_hot_the_mean_over_assignments() -> None:
    estimates, sources = mixed(2)
    pit = float(Separation()(Fixed(estimates), batch_of(sources))[0].detach())
    mean = -float(pairwise_si_snr(estimates, sources).mean())
    by_temperature = [
        float(SoftPit(t)(Fixed(estimates), batch_of(sources))[0].detach())
        for t in (1e-3, 1, 10, 1e4)
    ]
    assert by_temperature[0] == pytest.approx(pit, abs=2e-3) and by_temperature[
        -1
    ] == pytest.approx(mean, abs=5e-2)
    assert by_temperature == sorted(by_temperature)


def test_each_assignment_has_the_gradient_of_its_probability() -> None:
    sources = torch.randn(1, 2, 400)
    model = Fixed(torch.randn(1, 2, 400))
    loss, _ = SoftPit(2.0)(model, batch_of(sources))
    (got,) = torch.autograd.grad(loss, model.estimates)
    scores = pairwise_si_snr(model.estimates, sources)[0]
    losses = [-(scores[0, 0] + scores[1, 1]) / 2, -(scores[0, 1] + scores[1, 0]) / 2]
    shares = torch.softmax(-torch.stack(losses).detach() / 2.0, 0)
    gradients = [torch.autograd.grad(one, model.estimates, retain_graph=True)[0] for one in losses]
    assert torch.allclose(got, shares[0] * gradients[0] + shares[1] * gradients[1], atol=1e-6)


def test_some_hundred_steps_on_one_batch_learn_it() -> None:
    torch.manual_seed(0)
    batch = batch_of(voices(2, 2, 2000))
    model = ConvTasNet(2, 64, 20, 10, 24, 48, 24, num_blocks=4, num_repeats=1, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss, metrics = SoftPit()(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert float(values(metrics["si_snri"]).min()) > 8


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature=0"):
        SoftPit(0)
