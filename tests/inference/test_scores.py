"""`sepdist evaluate` beyond its defaults: more scores, other systems' files, several data sets."""

import csv
import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.signal
import soundfile
import torch
import yaml
from rich.console import Console

from sepdist import slots
from sepdist.cli import compare as compare_program
from sepdist.cli import separate as separate_program
from sepdist.config import CompareConfig, ConfigError, EvaluateConfig
from sepdist.data import shards
from sepdist.data.members import DataError
from sepdist.data.records import Mixture
from sepdist.inference import evaluation
from sepdist.inference.comparison import compare
from sepdist.inference.evaluation import score_utterance
from sepdist.inference.foreign import find_estimates
from sepdist.inference.listening import write_listening_page
from sepdist.inference.scoring import EvaluationError
from tests.support.exports import MODEL, RATE, batch_of, oracle_si_snr, voices, write_export
from tests.support.shard_sets import write_shard

IDS = [f"m{number}" for number in range(6)]


def members(number: int) -> dict[str, np.ndarray]:
    """Speech-like sources; the last mixture lasts 0.25 s, too short for STOI."""
    random, length = np.random.default_rng(number), 2000 if number == 5 else 5000 + 100 * number
    waves = scipy.signal.lfilter([1], [1, -1.6, 0.8], random.standard_normal((2, length)))
    waves *= np.sin(np.arange(length) / 700 + np.array([[0], [2]])) > -0.3
    return dict(zip(("s1", "s2"), (0.02 * waves).astype(np.float32), strict=True))


def data_set(url: Path, ids: list[str]) -> None:
    records = [
        Mixture(one, (f"a{one[1:]}", "b"), RATE, lambda number=int(one[1:]): members(number))
        for one in ids
    ]
    name = shards.shard_name("toy", url.name, 0)
    shards.write_manifest(str(url), "toy", url.name, RATE, [write_shard(records, str(url), name)])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, a model, and files of another system's estimates in the other order."""
    folder = tmp_path_factory.mktemp("scores")
    for name, ids in (("test", IDS), ("dev", IDS[:3])):
        data_set(folder / "data" / name, ids)
    write_export(folder / "model")
    for one in IDS:
        waves = members(int(one[1:]))
        for number, name in enumerate(("s2", "s1")):
            other = waves["s1" if name == "s2" else "s2"]
            path = folder / "theirs" / f"est{number}" / f"{one}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, waves[name] + 0.1 * other, RATE, subtype="FLOAT")
    return folder


def options(work: Path, output: str, **changes: Any) -> EvaluateConfig:
    values = {"data": str(work / "data" / "test"), "output": str(work / output)}
    values |= {"cache_dir": str(work / "cache"), "num_workers": 0, "num_listening": 0}
    model = {} if "estimates" in changes else {"model": str(work / "model")}
    return EvaluateConfig(**(values | model | changes))


def theirs(work: Path, output: str, **changes: Any) -> EvaluateConfig:
    return options(work, output, **({"estimates": str(work / "theirs")} | changes))


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "utterances.csv", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_files_of_another_system_are_scored_with_the_permutation_solved_and_the_rest_is_counted(
    work: Path, console: Console
) -> None:
    pytest.importorskip("pystoi")
    pytest.importorskip("pesq")
    soundfile.write(work / "theirs" / "est0" / "stranger.wav", np.ones(100), RATE)
    metrics = ["si_snri", "sdri", "sir", "sar", "stoi", "estoi", "pesq"]
    cfg = theirs(work, "all", metrics=metrics, max_unscored=1)
    results = evaluation.evaluate(cfg, console)
    rows = rows_of(work / "all")
    assert [*rows] == IDS
    waves = members(2)
    expected = [
        oracle_si_snr(waves[a] + 0.1 * waves[b], waves[a]) for a, b in (("s1", "s2"), ("s2", "s1"))
    ]
    assert float(rows["m2"]["si_snr"]) == pytest.approx(np.mean(expected), abs=1e-3)
    assert rows["m2"]["permutation"] == "2 1"
    scores = results["metrics_db"]
    assert 15 < scores["sir"]["mean"] < 25 and scores["sar"]["mean"] > 60  # only the other voice
    assert 0.9 < results["metrics"]["stoi"]["mean"] <= 1 > results["metrics"]["estoi"]["mean"]
    assert results["metrics"]["pesq"]["mean"] > results["metrics"]["pesq_mixture"]["mean"]
    # STOI of the short one is missing: in no mean, counted and named.
    assert rows["m5"]["stoi"] == "nan" and "STOI: fewer than 30 frames" in rows["m5"]["incomplete"]
    known = [float(row["stoi"]) for row in rows.values() if row["id"] != "m5"]
    assert results["metrics"]["stoi"]["mean"] == pytest.approx(np.mean(known), abs=1e-3)
    assert [one["id"] for one in results["incomplete"]] == ["m5"]
    assert results["model"] == {"url": str(work / "theirs"), "unused": ["stranger"]}
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        "1 names are no mixture's" in shown
        and "1 lack some of their scores" in shown
        and "PESQ" in shown
    )
    with pytest.raises(EvaluationError, match=r"1 lack some of their scores.*max_unscored=1"):
        evaluation.evaluate(theirs(work, "x", metrics=["stoi"]), console)


