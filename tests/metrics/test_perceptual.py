"""STOI and PESQ against torchmetrics, and what has no such score."""

import numpy as np
import pytest
import scipy.signal
import torch

from sepdist.metrics import perceptual
from sepdist.metrics.perceptual import check_usable, perceptual_score

pytest.importorskip("pystoi")
pesq = pytest.importorskip("pesq")


def speech_like(num_samples: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    syllables = np.sin(np.arange(num_samples) / 900) > -0.3
    return (
        0.03
        * scipy.signal.lfilter([1], [1, -1.6, 0.8], random.standard_normal(num_samples))
        * syllables
    )


@pytest.mark.slow  # torchmetrics takes seconds to import
@pytest.mark.parametrize("rate", [8000, 16000])
def test_the_values_are_those_of_torchmetrics(rate: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional.audio")
    source = speech_like(rate)
    estimate = source + 0.3 * speech_like(rate, seed=1)
    pair = torch.from_numpy(estimate), torch.from_numpy(source)
    stoi = functional.stoi.short_time_objective_intelligibility
    assert perceptual_score("stoi", estimate, source, rate) == pytest.approx(
        float(stoi(*pair, rate))
    )
    extended = float(stoi(*pair, rate, extended=True))
    assert perceptual_score("estoi", estimate, source, rate) == pytest.approx(extended, abs=1e-6)
    mode = {8000: "nb", 16000: "wb"}[rate]
    quality = functional.pesq.perceptual_evaluation_speech_quality(*pair, rate, mode)
    assert perceptual_score("pesq", estimate, source, rate) == pytest.approx(float(quality))


def test_a_perfect_estimate_has_the_highest_scores_and_twice_the_same_are_the_same_bits() -> None:
    source = speech_like(8000)
    assert perceptual_score("stoi", source, source, 8000) == pytest.approx(1)
    assert perceptual_score("pesq", source, source, 8000) > 4.5
    noisy = source + speech_like(8000, seed=1)
    first, second = (perceptual_score("estoi", noisy, source, 8000) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("name", "num_samples", "message"),
    [
        ("stoi", 3000, r"fewer than 30 frames \(0.4 s\)"),
        ("estoi", 3000, r"fewer than 30 frames"),
        ("stoi", 100, r"fewer than 30 frames"),
        ("pesq", 1000, r"at least 1/4 of a second"),
    ],
)
def test_what_is_too_short_has_no_score_but_a_reason(
    name: str, num_samples: int, message: str
) -> None:
    source = 0.1 * np.random.default_rng(0).standard_normal(num_samples)
    with pytest.raises(ValueError, match=message):
        perceptual_score(name, source + 0.01, source, 8000)


def test_pesq_of_a_source_without_speech_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise pesq.NoUtterancesError(b"No utterances detected")

    monkeypatch.setattr(pesq, "pesq", refuse)
    with pytest.raises(ValueError, match=r"^No utterances detected$"):
        perceptual_score("pesq", np.ones(8000), np.ones(8000), 8000)


def test_a_missing_package_and_a_rate_without_pesq_are_refused_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_usable(["stoi"], 44100)
    with pytest.raises(ValueError, match="pesq is defined at 8000 or 16000 Hz, the data has 44100"):
        check_usable(["pesq"], 44100)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(perceptual.importlib, "import_module", missing)
    with pytest.raises(
        ValueError, match=r"stoi needs pystoi; run: pip install pystoi \(the extra `scores`"
    ):
        check_usable(["stoi"], 8000)
