"""Scores against independent oracles; the whole program, in this process and on Ray."""

import csv
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import soundfile
import torch
from rich.console import Console
from torch import nn

from sepdist.cli import evaluate as program
from sepdist.config import ConfigError, EvaluateConfig
from sepdist.data.records import Mixture
from sepdist.inference import evaluation, scoring
from sepdist.inference.evaluation import score_utterance
from sepdist.inference.scoring import EvaluationError
from tests.support.exports import RATE, batch_of, oracle_si_snr, voices, write_export
from tests.support.shard_sets import write_shard


def oracle_sdr(estimate: np.ndarray, source: np.ndarray, taps: int = 512) -> float:
    """BSS Eval's SDR by explicit least squares on the delayed copies of the source."""
    column = np.concatenate([source, np.zeros(taps - 1)]).astype(np.float64)
    delayed = scipy.linalg.toeplitz(column, np.zeros(taps))
    padded = np.concatenate([estimate, np.zeros(taps - 1)]).astype(np.float64)
    solution, *_ = np.linalg.lstsq(delayed, padded)
    target = delayed @ solution
    return 10 * np.log10(np.sum(target**2) / np.sum((padded - target) ** 2))


def test_scores_agree_with_oracles_and_the_permutation_is_solved() -> None:
    sources = voices()
    rest = voices(seed=1)
    estimates = np.stack(
        [3.0 * sources[1] + 0.4 * sources[0] + rest[0], -0.2 * sources[0] + 0.03 * rest[1]]
    )
    score = score_utterance(torch.from_numpy(estimates), batch_of(sources), RATE)
    mixture = sources.sum(0)
    assert score["permutation"] == "2 1"
    assert (score["id"], score["length_seconds"], score["speakers"]) == ("talk-7", 0.5, "anna+bert")
    by_source = [oracle_si_snr(estimates[1], sources[0]), oracle_si_snr(estimates[0], sources[1])]
    assert score["si_snr_by_source"] == pytest.approx(by_source, abs=1e-3)
    after = sum(by_source) / 2
    before = (oracle_si_snr(mixture, sources[0]) + oracle_si_snr(mixture, sources[1])) / 2
    assert score["si_snr"] == pytest.approx(after, abs=1e-3)
    assert score["si_snr_mixture"] == pytest.approx(before, abs=1e-3)
    assert score["si_snri"] == pytest.approx(after - before, abs=1e-3)
    after = (oracle_sdr(estimates[1], sources[0]) + oracle_sdr(estimates[0], sources[1])) / 2
    before = (oracle_sdr(mixture, sources[0]) + oracle_sdr(mixture, sources[1])) / 2
    assert score["sdr"] == pytest.approx(after, abs=1e-3)
    assert score["sdri"] == pytest.approx(after - before, abs=1e-3)


def test_enhancement_is_scored_with_one_source_and_noise() -> None:
    speech, noise = voices(num=1), voices(seed=2)[0]
    estimate = speech + 0.1 * noise
    score = score_utterance(torch.from_numpy(estimate), batch_of(speech, noise), RATE)
    assert score["permutation"] == "1"
    expected = oracle_si_snr(estimate[0], speech[0]) - oracle_si_snr(speech[0] + noise, speech[0])
    assert score["si_snri"] == pytest.approx(expected, abs=1e-3)
    assert 15 < score["sdri"] < 25


def test_the_level_of_an_estimate_does_not_count() -> None:
    sources = voices()
    estimates = torch.from_numpy(sources + 0.01 * voices(seed=1))
    loud = score_utterance(estimates, batch_of(sources), RATE)
    quiet = score_utterance(estimates * torch.tensor([[1e-6], [300.0]]), batch_of(sources), RATE)
    assert (quiet["si_snr"], quiet["sdr"]) == pytest.approx((loud["si_snr"], loud["sdr"]), abs=1e-3)