def test_names_with_a_suffix_are_as_good_and_what_does_not_fit_is_named(
    work: Path, tmp_path: Path, console: Console
) -> None:
    def put(name: str, wave: np.ndarray, rate: int = RATE) -> None:
        soundfile.write(tmp_path / name, wave, rate, subtype="FLOAT")

    for one in IDS:
        waves = members(int(one[1:]))
        put(f"{one}_s1.wav", waves["s1"])
        put(f"{one}_s2.wav", waves["s2"] + 0.1 * waves["s1"])
    (tmp_path / "m1_s2.wav").unlink()
    put("m2_s1.wav", members(2)["s1"][:-9])
    put("m3_s1.wav", members(3)["s1"], 16000)
    put("m4_s1.wav", np.stack([members(4)["s1"]] * 2, 1))
    cfg = theirs(work, "suffix", estimates=str(tmp_path), max_unscored=-1)
    evaluation.evaluate(cfg, console)
    rows = rows_of(work / "suffix")
    assert [one for one in IDS if not rows[one]["reason"]] == ["m0", "m5"]
    assert "1 of 2 estimates" in rows["m1"]["reason"]
    assert "5191 samples, not 8000 Hz, 1 channel(s), 5200" in rows["m2"]["reason"]
    assert "m3_s1.wav has 16000 Hz" in rows["m3"]["reason"]
    assert "2 channel(s)" in rows["m4"]["reason"]


def test_files_have_the_ids_that_a_corpus_makes_of_the_names_of_their_mixtures(
    tmp_path: Path,
) -> None:
    names = ["talk_a/s1/x.wav", "talk_a/s2/x.wav", "01t_0.5_02b_-0.5_est1.flac", "spk0/y.z.wav"]
    names += ["item1_source1hat.wav", "item1_source2hat.wav", "plain.wav"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, np.ones(9), RATE)
    found = {id_: len(paths) for id_, paths in find_estimates(str(tmp_path)).items()}
    assert found == {"01t_0p5_02b_-0p5": 1, "item1": 2, "plain": 1, "talk_a-x": 2, "ypz": 1}


def test_a_folder_of_other_names_or_a_model_beside_it_is_refused(
    work: Path, tmp_path: Path, console: Console
) -> None:
    soundfile.write(tmp_path / "talk_est1.wav", np.ones(100), RATE)
    with pytest.raises(EvaluationError, match="none of 6 has a score: m0: 0 of 2 estimates"):
        evaluation.evaluate(theirs(work, "x", estimates=str(tmp_path)), console)
    assert "1 names are" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="give one of them"):
        evaluation.evaluate(theirs(work, "x", model="runs/a"), console)
    with pytest.raises(ConfigError, match="metrics: no 'snr'; there are si_snri, sdri"):
        evaluation.evaluate(theirs(work, "x", metrics=["snr"]), console)


def test_a_data_set_without_sources_is_refused(
    work: Path, tmp_path: Path, console: Console
) -> None:
    record = Mixture("m0", (), RATE, lambda: {"mix": members(0)["s1"]})
    name = shards.shard_name("toy", "real", 0)
    info = write_shard([record], str(tmp_path / "real"), name)
    shards.write_manifest(str(tmp_path / "real"), "toy", "real", RATE, [info])
    with pytest.raises(ConfigError, match="mixtures only"):
        evaluation.evaluate(theirs(work, "x", data=str(tmp_path / "real")), console)


