"""The demo corpus: distinct voices, LibriMix's levels, disjoint splits, reproducible bytes."""

import ctypes
import hashlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import pytest

from sepdist.config import ConfigError
from sepdist.corpora import demo
from sepdist.corpora.demo import VOICES, DemoCorpus, Voice, pink, sentence, speak
from sepdist.data.records import Mixture
from sepdist.seeding import rng

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra `demo`"
)

ROOT = Path(__file__).parents[2]
RATE = 8000
LINE = "Seven candles were expected in the museum, but the sky became orange."
EVERY_VOICE = [voice for voices in VOICES.values() for voice in voices]


@pytest.fixture(scope="module")
def mixtures() -> list[tuple[Mixture, dict[str, np.ndarray]]]:
    corpus = DemoCorpus(num_train=14, num_dev=4, num_test=4)
    return [
        (r, dict(r.load())) for split in ("train", "dev", "test") for r in corpus.records(split)
    ]


def digest(record: Mixture) -> str:
    return hashlib.sha256(
        b"".join(name.encode() + x.tobytes() for name, x in record.load().items())
    ).hexdigest()


def fundamental(wave: np.ndarray) -> float:
    """Median over voiced frames of the highest autocorrelation peak between 55 and 420 Hz."""
    found = []
    for start in range(0, len(wave) - 400, 160):
        frame = wave[start : start + 400] * np.hanning(400)
        if np.abs(frame).max() < 0.05 * np.abs(wave).max():
            continue
        correlation = np.correlate(frame, frame, "full")[399:]
        lag = RATE // 420 + int(np.argmax(correlation[RATE // 420 : RATE // 55]))
        if correlation[lag] > 0.5 * correlation[0]:
            found.append(RATE / lag)
    return float(np.median(found))


