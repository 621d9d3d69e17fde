"""Scores of an SI-SNR estimator: correlation and errors against numpy on known predictions."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from sepdist.config import ConfigError, EvaluateConfig
from sepdist.data import shards
from sepdist.data.records import Mixture
from sepdist.inference import estimation
from sepdist.inference.export import Export
from sepdist.inference.scoring import EvaluationError
from sepdist.metrics.si_snr import si_snr
from sepdist.papers import figures
from tests.support.exports import RATE, damage, oracle_si_snr, voices, write_export
from tests.support.shard_sets import write_shard


class Halving(nn.Module):
    """An estimator that knows the truth and predicts half of it plus 1 dB."""

    estimates_si_snr = True

    def __init__(self, truth: dict[float, Tensor]) -> None:
        super().__init__()
        self.truth = truth

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        key = round(float(mixture_BT[0, :50].sum()), 4)
        return 0.5 * si_snr(estimates_BST, self.truth[key]) + 1.0


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, dict[float, Tensor], list[list[float]]]:
    records, truth, wanted = [], {}, []
    for number in range(5):
        waves = voices(3000 + number, seed=number, num=4)
        noisy = (waves[0] + 0.3 * number * waves[2], 0.5 * waves[1] + 0.1 * waves[3])
        stored = np.round(np.stack([*waves[:2], *noisy]) * 2**15).astype(np.float32) / 2**15
        members = dict(zip(("s1", "s2", "e1", "e2"), stored, strict=True))
        records.append(Mixture(f"m{number}", ("a", "b"), RATE, lambda members=members: members))
        sources_ST = torch.from_numpy(stored[:2])
        truth[round(float(sources_ST.sum(0)[:50].sum()), 4)] = sources_ST
        pairs = (("e1", "s1"), ("e2", "s2"))
        wanted.append([min(oracle_si_snr(members[e], members[s]), 200) for e, s in pairs])
    url = str(tmp_path / "data")
    info = write_shard(records, url, shards.shard_name("toy", "test", 0))
    shards.write_manifest(url, "toy", "test", RATE, [info])
    return url, truth, wanted


def test_correlation_and_errors_are_those_of_numpy(data, tmp_path: Path, monkeypatch) -> None:
    url, truth, wanted = data
    monkeypatch.setattr(
        estimation, "load_export", lambda _: Export(Halving(truth), RATE, {"step": 3}, "x")
    )
    output = tmp_path / "out"
    cfg = EvaluateConfig("x", url, str(output), num_workers=0, cache_dir=str(tmp_path / "cache"))
    results = estimation.evaluate_estimator(cfg, Console(quiet=True))
    true = np.array(wanted)
    with open(output / "utterances.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = np.array([[float(row["true_1"]), float(row["true_2"])] for row in rows])
    # In the first, e1 is s1 itself: as good as eps allows.
    np.testing.assert_allclose(found[1:], true[1:], atol=2e-3)
    predicted = 0.5 * found + 1.0
    mean_true, mean_predicted = found.mean(1), predicted.mean(1)
    assert results["lcc"] == pytest.approx(np.corrcoef(mean_true, mean_predicted)[0, 1], abs=1e-4)
    assert results["mae"] == pytest.approx(np.abs(mean_predicted - mean_true).mean(), abs=1e-3)
    assert results["bias"] == pytest.approx((mean_predicted - mean_true).mean(), abs=1e-3)
    by_estimate = np.abs(predicted - found).mean()
    assert results["by_estimate"]["mae"] == pytest.approx(by_estimate, abs=1e-3)
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "scatter.png").read_bytes()[:4] == b"\x89PNG"


def test_an_estimator_with_constant_predictions_has_no_correlation() -> None:
    assert estimation.agreement(np.array([1.0, 2.0, 6.0]), np.full(3, 2.0)) == {
        "lcc": None,
        "mae": pytest.approx(5 / 3),
        "bias": pytest.approx(-1.0),
    }


def test_a_data_set_without_estimates_is_refused_with_what_to_do(
    tiny_data, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(estimation, "load_export", lambda _: Export(Halving({}), RATE, {}, "x"))
    cfg = EvaluateConfig("x", tiny_data["dev"], str(tmp_path / "out"), num_workers=0)
    message = "has s1, s2, noise, no estimates; write it with corpus=separated"
    with pytest.raises(ConfigError, match=message):
        estimation.evaluate_estimator(cfg, Console(quiet=True))


def test_what_cannot_be_scored_is_in_no_mean_and_named(
    data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, truth, _ = data
    damage(url, "m1", "e1")
    predict = Halving.forward

    def forward(self: Halving, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        if mixture_BT.shape[1] == 3002:
            raise RuntimeError("CUDA error: out of memory")
        return predict(self, mixture_BT, estimates_BST) * (
            torch.nan if mixture_BT.shape[1] == 3003 else 1.0
        )

    monkeypatch.setattr(Halving, "forward", forward)
    export = Export(Halving(truth), RATE, {}, "x")
    monkeypatch.setattr(estimation, "load_export", lambda _: export)
    cfg = EvaluateConfig("x", url, str(tmp_path / "out"), num_workers=0, max_unscored=3)
    results = estimation.evaluate_estimator(cfg, Console(quiet=True))
    with open(tmp_path / "out" / "utterances.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    reasons = {"m1": "m1.e1 at byte", "m2": "out of memory", "m3": "predicts NaN"}
    for name, reason in reasons.items():
        assert reason in rows[name]["reason"] and rows[name]["predicted_2"] == ""
    assert [one["id"] for one in results["unscored"]] == [*reasons]
    kept = np.array([[float(rows[name][f"true_{i}"]) for i in (1, 2)] for name in ("m0", "m4")])
    errors = (0.5 * kept + 1.0).mean(1) - kept.mean(1)
    assert results["num_mixtures"] == 2
    assert results["bias"] == pytest.approx(errors.mean(), abs=1e-3)
    found = figures.read_predictions(str(tmp_path / "out"))  # of the figure: without the others
    np.testing.assert_allclose(found, [kept.mean(1), (0.5 * kept + 1.0).mean(1)], atol=2e-3)
    cfg.max_unscored = 2
    with pytest.raises(EvaluationError, match="3 have no score and are in no mean"):
        estimation.evaluate_estimator(cfg, Console(quiet=True))


def test_a_separator_is_refused_by_name(data, tmp_path: Path) -> None:
    write_export(tmp_path / "separator")
    cfg = EvaluateConfig(str(tmp_path / "separator"), data[0], str(tmp_path / "o"), num_workers=0)
    with pytest.raises(ConfigError, match="separator: a ConvTasNet is no SI-SNR estimator"):
        estimation.evaluate_estimator(cfg, Console(quiet=True))
