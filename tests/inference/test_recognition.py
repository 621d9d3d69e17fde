"""Word error rates of words that are tones, for which errors can be counted by hand."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

import sepdist
from sepdist import audio
from sepdist.cli import recognise as program
from sepdist.config import ConfigError, RecogniseConfig
from sepdist.inference import recognition
from sepdist.inference.scoring import EvaluationError
from tests.corpora.conftest import RATE
from tests.support.exports import write_export
from tests.support.libricss import meeting_name, write_meeting

LOW = {"ONE": 500, "TWO": 700, "THREE": 900, "FOUR": 1100}
HIGH = {"RED": 2200, "BLUE": 2600}
WORD_SECONDS = 0.1
BAND_SPLIT = {"_target_": "tests.inference.test_recognition.BandSplit"}


def speak(text: str, level: float = 0.2) -> np.ndarray:
    """Every word a tone of 0.1 s at 16 kHz; a dash is silence."""
    time = np.arange(int(WORD_SECONDS * RATE)) / RATE
    window = level * np.hanning(time.size)
    tones = [np.sin(2 * np.pi * (LOW | HIGH).get(word, 0) * time) * window for word in text.split()]
    return np.concatenate(tones).astype(np.float32)


class ToneReader:
    """A stand-in recogniser: the word of the strongest frequency in each audible 0.1 s."""

    def __init__(self, folder: str, device: str) -> None:
        assert device == "cpu"

    def __call__(self, wave_T: np.ndarray, sample_rate: int) -> str:
        assert wave_T.dtype == np.float32 and wave_T.ndim == 1
        table, size, found = LOW | HIGH, int(WORD_SECONDS * sample_rate), []
        for frame in wave_T[: wave_T.size // size * size].reshape(-1, size):
            if np.abs(frame).max() > 0.02:
                strongest = np.abs(np.fft.rfft(frame)).argmax() / WORD_SECONDS
                found.append(min(table, key=lambda word: abs(table[word] - strongest)))
        return " ".join(found).lower()


class BandSplit(nn.Module):
    """A stand-in separator: one speaker below 1600 Hz, the other above, at inaudible levels."""

    def __init__(self, min_length: int = 100) -> None:
        super().__init__()
        self.min_length = min_length

    def forward(self, mixture_BT: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(mixture_BT)
        low = torch.fft.rfftfreq(mixture_BT.shape[1], 1 / 8000) < 1600
        waves = [torch.fft.irfft(spectrum * band, mixture_BT.shape[1]) for band in (low, ~low)]
        return torch.stack([1e-4 * waves[0], 50 * waves[1]], 1)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LibriCSS of tones in two conditions and the export of the stand-in separator."""
    monkeypatch.setenv("SEPDIST_PLUGINS", "tests")
    root = tmp_path / "libricss"
    loud = speak("- - - - - - - - - RED", 0.6)
    quiet = speak("- - - - BLUE", 0.05)
    ten = {
        0: ("ONE TWO THREE FOUR ONE TWO THREE FOUR ONE TWO", loud),  # the last word is talked over
        1: ("FOUR FOUR THREE THREE TWO", quiet),  # too quiet to do harm
    }
    forty = {
        0: ("ONE TWO THREE FOUR ONE", speak("- - - BLUE RED", 0.6)),
        3: ("ONE RED TWO", speak("- - -")),  # RED: in the wrong band
    }
    for condition, meeting, spoken in (
        ("OV10", meeting_name(10, 0), ten),
        ("OV40", meeting_name(40, 1), forty),
    ):
        texts = {number: (text, speak(text) + other) for number, (text, other) in spoken.items()}
        write_meeting(root, condition, meeting, texts)
    export(tmp_path / "split", BAND_SPLIT)
    return tmp_path


def export(folder: Path, node: dict[str, object]) -> None:
    folder.mkdir()
    safetensors.torch.save_file({}, str(folder / "model.safetensors"))
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": node, "sample_rate": 8000}))
    (folder / "lineage.json").write_text(json.dumps({"run": "split", "step": 3}))


