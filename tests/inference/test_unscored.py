"""Utterances that have no score do not keep the others from theirs, and are counted and named."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from sepdist import storage
from sepdist.cli import evaluate as program
from sepdist.config import EvaluateConfig
from sepdist.data import shards
from sepdist.data.dataset import Dataset
from sepdist.data.records import Mixture
from sepdist.inference import evaluation, scoring
from sepdist.inference.export import Export
from sepdist.inference.scoring import EvaluationError
from tests.support.exports import RATE, damage, voices
from tests.support.shard_sets import write_shard

LENGTH = 2000  # of what is scored
REASONS = {
    "m1": "m1: source 2 is silent",
    "m2": "m2: estimate 1 holds NaN",
    "m3": "m3: estimate 1 is silent",
    "m4": "out of memory",
    "m6": "m6: 290 samples are fewer than the 300",
    "m8": "m8: 500 samples; SDR needs 512",
    "m9": "m9.s1 at byte",
    "m10": "the shard is missing",
    "m11": "the shard is missing",
}
GOOD = ["m0", "m5", "m7"]


class Picky(nn.Module):
    """Clips the wave from below and above, or fails where its first sample says so."""

    min_length = 300

    def forward(self, mixture_BT: Tensor) -> Tensor:
        kind = round(float(mixture_BT[0, 0]) * -10)
        if kind == 3:
            raise RuntimeError("out of memory\nin two lines")
        estimates = torch.stack([mixture_BT.clamp(min=-0.1), mixture_BT.clamp(max=0.1)], 1)
        return estimates * {1: torch.nan, 2: 0.0}.get(kind, 1.0)


def mixture(number: int) -> Mixture:
    waves = voices({6: 290, 8: 500}.get(number, 2 * LENGTH), seed=number)
    waves[:, 0] = 0
    if number == 1:
        waves[1, :LENGTH] = 0  # a pause, which is silence when cut
    if number in (2, 3, 4):
        waves[0, 0] = (1 - number) / 10
    members = {"s1": waves[0], "s2": waves[1]}
    return Mixture(f"m{number}", ("a", "b"), RATE, lambda: members)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three sound mixtures and nine without a score, in two shards, of which one is lost."""
    url = str(tmp_path_factory.mktemp("unscored") / "data")
    parts = ([mixture(i) for i in range(10)], [mixture(10), mixture(11)])
    infos = [
        write_shard(part, url, shards.shard_name("toy", "test", number))
        for number, part in enumerate(parts)
    ]
    shards.write_manifest(url, "toy", "test", RATE, infos)
    damage(url, "m9")
    (Path(url) / infos[1].name).unlink()
    return url


@pytest.fixture
def evaluate(
    data: str, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    export = Export(Picky().eval(), RATE, {}, "x")
    for module, name in ((scoring, "load_export"), (evaluation, "load_separator")):
        monkeypatch.setattr(module, name, lambda _: export)

    def run(**changes: Any) -> dict[str, Any]:
        values = {"model": "x", "data": data, "output": str(tmp_path / "out"), "num_workers": 0}
        values |= {"max_seconds": LENGTH / RATE, "num_listening": 0, "max_unscored": -1}
        return evaluation.evaluate(EvaluateConfig(**(values | changes)), console)

    return run


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "utterances.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_scores_of_the_others_are_those_of_each_alone_and_means_are_theirs(
    evaluate, data: str, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening: list[str] = []

    def listen(url: str, *_: Any) -> list[Any]:
        listening.append(url[-1])
        return []

    monkeypatch.setattr(evaluation, "write_listening", listen)
    results = evaluate(num_listening=2)
    dataset, alone = Dataset(data, num_sources=2), {}
    for number in (0, 5, 7):
        batch = dataset.full(number, LENGTH / RATE)
        alone[f"m{number}"] = evaluation.score_utterance(Picky()(batch.mixture)[0], batch, RATE)
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert [*rows] == [f"m{number}" for number in range(12)]
    for name in GOOD:
        assert rows[name]["reason"] == ""
        assert float(rows[name]["si_snri"]) == pytest.approx(alone[name]["si_snri"], abs=1e-4)
    for name, reason in REASONS.items():
        assert reason in rows[name]["reason"] and "\n" not in rows[name]["reason"]
        assert {value for key, value in rows[name].items() if key not in ("id", "reason")} == {""}
    wanted = np.mean([score["sdri"] for score in alone.values()])
    assert results["metrics_db"]["sdri"]["mean"] == pytest.approx(wanted, abs=1e-9)
    assert (results["num_utterances"], results["num_unscored"]) == (3, 9)
    assert [one["id"] for one in results["unscored"]] == [*REASONS]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert listening == ["0", "5"]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 of 12 utterances" in shown and "9 have no score" in shown
    assert "the first: m1: source 2 is silent" in shown


@pytest.mark.parametrize(("allowed", "fails"), [(0, True), (1, True), (2, False), (-1, False)])
def test_more_utterances_without_a_score_than_allowed_are_an_error_after_all_is_written(
    tmp_path: Path, console: Console, allowed: int, fails: bool
) -> None:
    cfg = EvaluateConfig("x", "x", str(tmp_path), max_unscored=allowed)
    results = {"unscored": [{"id": name, "reason": f"{name} is silent"} for name in "ab"]}
    try:
        scoring.write_results(console, cfg, {"x.png": b"x"}, results)
    except EvaluationError as error:
        assert fails and "2 have no score" in str(error) and "max_unscored=2" in str(error)
    else:
        assert not fails
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "x.png").read_bytes() == b"x"
    assert "the first: a is silent" in console.file.getvalue()  # type: ignore[attr-defined]