def colour(wave: np.ndarray) -> np.ndarray:
    """Long-term average of the log spectrum in dB, its mean removed."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 256)[::128] * np.hanning(256)
    level = 10 * np.log10(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9).mean(axis=0)
    return level - level.mean()


def test_there_are_at_least_24_voices_and_no_speaker_or_variant_is_in_two_splits() -> None:
    assert len({voice.name for voice in EVERY_VOICE}) == len(EVERY_VOICE) >= 24
    variants = [{voice.variant for voice in voices} for voices in VOICES.values()]
    assert sum(len(v) for v in variants) == len(set().union(*variants))
    for voices in VOICES.values():
        assert 0.4 <= [voice.sex for voice in voices].count("f") / len(voices) <= 0.6


def test_no_sentence_is_in_two_splits_and_they_are_varied() -> None:
    said = {
        s: {sentence(rng(1, "test", s, i), s) for i in range(400)} for s in ("train", "dev", "test")
    }
    assert all(len(sentences) > 395 for sentences in said.values())
    assert not (
        said["train"] & said["dev"] or said["train"] & said["test"] or said["dev"] & said["test"]
    )
    assert all(8 <= len(text.split()) <= 24 for texts in said.values() for text in texts)
    assert not any("{" in text or "  " in text for texts in said.values() for text in texts)


def test_a_record_has_the_same_bytes_in_another_process_and_after_other_records() -> None:
    records = list(DemoCorpus(num_train=6, num_dev=0, num_test=0).records("train"))
    after_others = [digest(record) for record in reversed(records)][::-1]
    program = (
        "import sys, pickle, hashlib\n"
        "for record in pickle.loads(bytes.fromhex(sys.stdin.read())):\n"
        "    members = record.load().items()\n"
        "    whole = b''.join(n.encode() + x.tobytes() for n, x in members)\n"
        "    print(hashlib.sha256(whole).hexdigest())"
    )
    alone = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps([records[3], records[0]]).hex(),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert alone.stdout.split() == [after_others[3], after_others[0]]


def test_no_voice_depends_on_the_random_numbers_of_the_c_library() -> None:
    library = ctypes.CDLL(None)
    for voice in EVERY_VOICE:
        said = set()
        for seed in (1, 2):
            library.srand(seed)
            said.add(speak(LINE, voice, voice.rate, RATE).tobytes())
        assert len(said) == 1, voice.name


def test_threads_do_not_disturb_each_other() -> None:
    records = list(DemoCorpus(num_train=4, num_dev=0, num_test=0).records("train"))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(digest, records))
    assert together == [digest(record) for record in records]


def test_records_are_small_and_name_speakers_and_texts(mixtures: list) -> None:
    for record, members in mixtures:
        assert len(pickle.dumps(record)) < 2000
        assert len(set(record.speakers)) == 2 and len(record.texts) == 2 and all(record.texts)
        assert set(members) == {"s1", "s2", "noise"} and record.sample_rate == RATE
        assert record.speakers[0] in {voice.name for voice in EVERY_VOICE}
        assert "." not in record.id and "/" not in record.id


def test_members_have_one_length_within_the_bounds_and_the_sum_does_not_clip(
    mixtures: list,
) -> None:
    for _, members in mixtures:
        assert {x.dtype for x in members.values()} == {np.dtype(np.float32)}
        assert len({len(x) for x in members.values()}) == 1
        assert 3.0 <= len(members["s1"]) / RATE <= 5.0
        assert np.abs(sum(members.values())).max() <= 0.9 + 1e-6


def test_levels_are_those_of_librimix(mixtures: list) -> None:
    meter = pyloudnorm.Meter(RATE)
    for _, members in mixtures:
        peak = max(np.abs(x).max() for x in (*members.values(), sum(members.values())))
        if peak > 0.89:
            continue  # turned down as a whole
        for name, (lowest, highest) in {
            "s1": (-33, -25),
            "s2": (-33, -25),
            "noise": (-38, -30),
        }.items():
            loudness = meter.integrated_loudness(members[name].astype(np.float64))
            assert lowest - 0.05 <= loudness <= highest + 0.05


def test_the_first_records_do_not_depend_on_how_many_there_are_but_do_on_the_seed() -> None:
    few, many = (list(DemoCorpus(num_dev=count).records("dev")) for count in (2, 9))
    assert [digest(record) for record in few] == [digest(record) for record in many[:2]]
    other = next(DemoCorpus(num_dev=1, seed=1).records("dev"))
    assert other.texts != few[0].texts


@pytest.mark.parametrize(("least", "most"), [(8.0, 9.0), (20.0, 21.0)])  # 6 % of it is too much
def test_length_bounds_of_the_user_hold_far_from_the_default(least: float, most: float) -> None:
    corpus = DemoCorpus(num_train=2, min_seconds=least, max_seconds=most, sample_rate=16000)
    for record in corpus.records("train"):
        assert least <= len(record.load()["s1"]) / 16000 <= most


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_voices_of_a_split_differ_in_pitch_or_colour(split: str) -> None:
    waves = [speak(LINE, voice, voice.rate, RATE) for voice in VOICES[split]]
    pitches = [fundamental(wave) for wave in waves]
    colours = [colour(wave) for wave in waves]
    assert min(pitches) < 110 and max(pitches) > 190
    for first in range(len(waves)):
        for second in range(first):
            apart = abs(np.log2(pitches[first] / pitches[second])) * 12  # semitones
            distance = np.sqrt(np.mean((colours[first] - colours[second]) ** 2))
            assert apart > 1.0 or distance > 2.0, (
                VOICES[split][first].name,
                VOICES[split][second].name,
            )


def test_a_voice_spoken_higher_is_higher_and_faster_is_shorter() -> None:
    low, high = (
        fundamental(speak(LINE, Voice("m", "en-us", "m3", p, 50, 170), 170, RATE)) for p in (30, 70)
    )
    assert 70 < low < 100 < high < 170
    voice = VOICES["test"][0]
    slow, fast = (len(speak(LINE, voice, rate, RATE)) for rate in (120, 240))
    assert 1.6 < slow / fast < 2.4


def test_pink_noise_falls_by_three_decibels_per_octave() -> None:
    power = np.abs(np.fft.rfft(pink(rng(0, "test"), 2**18))) ** 2
    octaves = [10 * np.log10(power[2**k : 2 ** (k + 1)].mean()) for k in range(8, 17)]
    assert np.polyfit(np.arange(len(octaves)), octaves, 1)[0] == pytest.approx(-3.01, abs=0.1)


def test_without_espeak_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install espeakng-loader \(the extra `demo`"):
        DemoCorpus()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sample_rate": 44100}, "sample_rate"),
        ({"min_seconds": 4.0, "max_seconds": 4.5}, "max_seconds"),
        ({"num_dev": -1}, "num_dev"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        DemoCorpus(**arguments)


def test_an_unknown_split_is_an_error_that_lists_the_splits() -> None:
    with pytest.raises(ConfigError, match="train, dev, test"):
        next(DemoCorpus().records("valid"))


def test_ctrl_c_inside_a_function_that_c_calls_back_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synthesise, finished = demo._synthesise, []
    called_back = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: os.kill(os.getpid(), signal.SIGINT) or 7)

    def interrupted(*arguments: Any) -> bytes:
        finished.append(called_back())
        return synthesise(*arguments)

    expected = speak(LINE, EVERY_VOICE[0], 170, RATE)
    monkeypatch.setattr(demo, "_synthesise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speak(LINE, EVERY_VOICE[0], 170, RATE)
    monkeypatch.undo()
    assert np.array_equal(speak(LINE, EVERY_VOICE[0], 170, RATE), expected)
    assert finished == [7]