def test_the_mixture_itself_gains_nothing() -> None:
    sources = voices()
    batch = batch_of(sources)
    score = score_utterance(batch.mixture.repeat(2, 1), batch, RATE)
    assert score["si_snri"] == pytest.approx(0, abs=1e-6) and score["sdri"] == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e, s: e[1].fill(0), r"talk-7: estimate 2 is silent"),
        (lambda e, s: e[0].fill(0.25), r"talk-7: estimate 1 is silent"),
        (lambda e, s: e[0].__setitem__(9, np.nan), r"talk-7: estimate 1 holds NaN"),
        (lambda e, s: s[1].fill(0), r"talk-7: source 2 is silent"),
    ],
)
def test_what_has_no_score_is_an_error_naming_the_utterance(
    damage: Callable[[np.ndarray, np.ndarray], None], message: str
) -> None:
    sources = voices()
    estimates = sources + voices(seed=1)
    damage(estimates, sources)
    with pytest.raises(EvaluationError, match=message):
        score_utterance(torch.from_numpy(estimates), batch_of(sources), RATE)


def test_a_model_with_another_number_of_outputs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[3, 4000\].*num_sources"):
        score_utterance(torch.from_numpy(voices(num=3)), batch_of(voices()), RATE)


def test_a_mixture_too_short_for_the_model_is_named() -> None:
    model = nn.Identity()
    model.min_length = 5000
    with pytest.raises(EvaluationError, match=r"talk-7: 4000 samples.*5000"):
        scoring.separate_batch(model, batch_of(voices()), torch.device("cpu"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of seven mixtures in two shards and the export of an untrained model."""
    from sepdist.data import shards

    folder = tmp_path_factory.mktemp("evaluate")
    mixtures = []
    for number in range(7):
        waves = voices(4000 + 800 * number, seed=number, num=3)
        members = {"s1": waves[0], "s2": waves[1], "noise": 0.3 * waves[2]}
        speakers = (f"a{number}", f"b{number}")
        mixtures.append(Mixture(f"m{number}", speakers, RATE, lambda members=members: members))
    url = str(folder / "data")
    names = [shards.shard_name("toy", "test", number) for number in range(2)]
    halves = (mixtures[:4], mixtures[4:])
    infos = [write_shard(*one) for one in zip(halves, [url, url], names, strict=True)]
    shards.write_manifest(url, "toy", "test", RATE, infos)
    write_export(folder / "model", RATE)
    return folder


def options(work: Path, output: str, **changes: object) -> EvaluateConfig:
    places = {"model": "model", "data": "data", "output": output, "cache_dir": "cache"}
    values = {key: str(work / name) for key, name in places.items()} | {"num_workers": 0}
    return EvaluateConfig(**(values | changes))


def test_the_output_folder_holds_results_rows_pictures_and_sound(
    work: Path, console: Console
) -> None:
    results = evaluation.evaluate(options(work, "all", num_listening=2), console)
    output = work / "all"
    assert json.loads((output / "results.json").read_text()) == results
    rows = list(csv.DictReader((output / "utterances.csv").open()))
    assert [row["id"] for row in rows] == [f"m{number}" for number in range(7)]
    assert rows[2]["speakers"] == "a2+b2" and float(rows[2]["length_seconds"]) == pytest.approx(0.7)
    gains = [float(row["si_snri"]) for row in rows]
    measured = results["metrics_db"]["si_snri"]
    assert measured["mean"] == pytest.approx(np.mean(gains), abs=1e-3)
    assert measured["median"] == pytest.approx(sorted(gains)[3], abs=1e-3)
    assert measured["std"] == pytest.approx(np.std(gains, ddof=1), abs=1e-3)
    assert results["num_utterances"] == 7
    assert results["model"]["lineage"] == {"run": "toy", "step": 12}
    assert len(results["data"]["manifest_sha256"]) == 64
    assert results["versions"]["torch"] == metadata.version("torch")
    assert (output / "histogram.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (output / "listening").iterdir()) == [
        "0",
        "1",
        "index.html",
    ]
    wave, rate = soundfile.read(str(output / "listening" / "1" / "mixture.wav"))
    assert rate == RATE and len(wave) == 4800
    assert sorted(path.name for path in (output / "listening" / "1").iterdir()) == [
        *("estimate_1.wav", "estimate_2.wav", "mixture.wav"),
        *("source_1.wav", "source_2.wav"),
    ]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "SI-SNRi" in shown and "toy test: 7 utterances" in shown


@pytest.mark.xdist_group("ray")
def test_two_ray_tasks_give_the_rows_of_this_process(work: Path, console: Console) -> None:
    alone = evaluation.evaluate(options(work, "alone", num_listening=0), console)
    spread = evaluation.evaluate(options(work, "spread", num_listening=0, num_workers=2), console)
    first, second = (work / name / "utterances.csv" for name in ("alone", "spread"))
    assert first.read_bytes() == second.read_bytes()
    assert alone.pop("run") != spread.pop("run")
    assert alone == spread


def test_the_number_and_the_length_of_mixtures_can_be_limited(work: Path, console: Console) -> None:
    cfg = options(work, "few", num_mixtures=2, max_seconds=0.25, num_listening=0)
    results = evaluation.evaluate(cfg, console)
    assert results["num_utterances"] == 2
    assert results["hours"] * 3600 == pytest.approx(0.5)


def test_model_and_data_that_do_not_fit_are_refused_before_scoring(
    work: Path, console: Console
) -> None:
    write_export(work / "other_rate", 16000)
    with pytest.raises(ConfigError, match=r"16000 Hz.*8000 Hz"):
        evaluation.evaluate(options(work, "x", model=str(work / "other_rate")), console)
    with pytest.raises(ConfigError, match="noise=true"):
        evaluation.evaluate(options(work, "x", num_sources=1), console)
    assert not (work / "x").exists()


def test_the_program_composes_runs_and_names_what_is_missing(
    work: Path, run_verb, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["num_workers=0", "num_listening=0", "num_mixtures=1", f"cache_dir={work / 'cache'}"]
    fixed += [f"model={work / 'model'}", f"output={work / 'program'}"]
    assert run_verb(program, *fixed, f"data={work / 'data'}") == 0
    assert (work / "program" / "results.json").exists()
    assert run_verb(program, *fixed) == 1
    assert "data" in capsys.readouterr().err
    assert run_verb(program, *fixed, f"data={work / 'nowhere'}") == 1
    assert str(work / "nowhere") in capsys.readouterr().err.replace("\n", "")


def test_with_a_device_other_processes_score_and_give_the_rows_of_this_one(
    work: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [{"id": f"m{number}"} for number in range(7)]
    cfg = options(work, "one")
    alone = scoring.run_on_data_set(evaluation.scorer, cfg, range(7), names, console)

    def here(*_: object) -> None:
        raise AssertionError("scored in the process of the device")

    here.__module__, here.__qualname__ = evaluation.__name__, "score_utterance"  # as it is pickled
    monkeypatch.setattr(evaluation, "score_utterance", here)
    monkeypatch.setattr(scoring, "check_workers", lambda cfg: None)
    monkeypatch.setattr(scoring, "device_of", lambda cfg: torch.device("cpu"))
    monkeypatch.setattr(scoring, "NUM_SCORERS", 1)  # so that seven mixtures wait for each other
    cfg = options(work, "pool", use_gpu=True)
    assert scoring.run_on_data_set(evaluation.scorer, cfg, range(7), names, console) == alone
    first, second = (work / name / "utterances.csv" for name in ("one", "pool"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("use_gpu", [False, True])
def test_results_keep_their_order_and_failures_of_either_half_their_reasons(
    monkeypatch: pytest.MonkeyPatch, use_gpu: bool
) -> None:
    monkeypatch.setattr(scoring, "NUM_SCORERS", 1)
    threads = lambda number, *_: ThreadPoolExecutor(number)  # noqa: E731
    monkeypatch.setattr(scoring, "ProcessPoolExecutor", threads)
    halves = {
        "at once": lambda: 1,
        "no separation": lambda: torch.zeros(2) @ torch.zeros(3),
        "scored": lambda: partial(math.sqrt, 4.0),
        "no score": lambda: partial(math.sqrt, -1.0),
    }
    items = list(enumerate([*halves, *halves]))
    cfg = EvaluateConfig(use_gpu=use_gpu)
    found = list(scoring._run_partition(lambda _: lambda name: halves[name](), cfg, items))
    assert [number for number, _, _ in found] == list(range(8))
    assert [result for _, result, _ in found] == 2 * [1, None, 2.0, None]
    reasons = [reason for _, _, reason in found]
    assert reasons[:4] == reasons[4:]
    assert reasons[0] == reasons[2] == "" and "size" in reasons[1] and "domain" in reasons[3]
