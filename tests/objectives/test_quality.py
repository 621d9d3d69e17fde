"""SI-SNR estimation against NumPy, and an SI-SNR estimator where a separator is expected."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor, nn

from sepdist import slots
from sepdist.cli import separate
from sepdist.config import EvaluateConfig, ValidationConfig
from sepdist.data.records import Batch
from sepdist.inference import evaluation
from sepdist.metrics.si_snr import si_snr
from sepdist.models.sisnr_cnn import SISNREstimator
from sepdist.objectives.quality import ALTERATIONS, Quality, alter
from sepdist.training.checkpoint import CheckpointError
from sepdist.training.validation import listen
from tests.support.batches import batch_of, values, voices
from tests.support.exports import oracle_si_snr


class Constant(nn.Module):
    """Predicts its parameters, and keeps its inputs."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = nn.Parameter(prediction.clone())

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        self.given = (mixture_BT, estimates_BST)
        return self.prediction


def scored(num_items: int = 3) -> tuple[Batch, np.ndarray]:
    """A batch with estimates in the order of the sources, and their SI-SNR [B, S]."""
    batch = batch_of(voices(num_items, 2, 800))
    noise = torch.randn(num_items, 2, 800, generator=torch.Generator().manual_seed(0))
    batch.estimates = 3 * batch.sources + torch.tensor([0.03, 0.9]).view(1, 2, 1) * noise
    pairs = zip(
        batch.estimates.flatten(0, 1).numpy(), batch.sources.flatten(0, 1).numpy(), strict=True
    )
    return batch, np.array([oracle_si_snr(e, s) for e, s in pairs]).reshape(num_items, 2)


def test_loss_and_metrics_are_the_errors_in_decibels() -> None:
    batch, true = scored()
    predicted = torch.tensor([[3.0, -4.0], [30.0, 10.0], [0.0, 0.0]])
    model = Constant(predicted)
    loss, metrics = Quality()(model, batch)
    error = predicted.numpy() - true
    assert loss.item() == pytest.approx(np.abs(error).mean(), abs=1e-4)
    np.testing.assert_allclose(values(metrics["mae"]), np.abs(error).mean(1), atol=1e-4)
    np.testing.assert_allclose(values(metrics["bias"]), error.mean(1), atol=1e-4)
    np.testing.assert_allclose(values(metrics["predicted"]), predicted.mean(1), atol=1e-6)
    np.testing.assert_allclose(values(metrics["true_si_snr"]), true.mean(1), atol=1e-4)
    assert model.given[0] is batch.mixture and model.given[1] is batch.estimates
    assert all(not one.requires_grad and one.shape == (2, 3) for one in metrics.values())
    loss.backward()
    np.testing.assert_allclose(model.prediction.grad, np.sign(error) / 6, atol=1e-7)


def test_limits_clip_what_is_learned_and_not_what_is_measured() -> None:
    batch, true = scored()
    assert true.max() > 10 and true.min() < 0
    predicted = torch.full((3, 2), 5.0)
    loss, metrics = Quality([0, 10])(Constant(predicted), batch)
    assert loss.item() == pytest.approx(np.abs(5 - true.clip(0, 10)).mean(), abs=1e-4)
    np.testing.assert_allclose(values(metrics["mae"]), np.abs(5 - true).mean(1), atol=1e-4)


def altered(kind: str, amount: float) -> tuple[Batch, Tensor]:
    """The first item of `scored`, its estimates at another level, altered."""
    batch, _ = scored()
    given = batch.mixture[0], 5 * batch.estimates[0], batch.sources[0]
    return batch, alter(*given, kind, amount)


def test_alterations_go_from_the_estimate_all_the_way() -> None:
    def in_db(some: Tensor, other: Tensor) -> float:
        return min(si_snr(some, other).tolist())

    for kind in ALTERATIONS:
        amount = 1.0 if kind in ("exchanged", "smoothed") else 0.0
        batch, unaltered = altered(kind, amount)
        assert in_db(unaltered, batch.estimates[0]) > 60, kind
    batch, mixed = altered("mixed", 1)
    assert in_db(mixed, batch.mixture[:1].expand(2, -1)) > 60
    assert in_db(altered("cleaned", 1)[1], batch.sources[0]) > 60
    for kind, amount in (("leaking", 1), ("exchanged", 0)):
        assert in_db(altered(kind, amount)[1], batch.estimates[0].flip(0)) > 60


def test_alterations_half_way_are_what_numpy_makes_of_them() -> None:
    batch, leaking = altered("leaking", 0.5)
    e = batch.estimates[0].double().numpy() * 5
    m = batch.mixture[0].double().numpy()
    e *= ((e * m).sum(1) / (e * e).sum(1))[:, None]
    np.testing.assert_allclose(leaking, np.repeat(e.mean(0, keepdims=True), 2, 0), atol=1e-4)
    _, exchanged = altered("exchanged", 0.5)
    np.testing.assert_allclose(exchanged[:, :400], e[:, :400], atol=1e-4)
    np.testing.assert_allclose(exchanged[:, 400:], e[::-1, 400:], atol=1e-4)
    _, smoothed = altered("smoothed", 0.5)
    spectrum, before = np.fft.rfft(smoothed.numpy()), np.fft.rfft(e)
    np.testing.assert_allclose(spectrum[:, :201], before[:, :201], atol=1e-2)
    np.testing.assert_allclose(spectrum[:, 201:], 0, atol=1e-2)