def test_a_model_that_chooses_its_outputs_has_the_oracle_beside_it(
    work: Path, tmp_path: Path, console: Console
) -> None:
    torch.manual_seed(1)
    model = MODEL | {"num_speakers": 4}
    (tmp_path / "four").mkdir()
    weights = slots.build("model", model).state_dict()
    safetensors.torch.save_file(weights, str(tmp_path / "four" / "model.safetensors"))
    card = {"model": model, "sample_rate": RATE, "num_loudest": 2}
    (tmp_path / "four" / "model.yaml").write_text(yaml.safe_dump(card))
    (tmp_path / "four" / "lineage.json").write_text("{}")
    cfg = options(work, "oracle", model=str(tmp_path / "four"))
    results = evaluation.evaluate(cfg, console)
    found = results["metrics_db"]["si_snri"]
    assert found["oracle"] >= found["mean"] and "oracle" in results["metrics_db"]["sdri"]
    assert "oracle" not in results["metrics_db"]["si_snr_mixture"]
    assert "oracle" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_oracle_is_the_best_of_all_choices_of_outputs() -> None:
    sources, noise = voices(), voices(seed=3, num=4)
    outputs = np.stack(
        [sources[1] + 0.2 * noise[0], 5 * noise[1], sources[0] + 0.3 * noise[2], 4 * noise[3]]
    )
    row = score_utterance(
        torch.from_numpy(outputs[[1, 3]]),
        batch_of(sources),
        RATE,
        outputs_MT=torch.from_numpy(outputs),
    )
    best = [oracle_si_snr(outputs[i], source) for i, source in ((2, sources[0]), (0, sources[1]))]
    assert row["si_snr_oracle"] == pytest.approx(np.mean(best), abs=1e-3)
    assert row["si_snr"] < -10


def test_several_data_sets_are_scored_in_one_call_with_one_table(
    work: Path, console: Console
) -> None:
    data = f"[{work / 'data' / 'test'},{work / 'data' / 'dev'}]"
    results = evaluation.evaluate(options(work, "both", data=data, metrics=["si_snri"]), console)
    assert [*results["data_sets"]] == ["data-test", "data-dev"]
    assert json.loads((work / "both" / "results.json").read_text()) == results
    alone = evaluation.evaluate(options(work, "alone", metrics=["si_snri"]), console)
    assert results["data_sets"]["data-test"]["metrics_db"] == alone["metrics_db"]
    assert "sdr" not in alone["metrics_db"]
    mean = alone["metrics_db"]["si_snri"]["mean"]
    low, high = alone["metrics_db"]["si_snri"]["interval"]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{mean:.2f} ({low:.2f} to {high:.2f})" in shown and "data-dev" in shown
    assert low < mean < high and alone["intervals"]["num_speakers"] == 7
    with pytest.raises(DataError, match="nowhere"):
        evaluation.evaluate(options(work, "x", data=f"[{work / 'data' / 'test'},nowhere]"), console)
    assert not (work / "x" / "data-test").exists()  # nothing was scored
    with pytest.raises(ConfigError, match="two data sets"):
        evaluation.evaluate(options(work, "x", data=f"[{data[1:-1]},{work}/data/dev]"), console)


def test_two_evaluations_are_compared_on_what_both_scored(
    work: Path, console: Console, run_verb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(work / name) for name in ("model-scores", "their-scores"))
    evaluation.evaluate(options(work, "model-scores", metrics=["si_snri"]), console)
    evaluation.evaluate(theirs(work, "their-scores", metrics=["si_snri", "sdri"]), console)
    results = compare(CompareConfig(a, b, str(work / "compared")), console)
    assert json.loads((work / "compared" / "comparison.json").read_text()) == results
    assert [*results["differences"]] == ["si_snr", "si_snri"] and results["num_utterances"] == 6
    rows = [rows_of(Path(one)) for one in (a, b)]
    gains = [float(rows[1][one]["si_snri"]) - float(rows[0][one]["si_snri"]) for one in IDS]
    found = results["differences"]["si_snri"]
    assert found["mean"] == pytest.approx(np.mean(gains), abs=1e-9)
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    assert 0 < found["p"] < 0.2  # seven speakers, of whom one is in all mixtures
    back = compare(CompareConfig(b, a), console)["differences"]["si_snri"]
    assert back["mean"] == -found["mean"] and back["p"] == found["p"]
    evaluation.evaluate(theirs(work, "cut", max_seconds=0.25), console)
    assert run_verb(compare_program, f"a={a}", f"b={work / 'cut'}") == 1
    assert "max_seconds was 0.0, is 0.25" in capsys.readouterr().err.replace("\n", " ")
    assert run_verb(compare_program, f"a={a}", f"b={work / 'nowhere'}") == 1
    assert "nowhere holds no evaluation" in capsys.readouterr().err.replace("\n", " ")