def options(work: Path, **changes: object) -> RecogniseConfig:
    values = {
        "model": str(work / "split"),
        "corpus": {"_target_": "sepdist.corpora.libricss.LibriCss", "root": str(work / "libricss")},
        "conditions": ["OV10", "OV40"],
        "recogniser": {"_target_": "tests.inference.test_recognition.ToneReader", "folder": "none"},
        "output": str(work / "out"),
        "num_workers": 0,
    }
    return RecogniseConfig(**(values | changes))


def test_rates_are_those_counted_by_hand(work: Path, console: Console) -> None:
    results = recognition.recognise(options(work), console)
    # OV10: one error in 10 words, none in 5; separated, none. OV40: two in 5, none in 3; separated,
    # none, and one in 3, as RED goes to the other output, which lacks the other two words.
    assert results["wer"] == {
        "OV10": {"mixture": pytest.approx(100 / 15), "separated": 0.0},
        "OV40": {"mixture": pytest.approx(25.0), "separated": pytest.approx(12.5)},
    }
    counts = {"utterances": 2, "words": 8, "mixture_errors": 2, "separated_errors": 1}
    assert results["counts"]["OV40"] == counts
    assert json.loads((work / "out" / "results.json").read_text()) == results
    assert results["model"]["lineage"] == {"run": "split", "step": 3}
    assert results["recogniser"]["folder"] == "none" and results["versions"]["jiwer"]
    rows = list(csv.DictReader((work / "out" / "utterances.csv").open()))
    assert [row["condition"] for row in rows] == ["OV10", "OV10", "OV40", "OV40"]
    assert rows[2]["mixture"] == "one two three blue red" and rows[2]["output_2"] == "blue red"
    last = rows[3]
    texts = [last[name] for name in ("reference", "output_1", "output_2")]
    assert texts == ["ONE RED TWO", "one two", "red"]
    assert [last[f"output_{i}_errors"] for i in (1, 2)] == ["1", "2"]
    assert last["id"] == "overlap_ratio_40p0_sil0p1_1p0_session1_actual40p1_utterance_3"
    assert float(last["length_seconds"]) == pytest.approx(0.3)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ToneReader" in shown and "25.0" in shown and "12.5" in shown and "separated" in shown


def test_the_rate_of_a_table_of_files_is_that_of_the_files(work: Path, console: Console) -> None:
    waves = speak("ONE TWO"), speak("RED BLUE", 0.05)
    for name, rate in (("fits", 8000), ("not", RATE)):
        for member, wave in zip(("s1", "s2"), waves, strict=True):
            soundfile.write(work / f"{name}_{member}.wav", audio.resample(wave, RATE, rate), rate)
        line = f"{name}_s1.wav,{name}_s2.wav,ONE TWO,RED BLUE"
        (work / f"{name}.csv").write_text(f"s1,s2,s1_text,s2_text\n{line}\n")
    table = {"_target_": "sepdist.corpora.tables.Table", "layout": "csv", "root": str(work)}
    fits = options(work, corpus=table | {"table": str(work / "fits.csv")}, conditions=["all"])
    assert recognition.recognise(fits, console)["counts"]["all"]["words"] == 2
    other = options(work, corpus=table | {"table": str(work / "not.csv")}, conditions=["all"])
    with pytest.raises(ConfigError, match=r"the corpus at 16000 Hz: pass corpus\.sample_rate=8000"):
        recognition.recognise(other, console)


def test_without_a_model_the_mixtures_alone_are_recognised_up_to_a_limit(
    work: Path, console: Console
) -> None:
    results = recognition.recognise(options(work, model=None, limit=1), console)
    assert results["wer"] == {
        "OV10": {"mixture": pytest.approx(10.0)},
        "OV40": {"mixture": pytest.approx(40.0)},
    }
    assert results["model"] is None
    assert "output_1" not in (work / "out" / "utterances.csv").read_text()


