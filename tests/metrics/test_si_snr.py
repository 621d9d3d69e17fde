"""SI-SNR against a derivation in float64 NumPy, known values and the properties in its name."""

import numpy as np
import pytest
import torch

from sepdist.metrics.si_snr import pairwise_si_snr, si_snr


def si_snr_by_angle(estimate: np.ndarray, source: np.ndarray) -> float:
    """SI-SNR as the squared cotangent of the angle between the centred signals, in dB."""
    estimate, source = estimate - estimate.mean(), source - source.mean()
    cosine2 = (estimate @ source) ** 2 / ((estimate @ estimate) * (source @ source))
    return float(10 * np.log10(cosine2 / (1 - cosine2)))


def test_si_snr_agrees_with_the_angle_between_the_signals() -> None:
    rng = np.random.default_rng(0)
    for level in (0.01, 0.3, 1.0, 5.0):
        source = rng.standard_normal(4000) + 0.5
        estimate = 0.7 * source + level * rng.standard_normal(4000)
        got = si_snr(
            torch.tensor(estimate, dtype=torch.float32), torch.tensor(source, dtype=torch.float32)
        )
        assert float(got) == pytest.approx(si_snr_by_angle(estimate, source), abs=1e-3)


def test_orthogonal_noise_of_a_tenth_of_the_amplitude_is_20_db() -> None:
    t = torch.arange(8000) / 8000
    source, noise = torch.sin(2 * torch.pi * 100 * t), torch.sin(2 * torch.pi * 200 * t)
    assert float(si_snr(3 * source + 0.3 * noise, source)) == pytest.approx(20.0, abs=1e-3)


def test_scale_sign_and_offset_do_not_matter() -> None:
    torch.manual_seed(0)
    source = torch.randn(2000)
    estimate = source + 0.3 * torch.randn(2000)
    for changed in (5 * estimate, -estimate, estimate + 2, 0.01 * estimate):
        assert float(si_snr(changed, source)) == pytest.approx(
            float(si_snr(estimate, source)), abs=1e-2
        )


def test_pairwise_has_estimates_in_rows_and_sources_in_columns() -> None:
    torch.manual_seed(0)
    estimates, sources = torch.randn(2, 3, 500), torch.randn(2, 3, 500)
    scores = pairwise_si_snr(estimates, sources)
    assert scores.shape == (2, 3, 3)
    assert float(scores[1, 0, 2]) == pytest.approx(
        float(si_snr(estimates[1, 0], sources[1, 2])), abs=1e-4
    )


@pytest.mark.parametrize("silent", ["source", "estimate", "both"])
def test_silence_gives_a_finite_score_and_a_finite_gradient(silent: str) -> None:
    source, estimate = torch.randn(2, 800).unbind()
    source = source * 0 if silent != "estimate" else source
    estimate = (estimate * 0 if silent != "source" else estimate).requires_grad_()
    score = si_snr(estimate, source)
    (gradient,) = torch.autograd.grad(score, estimate)
    assert float(score.detach()) == pytest.approx(-80, abs=0.1)
    assert torch.isfinite(gradient).all()


def test_half_precision_estimates_are_scored_in_fp32() -> None:
    torch.manual_seed(0)
    source = torch.randn(4000)
    estimate = (source + 0.1 * torch.randn(4000)).bfloat16()
    score = si_snr(estimate, source)
    assert score.dtype == torch.float32
    assert float(score) == pytest.approx(
        si_snr_by_angle(estimate.double().numpy(), source.double().numpy()), abs=1e-3
    )


def test_unequal_lengths_are_refused_with_both_named() -> None:
    with pytest.raises(ValueError, match=r"100.*99"):
        si_snr(torch.zeros(100), torch.zeros(99))
