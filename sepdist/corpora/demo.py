"""The demo corpus: two generated voices talking at once over noise; needs no download.

s1, s2 and noise are spoken by eSpeak NG (the extra `demo`) and have LibriMix's levels (Cosentino et
al. 2020, section 3.1). Voices, sentences and mixtures of train, dev and test are disjoint. A
record's audio is a pure function of the arguments: the same bytes in every process and in every
order.
"""

import ctypes
import functools
import importlib.util
import os
import re
import threading
import zlib
from _ctypes import dlclose
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
import yaml

from sepdist import audio
from sepdist.config import ConfigError
from sepdist.corpora.recipes import NOISE_LUFS, SPEECH_LUFS, guarded_gains
from sepdist.data.records import Mixture
from sepdist.seeding import derive, rng

SECONDS_PER_CHARACTER = 0.053  # of eSpeak at 175 words per minute, measured; only a first guess
BABBLE_SECONDS = 12.0
ESPEAK_RATE = 22050


class Voice(NamedTuple):
    """A speaker: a row of `voices` in demo.yaml."""

    sex: str
    accent: str
    variant: str
    pitch: int
    range: int
    rate: int

    @property
    def name(self) -> str:
        """The speaker's id in the records."""
        return f"{self.sex}-{self.variant}-{self.accent}-{self.pitch}".lower()


_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
VOICES = {split: tuple(Voice(*row) for row in rows) for split, rows in _DATA["voices"].items()}