def test_an_estimate_gets_the_level_of_the_mixture_unless_it_would_clip() -> None:
    mixture = np.array([0.1, -0.1, 0.1, -0.1], dtype=np.float32)
    levelled = audio.at_level_of(mixture, np.float32([3, 3, -3, -3]))
    np.testing.assert_allclose(levelled, [0.1, 0.1, -0.1, -0.1])
    loud = np.full(100, 0.5, dtype=np.float32)
    spike = np.zeros(100, dtype=np.float32)
    spike[7] = -2.0  # RMS 0.5 would need a peak of 5
    np.testing.assert_allclose(audio.at_level_of(loud, spike), spike / 2)
    np.testing.assert_array_equal(audio.at_level_of(loud, 0 * spike), 0 * spike)


@pytest.mark.xdist_group("ray")
def test_two_ray_tasks_recognise_what_this_process_recognises(
    work: Path, console: Console, monkeypatch
) -> None:
    from tests.support.recognisers import save_tiny

    save_tiny(work / "ctc")
    write_export(work / "ctn", 8000)
    monkeypatch.setenv("PYTHONPATH", str(Path(sepdist.__file__).parent.parent))
    monkeypatch.chdir(work)  # relative paths, as people write them
    ctc = "sepdist.recognisers.transformers_ctc.TransformersCtc"
    settings = {
        "model": "ctn",
        "corpus": {"_target_": "sepdist.corpora.libricss.LibriCss", "root": "libricss"},
        "recogniser": {"_target_": ctc, "folder": "ctc"},
    }
    alone, spread = (
        recognition.recognise(options(work, output=name, num_workers=num, **settings), console)
        for name, num in (("alone", 0), ("spread", 2))
    )
    assert Path("alone/utterances.csv").read_bytes() == Path("spread/utterances.csv").read_bytes()
    assert alone.pop("run") != spread.pop("run")
    assert alone == spread
    rows = list(csv.DictReader(io.StringIO(Path("alone/utterances.csv").read_text())))
    assert all(row[name] for row in rows for name in ("mixture", "output_1", "output_2"))


def test_what_does_not_fit_is_refused_before_anything_is_recognised(
    work: Path, console: Console
) -> None:
    def message(error: type[Exception] = ConfigError, **changes: object) -> str:
        with pytest.raises(error) as caught:
            recognition.recognise(options(work, **changes), console)
        assert not (work / "out").exists()
        return str(caught.value)

    corpus = options(work).corpus
    assert "corpus.sample_rate=8000" in message(corpus=corpus | {"sample_rate": 16000})
    assert "OV20" in message(ValueError, conditions=["OV20"])
    assert "each once" in message(conditions=["OV10", "OV10"])
    assert "at least one" in message(conditions=[])
    speech = {"_target_": "sepdist.corpora.librispeech.LibriSpeech", "root": str(work / "libricss")}
    assert "no such folder" in message(ValueError, corpus=speech, conditions=["test"])


