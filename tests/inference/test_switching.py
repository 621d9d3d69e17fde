"""Permutations of every checkpoint over whole utterances, known by construction."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from sepdist import slots
from sepdist.config import ConfigError, EvaluateConfig
from sepdist.data.dataset import Dataset
from sepdist.data.records import Batch
from sepdist.inference import scoring, switching
from sepdist.objectives.fixed_permutations import read_permutations
from sepdist.training.checkpoint import Checkpointer, OptimizerState, Snapshot
from tests.support.exports import MODEL, damage


def make_run(
    run_dir: Path, swapped_at: dict[int, bool], noted: dict[str, int], rates: dict[int, float]
) -> torch.nn.Module:
    """A run with a checkpoint of one model at each step; `swapped_at` exchanges its two outputs."""
    torch.manual_seed(0)
    model = slots.build("model", MODEL)
    writer = Checkpointer(
        str(run_dir),
        model_node=MODEL,
        sample_rate=8000,
        lineage={},
        keep_last=1,
        keep_best=False,
        keep_every=10,
    )
    for step, swapped in swapped_at.items():
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        for name in ("mask_conv.weight", "mask_conv.bias"):
            if swapped:
                weights[name] = torch.cat(weights[name].chunk(2)[::-1])
        state = {"switches": {"previous": noted, "current": {}}}
        writer.save(Snapshot(step, weights, OptimizerState({}, {}), state))
    writer.close()
    rows = [
        {"step": step, "seconds": 1.0, "switching/rate": rate, "switching/epoch": 1}
        for step, rate in rates.items()
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model


def test_permutations_and_rates_are_those_of_checkpoints_that_exchange_their_outputs(
    tiny_data, tmp_path: Path
) -> None:
    dataset = Dataset(tiny_data["dev"], num_sources=2)
    batches = [dataset.full(i, 100.0) for i in range(4)]
    ids = [batch.ids[0] for batch in batches]
    noted = {ids[0]: 0, ids[1]: 1, ids[2]: 0}
    steps = {10: False, 20: True, 30: True, 40: False}
    model = make_run(tmp_path / "run", steps, noted, {15: 0.5, 20: 0.7, 30: 0.1})

    expected = {}  # the better of two permutations has the greater product of r^2 / (1 - r^2)
    for batch in batches:
        with torch.no_grad():
            estimates = model(batch.mixture)[0].numpy()
        r = np.corrcoef(estimates.astype(float), batch.sources[0].numpy().astype(float))[:2, 2:]
        gain = np.log(r**2 / (1 - r**2))
        expected[batch.ids[0]] = int(gain[0, 1] + gain[1, 0] > gain[0, 0] + gain[1, 1])

    out = str(tmp_path / "out")
    cfg = EvaluateConfig(str(tmp_path / "run"), tiny_data["dev"], out, num_workers=0)
    results = switching.measure_switching(cfg, Console(quiet=True))
    for step, swapped in steps.items():
        with open(tmp_path / "out" / f"step-{step:09d}.csv", newline="") as file:
            table = {row["id"]: int(row["permutation"]) for row in csv.DictReader(file)}
        assert table == {id_: rank ^ swapped for id_, rank in expected.items()}
    assert results["rates"] == [
        {"from": 10, "to": 20, "rate": 1, "online": pytest.approx(0.6)},
        {"from": 20, "to": 30, "rate": 0, "online": pytest.approx(0.1)},
        {"from": 30, "to": 40, "rate": 1, "online": None},
    ]
    shares = [
        np.mean([(expected[id_] ^ swapped) == noted[id_] for id_ in noted])
        for swapped in steps.values()
    ]
    assert results["agreement"]["equal_permutations"] == pytest.approx(np.mean(shares))
    assert results["agreement"]["mean_difference"] == pytest.approx((0.4 - 0.1) / 2)
    assert json.loads((tmp_path / "out" / "switching.json").read_text()) == results


def test_the_correlation_is_that_of_the_two_rates() -> None:
    by_step = {
        step: {id_: int(step / 10 > k) for k, id_ in enumerate("abcde")} for step in (0, 10, 30, 60)
    }
    online = [0.3, 0.35, 0.8]
    metrics = [
        {"step": step, "switching/rate": rate}
        for step, rate in zip((10, 30, 60), online, strict=True)
    ]
    agreement = switching.compare(by_step, metrics, {step: {} for step in by_step})["agreement"]
    x, y = np.array([0.2, 0.4, 0.4]), np.array(online)
    oracle = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
    assert agreement["correlation"] == pytest.approx(oracle)
    assert agreement["equal_permutations"] is None


def test_a_run_with_one_checkpoint_says_how_to_keep_more(tiny_data, tmp_path: Path) -> None:
    make_run(tmp_path / "run", {10: False}, {}, {})
    cfg = EvaluateConfig(str(tmp_path / "run"), tiny_data["dev"], str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"1 checkpoint.*training\.keep_every"):
        switching.measure_switching(cfg, Console(quiet=True))


def test_utterances_that_cannot_be_assigned_are_in_no_rate_and_named(
    tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [Dataset(tiny_data["dev"]).full(i, 100.0).ids[0] for i in range(4)]
    make_run(tmp_path / "run", {10: False, 20: True, 30: True}, {}, {})
    data = shutil.copytree(tiny_data["dev"], tmp_path / "data")
    damage(str(data), ids[0])
    separate = scoring.separate_batch

    def separate_batch(model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        estimates = separate(model, batch, device)
        return estimates * 0.0 if batch.ids[0] == ids[2] else estimates

    monkeypatch.setattr(scoring, "separate_batch", separate_batch)
    out = tmp_path / "out"
    cfg = EvaluateConfig(str(tmp_path / "run"), str(data), str(out), num_workers=0)
    with pytest.raises(scoring.EvaluationError, match=r"6 have no score.*max_unscored=6"):
        switching.measure_switching(cfg, Console(quiet=True))
    results = json.loads((out / "switching.json").read_text())
    assert results["num_utterances"] == 2
    assert [row["rate"] for row in results["rates"]] == [1, 0]
    assert {one["id"] for one in results["unscored"]} == {ids[0], ids[2]}
    for step in (10, 20, 30):  # what the objective reads has those with a permutation alone
        assert {*read_permutations(str(out / f"step-{step:09d}.csv"))} == {ids[1], ids[3]}
    with open(out / "utterances.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["10"] * 4 + ["20"] * 4 + ["30"] * 4
    assert "estimate 1 is silent" in rows[2]["reason"] and rows[2]["permutation"] == ""


def test_checkpoints_without_a_common_utterance_have_no_rate() -> None:
    found = switching.compare({1: {"a": 0}, 2: {}, 3: {"a": 1}}, [], {1: {}, 2: {}, 3: {"a": 1}})
    assert [row["rate"] for row in found["rates"]] == [None, None]
    assert found["agreement"]["equal_permutations"] == 1


def test_a_run_of_an_estimator_is_refused(tiny_data, tmp_path: Path) -> None:
    node = {"_target_": "sepdist.models.sisnr_cnn.SISNREstimator"}
    sizes = {"lineage": {}, "keep_last": 2, "keep_best": False, "keep_every": 10}
    writer = Checkpointer(str(tmp_path / "run"), model_node=node, sample_rate=8000, **sizes)
    for step in (10, 20):
        weights = slots.build("model", node).state_dict()
        writer.save(Snapshot(step, weights, OptimizerState({}, {}), {}))
    writer.close()
    places = (str(tmp_path / "run"), tiny_data["dev"], str(tmp_path / "out"))
    cfg = EvaluateConfig(*places, num_workers=0)
    with pytest.raises(ValueError, match="estimates SI-SNR and separates nothing"):
        switching.measure_switching(cfg, Console(quiet=True))