def test_altered_items_are_drawn_by_position_in_training_only_and_scored_as_they_are() -> None:
    batch, _ = scored()
    batch.positions = torch.arange(3) + 7
    model = Constant(torch.zeros(3, 2))
    objective = Quality(altered=1.0)
    _, metrics = objective(model, batch)
    mixture, given = model.given
    np.testing.assert_allclose(
        values(metrics["true_si_snr"]),
        [
            np.mean([oracle_si_snr(e, s) for e, s in zip(*pair, strict=True)])
            for pair in zip(given.numpy(), batch.sources.numpy(), strict=True)
        ],
        atol=1e-3,
    )
    assert not torch.equal(given, batch.estimates) and mixture is batch.mixture
    objective(model, batch)
    assert torch.equal(model.given[1], given)
    batch.positions = batch.positions + 1
    objective(model, batch)
    assert not torch.equal(model.given[1], given)
    assert Quality(altered=1.0)(model.eval(), batch) and model.given[1] is batch.estimates
    with pytest.raises(ValueError, match=r"altered=1\.5"):
        Quality(altered=1.5)


def test_the_score_of_validation_is_minus_the_loss() -> None:
    batch, _ = scored()
    _, metrics = Quality()(Constant(torch.zeros(3, 2)), batch)
    assert "si_snr" not in metrics


@pytest.mark.parametrize("lacking", ["sources", "estimates"])
def test_a_data_set_without_sources_or_estimates_is_refused(lacking: str) -> None:
    batch, _ = scored()
    setattr(batch, lacking, None)
    with pytest.raises(ValueError, match=f"needs .*{lacking}"):
        Quality()(Constant(torch.zeros(3, 2)), batch)


def test_predictions_of_another_shape_and_invalid_limits_are_refused() -> None:
    batch, _ = scored()
    with pytest.raises(ValueError, match=r"\(3, 1\) values for \(3, 2\)"):
        Quality()(Constant(torch.zeros(3, 1)), batch)
    for limits in ([10, 0], [1], [5, 5]):
        with pytest.raises(ValueError, match="low < high"):
            Quality(limits)


def test_a_model_that_separates_is_refused_before_training() -> None:
    Quality().check_model(SISNREstimator())
    with pytest.raises(
        ValueError, match="a Conv1d does not estimate SI-SNR: set model=ssqp_wav2vec2"
    ):
        Quality().check_model(nn.Conv1d(1, 1, 1))


def test_listening_examples_are_the_estimates_of_the_data_set_with_their_si_snr() -> None:
    batch, true = scored(1)
    waves: dict[str, np.ndarray] = {}

    class Recorded:
        """A data set of one mixture, an engine whose model must not be called, and a reporter."""

        manifest = type("Manifest", (), {"sample_rate": 8000, "num_samples": 1})

        def full(self, index: int, max_seconds: float) -> Batch:
            return batch

        def audio(self, step: int, name: str, wave: np.ndarray, rate: int) -> None:
            waves[name] = wave

        def spectrogram(
            self, step: int, name: str, shown: dict[str, np.ndarray], rate: int
        ) -> None:
            assert name == f"2 listen {batch.ids[0]}"
            scores = [f"estimate {i + 1}: {true[0, i]:.1f} dB" for i in (0, 1)]
            assert list(shown) == ["source 1", "source 2", *scores]

    listen(None, Quality(), Recorded(), Recorded(), 1, ValidationConfig(num_listening=3))
    for i in (0, 1):
        assert np.array_equal(
            waves[f"2 listen {batch.ids[0]}/estimate {i + 1}"], batch.estimates[0, i]
        )
        assert np.array_equal(waves[f"2 listen {batch.ids[0]}/source {i + 1}"], batch.sources[0, i])


@pytest.fixture
def estimator(tmp_path: Path) -> str:
    node = {"_target_": "sepdist.models.sisnr_cnn.SISNREstimator"}
    safetensors.torch.save_file(
        slots.build("model", node).state_dict(), str(tmp_path / "model.safetensors")
    )
    (tmp_path / "model.yaml").write_text(json.dumps({"model": node, "sample_rate": 8000}))
    return str(tmp_path)


def test_evaluation_and_separation_refuse_an_si_snr_estimator_in_one_line(
    estimator: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(CheckpointError, match="SISNREstimator estimates SI-SNR"):
        evaluation.evaluate(
            EvaluateConfig(estimator, "data", str(tmp_path / "out")), Console(quiet=True)
        )
    monkeypatch.setattr(
        sys, "argv", ["separate", "--model", estimator, "--output", str(tmp_path), "a.wav"]
    )
    with pytest.raises(SystemExit):
        separate.main()
    assert f"error: {estimator}: a SISNREstimator estimates SI-SNR" in capsys.readouterr().err