def test_what_cannot_be_recognised_is_in_no_rate_and_named(work: Path, console: Console) -> None:
    root = work / "libricss"
    texts = {0: "ONE TWO THREE FOUR ONE", 1: "...", 2: "ONE", 3: "TWO TWO"}
    meeting = meeting_name(20, 2)
    spoken = {i: (text, speak("RED RED" if text == "..." else text)) for i, text in texts.items()}
    write_meeting(root, "OV20", meeting, spoken)
    [broken] = (root / "OV20").rglob("utterance_3.wav")
    broken.write_bytes(broken.read_bytes()[:3000])
    export(work / "long", BAND_SPLIT | {"min_length": 1000})
    changes = {"conditions": ["OV10", "OV20"], "model": str(work / "long")}
    with pytest.raises(EvaluationError, match=r"3 have no score.*max_unscored=3"):
        recognition.recognise(options(work, **changes), console)
    results = json.loads((work / "out" / "results.json").read_text())
    assert results["counts"]["OV20"]["utterances"] == 1
    assert results["wer"]["OV20"] == {"mixture": 0.0, "separated": 0.0}
    reasons = [one["reason"] for one in results["unscored"]]
    for reason, wanted in zip(
        reasons, ("no words", "800 samples are fewer", "cut short"), strict=True
    ):
        assert wanted in reason
    rows = list(csv.DictReader((work / "out" / "utterances.csv").open()))
    assert [row["condition"] for row in rows] == ["OV10"] * 2 + ["OV20"] * 4
    assert [bool(row["reason"]) for row in rows] == [False] * 3 + [True] * 3
    assert rows[4]["mixture_errors"] == rows[4]["reference"] == "" and rows[4]["id"]
    assert "not recognised" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_condition_without_anything_recognised_has_no_rate(work: Path, console: Console) -> None:
    export(work / "long", BAND_SPLIT | {"min_length": 5000})
    changes = {"conditions": ["OV10", "OV40"], "model": str(work / "long"), "max_unscored": -1}
    results = recognition.recognise(options(work, **changes), console)
    assert results["wer"]["OV40"] == {"mixture": None, "separated": None}
    assert results["num_unscored"] == 3 and results["wer"]["OV10"]["separated"] == 0.0
    assert "none" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_mixture_is_the_sum_of_its_members_and_estimates_with_nan_are_refused(
    work: Path,
) -> None:
    wave, cpu = speak("ONE TWO")[::2], torch.device("cpu")
    waves = {"s1": 0.5 * wave, "s2": 0.3 * wave, "noise": 0.1 * wave}
    record = recognition.Mixture("m7", ("a", "b"), 8000, lambda: waves, ("ONE", ""))
    found: list[np.ndarray] = []

    def recogniser(wave_T: np.ndarray, rate: int) -> str:
        found.append(wave_T)
        return "one"

    recognition.recognise_one("test", record, recogniser, None, cpu)
    np.testing.assert_allclose(found[0], 0.9 * wave, atol=1e-7)

    class Broken(nn.Module):
        def forward(self, mixture_BT: Tensor) -> Tensor:
            return torch.full_like(mixture_BT, torch.nan)[:, None]

    with pytest.raises(EvaluationError, match="m7: the model's estimates hold NaN"):
        recognition.recognise_one("test", record, ToneReader("none", "cpu"), Broken(), cpu)


def test_mixtures_without_a_transcript_are_refused_by_name() -> None:
    class Silent:
        name = "silent"

        def records(self, split: str) -> list[object]:
            return [] if split == "none" else [recognition.Mixture("m7", (), 8000, dict, ("",))]

    cfg = RecogniseConfig(conditions=["test"])
    with pytest.raises(ConfigError, match="m7: needs a mixture with a transcript"):
        recognition.plan(cfg, Silent())
    cfg.conditions = ["none"]
    with pytest.raises(ConfigError, match="no utterances in condition 'none'"):
        recognition.plan(cfg, Silent())


def test_the_program_runs_and_names_what_is_missing(
    work: Path, run_verb, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [f"model={work / 'split'}", f"output={work / 'program'}", "num_workers=0"]
    fixed += ["corpus=libricss", "conditions=[OV40]"]
    fixed += ["recogniser._target_=tests.inference.test_recognition.ToneReader"]
    assert run_verb(program, *fixed, f"corpus.root={work / 'libricss'}") == 0
    results = json.loads((work / "program" / "results.json").read_text())
    assert results["wer"]["OV40"]["separated"] == 12.5
    assert run_verb(program, "--help") == 0
    assert "recogniser=transformers_ctc" in capsys.readouterr().out
    assert run_verb(program, *fixed, "limits=3") == 1
    assert "limits" in capsys.readouterr().err
    assert run_verb(program, *fixed) == 1
    assert "corpus.root" in capsys.readouterr().err
    assert run_verb(program, *fixed, f"corpus.root={work / 'nowhere'}") == 1
    assert str(work / "nowhere") in capsys.readouterr().err.replace("\n", "")