def test_runs_of_several_seeds_are_compared_in_pairs(
    work: Path, console: Console, run_verb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name, make in (("x0", options), ("x1", theirs), ("y0", theirs), ("y1", options)):
        evaluation.evaluate(make(work, name, metrics=["si_snri"]), console)
        folders.append(work / name)
    a, b = f"[{folders[0]},{folders[1]}]", f"[{folders[2]},{folders[3]}]"
    found = compare(CompareConfig(a, b), console)["differences"]["si_snri"]
    [gain] = {
        round(compare(CompareConfig(*pair), console)["differences"]["si_snri"]["mean"], 9)
        for pair in ((str(folders[0]), str(folders[2])), (str(folders[3]), str(folders[1])))
    }
    assert found["seeds"] == pytest.approx([gain, -gain]) and found["mean"] == pytest.approx(0)
    half = 12.7062 * abs(gain)  # t of one degree of freedom; deviation of the mean of gain, -gain
    assert found["over_seeds"] == pytest.approx([-half, half], rel=1e-4)
    assert found["interval"][0] < 0 < found["interval"][1]
    assert run_verb(compare_program, f"a={a}", f"b={b}") == 0
    assert "2 seeds" in (shown := capsys.readouterr()).out + shown.err
    assert run_verb(compare_program, f"a={a}", f"b={folders[2]}") == 1
    assert "a has 2 evaluations, b 1: give pairs" in capsys.readouterr().err.replace("\n", " ")


class Links(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def sources(self, tag: str) -> list[str]:
        return [str(own["src"]) for name, own in self.tags if name == tag]


def test_the_listening_page_plays_what_lies_beside_it_and_shows_scores(
    work: Path, console: Console
) -> None:
    evaluation.evaluate(theirs(work, "heard", num_listening=2), console)
    folder = work / "heard" / "listening"
    text = (folder / "index.html").read_text()
    page = Links(text)
    players = page.sources("audio")
    assert players[:3] == ["./0/mixture.wav", "./0/source_1.wav", "./0/estimate_1.wav"]
    assert len(players) == 10 and all((folder / one).is_file() for one in players)
    pictures = page.sources("img")
    assert len(pictures) == 10 and all(one.startswith("data:image/png;base64,") for one in pictures)
    assert "SI-SNRi" in text and "<h2>m0</h2>" in text
    assert not page.sources("script") and "http" not in text


def test_names_on_the_page_are_escaped_and_stay_where_they_are(tmp_path: Path) -> None:
    name = '<script>alert(1)</script> & "a" # 100%?.wav'
    (tmp_path / "x:y").mkdir()
    track = (name, str(tmp_path / "x:y" / "a b#1.wav"), "<b>")
    write_listening_page(str(tmp_path / "page.html"), name, [(name, [track])])
    text = (tmp_path / "page.html").read_text()
    page = Links(text)
    assert page.sources("audio") == ["./x%3Ay/a%20b%231.wav"] and page.sources("img") == []
    assert "<script" not in text and text.count("&lt;script&gt;") == 4 and "&lt;b&gt;" in text


def test_separate_writes_a_page_of_recordings_and_voices(
    work: Path, tmp_path: Path, run_verb: Any
) -> None:
    soundfile.write(tmp_path / "talk é.wav", sum(members(0).values()), RATE)
    words = ["--model", str(work / "model"), "--output", str(tmp_path / "out"), "--page"]
    assert run_verb(separate_program, *words, str(tmp_path / "talk é.wav")) == 0
    page = Links((tmp_path / "out" / "listening.html").read_text())
    names = ["../talk%20%C3%A9.wav", "talk%20%C3%A9_s1.wav", "talk%20%C3%A9_s2.wav"]
    assert page.sources("audio") == [f"./{one}" for one in names]
    assert len(page.sources("img")) == 3
