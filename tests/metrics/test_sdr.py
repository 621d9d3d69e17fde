"""SDR against explicit least squares on delayed copies and against a published implementation."""

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch

from sepdist.metrics.sdr import BLOCK, TAPS, bss_eval, pairwise_sdr


def speech_like(seed: int, num_samples: int, num: int = 2) -> np.ndarray:
    """Noise with the low-pass spectrum of speech, [num, T], in steps of 16 bits."""
    noise = np.random.default_rng(seed).standard_normal((num, num_samples))
    return np.round(300 * scipy.signal.lfilter([1], [1, -1.6, 0.8], noise)) / 2**15


def sdr_of(estimates: np.ndarray, sources: np.ndarray) -> np.ndarray:
    return pairwise_sdr(torch.from_numpy(estimates), torch.from_numpy(sources)).numpy()


def by_least_squares(estimates: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Project every estimate on all delayed copies of every source, one column for each."""
    padded = np.pad(estimates, ((0, 0), (0, TAPS - 1)))
    columns = []
    for source in sources:
        copies = scipy.linalg.toeplitz(np.append(source, np.zeros(TAPS - 1)), np.zeros(TAPS))
        basis, _ = np.linalg.qr(copies)
        targets = padded @ basis @ basis.T
        ratio = np.sum(targets**2, 1) / np.sum((padded - targets) ** 2, 1)
        columns.append(10 * np.log10(ratio))
    return np.stack(columns, axis=1)


LENGTHS = [100, TAPS, BLOCK - TAPS, BLOCK - TAPS + 1, BLOCK - TAPS + 2]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_every_pair_has_the_sdr_of_explicit_least_squares(num_samples: int) -> None:
    sources = speech_like(1, num_samples)
    noise = 0.01 * np.random.default_rng(2).standard_normal(sources.shape)
    heard_through_a_filter = scipy.signal.lfilter([0.2, 0.5, 0, 0.3], [1], sources[1])
    estimates = np.stack([0.1 * sources[0] + sources[1], heard_through_a_filter, sources[0]])
    estimates += np.append(noise, noise[:1], axis=0)
    expected = by_least_squares(estimates, sources)
    np.testing.assert_allclose(sdr_of(estimates, sources), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_the_values_are_those_of_fast_bss_eval_to_a_billionth_of_a_decibel(num: int) -> None:
    oracle = pytest.importorskip("fast_bss_eval")
    sources = speech_like(num, 9000, num)
    noise = np.random.default_rng(num + 10).standard_normal((num, 9000))
    mixture = np.tile(sources.sum(0), (num, 1))
    for estimates in (mixture + 1e-3 * noise, sources[::-1] + 0.2 * sources + 0.01 * noise, noise):
        theirs = -oracle.sdr_loss(estimates, sources, clamp_db=100.0, pairwise=True).T
        np.testing.assert_allclose(sdr_of(estimates, sources), theirs, rtol=0, atol=1e-9)


def test_a_source_without_high_frequencies_makes_an_ill_conditioned_matrix_and_is_scored() -> None:
    fading = speech_like(3, 2000) * np.hanning(2000)
    narrow = scipy.signal.resample_poly(fading, 2, 1, axis=1, window=("kaiser", 12.0))
    narrow = np.round(2**15 * narrow) / 2**15
    correlations = [np.correlate(one, one, "full")[len(one) - 1 :][:TAPS] for one in narrow]
    assert min(np.linalg.cond(scipy.linalg.toeplitz(one)) for one in correlations) > 1e8
    estimates = narrow + 0.1 * narrow[::-1]
    expected = by_least_squares(estimates, narrow)
    np.testing.assert_allclose(sdr_of(estimates, narrow), expected, rtol=0, atol=1e-9)


def test_a_perfect_estimate_has_100_db_and_one_of_nothing_but_noise_has_less_than_0() -> None:
    sources = speech_like(4, 8000)
    found = sdr_of(sources, sources)
    assert np.diag(found) == pytest.approx([100, 100])
    assert found[0, 1] < 0 and found[1, 0] < 0


def test_levels_do_not_count() -> None:
    sources = speech_like(5, 5000)
    estimates = sources + 0.3 * sources[::-1]
    loud, quiet = sdr_of(1e6 * estimates, sources), sdr_of(estimates, 1e-6 * sources)
    np.testing.assert_allclose(loud, quiet, rtol=0, atol=1e-9)


def test_a_silent_source_is_an_error() -> None:
    sources = speech_like(6, 2000)
    sources[1] = 0
    with pytest.raises(ValueError, match=r"[Ss]ingular"):
        sdr_of(speech_like(7, 2000), sources)


@pytest.mark.parametrize("num", [1, 2])
def test_sir_and_sar_split_the_distortion_as_explicit_least_squares_on_all_sources_does(
    num: int,
) -> None:
    sources = speech_like(8, 700, num)
    noise = 0.01 * np.random.default_rng(9).standard_normal(sources.shape)
    estimates = sources + 0.2 * sources[::-1] + noise
    padded = np.pad(estimates, ((0, 0), (0, TAPS - 1)))
    copies = [
        scipy.linalg.toeplitz(np.append(source, np.zeros(TAPS - 1)), np.zeros(TAPS))
        for source in sources
    ]
    bases = [np.linalg.qr(one)[0] for one in (*copies, np.hstack(copies)) if one.size]
    *targets, explained = (padded @ basis @ basis.T for basis in bases)
    sar = 10 * np.log10((explained**2).sum(1) / ((padded - explained) ** 2).sum(1))
    found = bss_eval(torch.from_numpy(estimates), torch.from_numpy(sources))
    np.testing.assert_allclose(found[0], sdr_of(estimates, sources), rtol=0, atol=0)
    np.testing.assert_allclose(found[2], sar, rtol=0, atol=1e-7)
    for j, target in enumerate(targets if num > 1 else []):
        sir = 10 * np.log10((target**2).sum(1) / ((explained - target) ** 2).sum(1))
        np.testing.assert_allclose(found[1][:, j], sir, rtol=0, atol=1e-7)
    if num == 1:  # nobody interferes
        assert found[1].item() == pytest.approx(100)


def test_sdr_sir_and_sar_are_those_of_mir_eval() -> None:
    oracle = pytest.importorskip("mir_eval.separation")
    sources = speech_like(10, 4000)
    noise = 0.05 * np.random.default_rng(11).standard_normal(sources.shape)
    estimates = sources[::-1] + 0.3 * sources + noise
    sdr, sir, sar, order = oracle.bss_eval_sources(sources, estimates)
    found = bss_eval(torch.from_numpy(estimates), torch.from_numpy(sources))
    assert list(order) == [1, 0]
    np.testing.assert_allclose(found[0].numpy()[order, [0, 1]], sdr, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found[1].numpy()[order, [0, 1]], sir, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found[2].numpy()[order], sar, rtol=0, atol=1e-9)


def test_the_same_source_twice_has_no_sir() -> None:
    [source] = speech_like(12, 2000, 1)
    estimates = torch.from_numpy(speech_like(13, 2000))
    with pytest.raises(ValueError, match="no SIR is defined"):
        bss_eval(estimates, torch.from_numpy(np.stack([source, source])))