def test_no_score_at_all_is_an_error_with_a_table_of_reasons(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Picky, "min_length", 10_000)
    with pytest.raises(EvaluationError, match=r"none of 2 .*m0: 2000 samples are fewer than"):
        evaluate(num_mixtures=2)
    assert ["fewer" in row["reason"] for row in rows_of(tmp_path / "out")] == [True, True]
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, AssertionError("a bug"), SystemExit(143)])
def test_what_is_scored_is_kept_when_the_work_is_stopped(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console, stop
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("of an earlier evaluation")
    score = evaluation.score_utterance

    def stopping(estimates_ST: Tensor, batch: Any, *rest: Any) -> Any:
        if batch.ids[0] == "m7":
            raise stop
        return score(estimates_ST, batch, *rest)

    monkeypatch.setattr(evaluation, "score_utterance", stopping)
    with pytest.raises(type(stop) if isinstance(stop, BaseException) else stop):
        evaluate()
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [f"m{i}" for i in range(7)]
    assert rows_of(tmp_path / "out")[5]["si_snri"] != ""
    assert not (tmp_path / "out" / "results.json").exists()
    assert "7 of 12 were done" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_full_or_absent_storage_ends_the_work_and_is_no_fault_of_an_utterance(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise storage.StorageError("cannot read s3://b/x: it gave no answer")

    monkeypatch.setattr(scoring, "separate_batch", away)
    with pytest.raises(storage.StorageError, match="no answer"):
        evaluate()
    assert not (tmp_path / "out").exists()


def test_the_table_is_written_while_the_work_goes_on(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SAVE_SECONDS", -1.0)
    lengths = []
    separate = scoring.separate_batch

    def counting(*given: Any) -> Tensor:
        path = tmp_path / "out" / "utterances.csv"
        lengths.append(len(rows_of(tmp_path / "out")) if path.exists() else 0)
        return separate(*given)

    monkeypatch.setattr(scoring, "separate_batch", counting)
    evaluate(num_mixtures=4)
    assert lengths == [0, 1, 2, 3]


def test_the_program_names_the_option_and_ctrl_c_has_status_130(
    evaluate, data: str, tmp_path: Path, run_verb, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"data={data}", f"output={tmp_path / 'out'}", "model=x", "num_workers=0"]
    words += [f"max_seconds={LENGTH / RATE}", "num_listening=0"]
    assert run_verb(program, *words) == 1
    assert "error: 9 have no score" in (shown := capsys.readouterr().err)
    assert "Traceback" not in shown
    assert run_verb(program, *words, "max_unscored=9") == 0

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "score_utterance", stop)
    assert run_verb(program, *words) == 130
    assert "Traceback" not in capsys.readouterr().err