@dataclass
class DemoCorpus:
    """Mixtures of two generated voices and noise, `num_<split>` of them per split.

    Each mixture is as long as the shorter of its two utterances ("min" mode), between `min_seconds`
    and `max_seconds`. ConfigError if eSpeak NG is not installed.
    """

    num_train: int = 1600
    num_dev: int = 60
    num_test: int = 60
    seed: int = 0
    sample_rate: int = 8000
    min_seconds: float = 3.0
    max_seconds: float = 5.0
    name = "demo"

    def __post_init__(self) -> None:
        wrong = ""
        if not 4000 <= self.sample_rate <= ESPEAK_RATE:
            wrong = f"sample_rate={self.sample_rate}, must be 4000 to {ESPEAK_RATE} Hz"
        if not (self.min_seconds >= 2.0 and self.min_seconds + 1.0 <= self.max_seconds <= 60.0):
            wrong = "needs 2 <= min_seconds, min_seconds + 1 <= max_seconds <= 60, has "
            wrong += f"min_seconds={self.min_seconds}, max_seconds={self.max_seconds}"
        for split in VOICES:
            if (count := getattr(self, f"num_{split}")) < 0:
                wrong = f"num_{split}={count} must not be negative"
        if importlib.util.find_spec("espeakng_loader") is None:
            wrong = "its voices need eSpeak NG; run: pip install espeakng-loader (the extra "
            wrong += "`demo` has it)"
        if wrong:
            raise ConfigError(f"demo corpus: {wrong}")

    def records(self, split: str) -> Iterator[Mixture]:
        """Yield the mixtures of a split, always the same ones in the same order."""
        if split not in VOICES:
            raise ConfigError(f"demo corpus: no split {split!r}, it has {', '.join(VOICES)}")
        voices, seconds = VOICES[split], (self.min_seconds, self.max_seconds)
        for number in range(getattr(self, f"num_{split}")):
            random = rng(self.seed, "demo mixture", split, number)
            first, second = random.choice(len(voices), size=2, replace=False)
            pair = (voices[first], voices[second])
            texts = (draw_text(random, split, seconds), draw_text(random, split, seconds))
            names = (pair[0].name, pair[1].name)
            load = functools.partial(self._render, split, number, pair, texts)
            yield Mixture(f"demo-{split}-{number:06d}", names, self.sample_rate, load, texts)

    def _render(
        self, split: str, number: int, voices: tuple[Voice, Voice], texts: tuple[str, str]
    ) -> dict[str, np.ndarray]:
        """Make the s1, s2 and noise of a mixture, float32 [T] each; their sum is within +-0.9."""
        spoken = [self._speak(text, voice) for text, voice in zip(texts, voices, strict=True)]
        length = min(len(wave) for wave in spoken)
        random = rng(self.seed, "demo level", split, number)
        cut = [*(wave[:length] for wave in spoken), self._noise(random, split, voices, length)]
        waves = [wave.astype(np.float64) for wave in cut]
        levels = [random.uniform(*bounds) for bounds in (SPEECH_LUFS, SPEECH_LUFS, NOISE_LUFS)]
        loudnesses = [audio.loudness(wave, self.sample_rate) for wave in waves]
        gains = guarded_gains(levels, loudnesses, [np.abs(x).max() for x in waves], lambda: waves)
        scaled = [(g * wave).astype(np.float32) for g, wave in zip(gains, waves, strict=True)]
        return dict(zip(("s1", "s2", "noise"), scaled, strict=True))

    def _speak(self, text: str, voice: Voice) -> np.ndarray:
        """Speak a text, float32 [T], at a rate that keeps it between the bounds in seconds."""
        rate = voice.rate
        for _ in range(6):
            wave = speak(text, voice, rate, self.sample_rate)
            duration = len(wave) / self.sample_rate
            if self.min_seconds <= duration <= self.max_seconds:
                return wave
            too_long = duration > self.max_seconds
            wanted = 0.94 * self.max_seconds if too_long else 1.06 * self.min_seconds
            if not self.min_seconds <= wanted <= self.max_seconds:  # narrower than 6 %
                wanted = (self.min_seconds + self.max_seconds) / 2
            rate = round(min(max(rate * duration / wanted, 80), 400))
        bounds = f"{self.min_seconds} to {self.max_seconds} s"
        raise ValueError(f"voice {voice.name} took {duration:.2f} s, not {bounds}, to say {text!r}")

    def _noise(
        self, random: np.random.Generator, split: str, speaking: tuple[Voice, Voice], length: int
    ) -> np.ndarray:
        """Make pink noise, in two of three mixtures with a babble of three to five other voices."""
        noise = pink(random, length)
        noise /= np.sqrt(np.mean(noise**2))
        if random.uniform() < 1 / 3:
            return noise
        others = [number for number, voice in enumerate(VOICES[split]) if voice not in speaking]
        count = min(len(others), int(random.integers(3, 6)))
        babble = np.zeros(length)
        for number in random.choice(others, size=count, replace=False):
            voice = babble_voice(self.seed, split, int(number), self.sample_rate)
            start = int(random.integers(len(voice)))
            babble += np.take(voice, np.arange(start, start + length), mode="wrap")
        babble /= np.sqrt(np.mean(babble**2))
        return babble + random.uniform(0.1, 1.0) * noise


