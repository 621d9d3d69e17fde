"""uPIT: loss, permutation and gradient on known estimates, and a model that learns from it."""

import pytest
import torch

from sepdist.metrics.si_snr import si_snr
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.separation import Separation, mean_above
from tests.support.batches import Fixed, batch_of, values, voices


@pytest.mark.parametrize("num_sources", [2, 3, 4])
def test_shuffled_estimates_get_the_loss_of_ordered_ones_and_the_rank_of_the_shuffle(
    num_sources: int,
) -> None:
    torch.manual_seed(0)
    sources = torch.randn(2, num_sources, 1000)
    estimates = sources + 0.1 * torch.randn_like(sources)
    batch = batch_of(sources)
    straight, metrics = Separation()(Fixed(estimates), batch)
    flipped, flipped_metrics = Separation()(Fixed(estimates.flip(1)), batch)
    assert float(straight.detach()) == pytest.approx(float(flipped.detach()), abs=1e-5)
    assert metrics["permutation"].tolist() == [0, 0]
    last = {2: 1, 3: 5, 4: 23}[num_sources]  # the reversed order is the last of all
    assert flipped_metrics["permutation"].tolist() == [last, last]
    assert flipped_metrics["permutation"].dtype == torch.int64


def test_the_loss_is_minus_the_mean_si_snr_and_the_improvement_is_against_the_mixture() -> None:
    torch.manual_seed(0)
    sources = torch.randn(3, 2, 2000)
    estimates = sources + 0.2 * torch.randn_like(sources)
    loss, metrics = Separation()(Fixed(estimates), batch_of(sources))
    expected = si_snr(estimates, sources).mean(1)
    mixture = si_snr(sources.sum(1, keepdim=True), sources).mean(1)
    assert torch.allclose(values(metrics["si_snr"]), expected)
    assert torch.allclose(values(metrics["si_snri"]), expected - mixture)
    assert float(loss.detach()) == pytest.approx(-float(expected.mean()), abs=1e-5)


def test_a_silent_source_gives_finite_loss_and_gradient() -> None:
    sources = torch.randn(2, 2, 500)
    sources[0, 1] = 0
    model = Fixed(torch.randn(2, 2, 500))
    loss, metrics = Separation()(model, batch_of(sources))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.estimates.grad).all()
    assert all(torch.isfinite(value.float()).all() for value in metrics.values())


def test_items_below_the_threshold_get_no_gradient() -> None:
    torch.manual_seed(0)
    sources = torch.randn(2, 2, 1000)
    estimates = sources + torch.tensor([1e-4, 0.5]).view(2, 1, 1) * torch.randn_like(sources)
    model = Fixed(estimates)
    loss, metrics = Separation(threshold=-30.0)(model, batch_of(sources))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-float(values(metrics["si_snr"])[1]), abs=1e-5)
    assert model.estimates.grad[0].abs().max() == 0 and model.estimates.grad[1].abs().max() > 0


def test_the_threshold_keeps_a_loss_that_is_not_a_number_and_survives_a_batch_below_it() -> None:
    assert torch.isnan(mean_above(torch.tensor([-40.0, torch.nan]), -30.0))
    assert float(mean_above(torch.tensor([-40.0, -50.0]), -30.0)) == 0.0


def test_a_model_with_another_number_of_outputs_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 100\).*\(1, 2, 100\)"):
        Separation()(Fixed(torch.randn(1, 3, 100)), batch_of(torch.randn(1, 2, 100)))


def test_a_batch_without_sources_is_refused() -> None:
    batch = batch_of(torch.randn(1, 2, 100))
    batch.sources = None
    with pytest.raises(ValueError, match="needs sources"):
        Separation()(Fixed(torch.randn(1, 2, 100)), batch)


def test_some_hundred_steps_on_one_batch_learn_it() -> None:
    torch.manual_seed(0)
    batch = batch_of(voices(2, 2, 4000))
    model = ConvTasNet(2, 64, 20, 10, 24, 48, 24, num_blocks=4, num_repeats=1, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    objective = Separation()
    for _ in range(200):
        loss, metrics = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert float(values(metrics["si_snri"]).min()) > 10
