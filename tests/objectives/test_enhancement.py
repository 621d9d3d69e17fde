"""SE: the score against clean speech, and a model that learns to remove noise."""

import pytest
import torch

from sepdist.metrics.si_snr import si_snr
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.enhancement import Enhancement
from tests.support.batches import Fixed, batch_of, values, voices


def test_the_loss_is_minus_the_si_snr_against_the_first_source() -> None:
    torch.manual_seed(0)
    sources, noise = torch.randn(2, 2, 1000), torch.randn(2, 1000)
    estimates = sources[:, :1] + 0.3 * torch.randn(2, 1, 1000)
    batch = batch_of(sources, noise)
    loss, metrics = Enhancement()(Fixed(estimates), batch)
    expected = si_snr(estimates, sources[:, :1])[:, 0]
    assert torch.allclose(values(metrics["si_snr"]), expected)
    assert torch.allclose(
        values(metrics["si_snri"]), expected - si_snr(batch.mixture, sources[:, 0])
    )
    assert float(loss.detach()) == pytest.approx(-float(expected.mean()), abs=1e-5)
    assert "permutation" not in metrics


def test_silence_gives_finite_loss_and_gradient() -> None:
    model = Fixed(torch.randn(1, 1, 300))
    loss, _ = Enhancement()(model, batch_of(torch.zeros(1, 1, 300), torch.randn(1, 300)))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.estimates.grad).all()


def test_a_model_with_two_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match="num_speakers=1"):
        Enhancement()(Fixed(torch.randn(1, 2, 100)), batch_of(torch.randn(1, 1, 100)))


def test_a_batch_without_sources_is_refused() -> None:
    batch = batch_of(torch.randn(1, 1, 100))
    batch.sources = None
    with pytest.raises(ValueError, match="needs sources"):
        Enhancement()(Fixed(torch.randn(1, 1, 100)), batch)


def test_a_hundred_steps_on_one_batch_remove_its_noise() -> None:
    torch.manual_seed(0)
    batch = batch_of(voices(2, 1, 4000), 0.2 * torch.randn(2, 4000))
    model = ConvTasNet(1, 64, 20, 10, 24, 48, 24, num_blocks=4, num_repeats=1, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss, metrics = Enhancement()(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(values(metrics["si_snri"]).min()) > 5