def sentence(random: np.random.Generator, split: str) -> str:
    """Draw a sentence of `split`: its checksum decides, one in ten each for dev and test."""

    def choose(slot: re.Match[str]) -> str:
        words = _DATA["words"][slot[1]]
        return words[random.integers(len(words))]

    templates = _DATA["templates"]
    while True:
        text = re.sub(r"\{(\w+)\}", choose, templates[random.integers(len(templates))])
        text = text[0].upper() + text[1:]
        if {0: "dev", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train") == split:
            return text


def draw_text(random: np.random.Generator, split: str, seconds: tuple[float, float]) -> str:
    """Draw sentences that take about as long as a duration drawn between two bounds."""
    wanted = random.uniform(*seconds) / SECONDS_PER_CHARACTER
    text = ""
    while len(text) < 0.75 * wanted:
        tried = [f"{text} {sentence(random, split)}".strip() for _ in range(6)]
        text = min(tried, key=lambda joined: abs(len(joined) - wanted))
    return text


def pink(random: np.random.Generator, length: int) -> np.ndarray:
    """Draw noise [length] whose power falls by 3 dB per octave."""
    spectrum = np.fft.rfft(random.standard_normal(length))
    spectrum[0] = 0
    return np.fft.irfft(spectrum[1:] / np.sqrt(np.arange(1, len(spectrum))), n=length)


@functools.lru_cache(maxsize=64)
def babble_voice(seed: int, split: str, number: int, sample_rate: int) -> np.ndarray:
    """Make about 12 seconds of one voice for babble, level 1.0 RMS, once per process."""
    random = rng(seed, "demo babble", split, number)
    text = " ".join(sentence(random, split) for _ in range(5))
    wave = speak(text, VOICES[split][number], VOICES[split][number].rate, sample_rate)
    wave = wave[: int(BABBLE_SECONDS * sample_rate)]
    return wave / np.sqrt(np.mean(wave**2))


# eSpeak NG's constants: espeak_AUDIO_OUTPUT, espeakCHARS_UTF8 and espeak_PARAMETER.
_SYNCHRONOUS = 2  # the callback has run when espeak_Synth returns
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_VOLUME_PERCENT = 50  # at 100 some variants clip inside eSpeak
# The loader knows a library by its path, here /proc/self/fd/N, so two threads could get the same
# copy. eSpeak also sets the locale.
_ONE_AT_A_TIME = threading.Lock()


def speak(text: str, voice: Voice, rate: int, sample_rate: int) -> np.ndarray:
    """Speak a text at `rate` words per minute, float32 [T], without the silence around it."""
    seed = derive(0, "espeak", text, voice.name, rate) % 2**31

    def synthesise() -> bytes:
        with _ONE_AT_A_TIME:
            return _synthesise(text, voice, rate, seed)

    # In a thread of its own: in a callback from C, Ctrl-C would be printed and lost. The lock is
    # taken there, because Ctrl-C while the thread starts leaves it running with nobody waiting.
    with ThreadPoolExecutor(max_workers=1) as pool:
        spoken = pool.submit(synthesise).result()
    samples = np.frombuffer(spoken, dtype="<i2").astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    margin = ESPEAK_RATE // 50
    samples = samples[max(loud[0] - margin, 0) : loud[-1] + margin]
    return np.asarray(soxr.resample(samples, ESPEAK_RATE, sample_rate), dtype=np.float32)


def _synthesise(text: str, voice: Voice, rate: int, seed: int) -> bytes:
    """Return int16 little-endian samples at 22,050 Hz.

    eSpeak keeps oscillators, filters and random numbers in static variables that no call resets, so
    its output depends on what it said before. Therefore each call loads a fresh copy of the library
    from an anonymous file, whose statics start from zero; that takes about 4 ms.
    """
    import espeakng_loader

    data_path = str(espeakng_loader.get_data_path()).encode()
    with open(os.memfd_create("espeak-ng"), "wb") as copy:
        copy.write(Path(espeakng_loader.get_library_path()).read_bytes())
        copy.flush()
        library = ctypes.CDLL(f"/proc/self/fd/{copy.fileno()}")
    chunks: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(wave: Any, num_samples: int, events: int | None) -> int:
        if wave and num_samples > 0:
            chunks.append(ctypes.string_at(wave, 2 * num_samples))
        return 0

    try:
        found_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, 0)
        assert found_rate == ESPEAK_RATE, f"eSpeak NG gives {found_rate} Hz, not {ESPEAK_RATE}"
        library.espeak_SetSynthCallback(collect)
        name = f"{voice.accent}+{voice.variant}"
        if library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ConfigError(f"eSpeak NG has no voice {name}: install the pinned extra `demo`")
        levels = {_RATE: rate, _VOLUME: _VOLUME_PERCENT, _PITCH: voice.pitch, _RANGE: voice.range}
        for parameter, value in levels.items():
            status = library.espeak_SetParameter(parameter, value, 0)
            assert status == 0, f"eSpeak NG refused parameter {parameter} = {value}"
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        spoken = text.encode() + b"\0"
        size = ctypes.c_size_t(len(spoken))
        status = library.espeak_Synth(spoken, size, 0, 0, 0, _UTF8, None, None)
        assert status == 0, f"eSpeak NG ended with status {status} on {text!r}"
        library.espeak_Terminate()
    finally:
        dlclose(library._handle)
    if not any(chunks):
        raise ValueError(f"eSpeak NG gave no audio for {text!r}")
    return b"".join(chunks)
