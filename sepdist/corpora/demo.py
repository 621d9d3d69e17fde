"""The demo corpus: two generated voices talking at once over noise, so that the whole system runs without a download.

In: nothing but a seed. Out: `Mixture` records whose s1, s2 and noise are spoken by eSpeak NG (the `demo` extra), with
the levels of LibriMix (Cosentino et al. 2020, section 3.1). Voices, sentences and mixtures of train, dev and test are
disjoint. A record's audio is a pure function of the arguments: the same bytes in every process and in every order.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import signal
import threading
from _ctypes import dlclose
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import soxr

from sepdist.config import ConfigError
from sepdist.corpora.demo_text import sentence
from sepdist.data.records import Mixture
from sepdist.seeding import derive, rng

SPLITS = ("train", "dev", "test")
SPEECH_LUFS = (-33.0, -25.0)
NOISE_LUFS = (-38.0, -30.0)
PEAK = 0.9
SECONDS_PER_CHARACTER = 0.053  # of eSpeak at 175 words per minute, measured; only a first guess
BABBLE_SECONDS = 12.0


@dataclass(frozen=True)
class Voice:
    """One speaker: accent and variant of eSpeak NG, pitch and range 0..99 (50: the variant's own), words per minute."""

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


# No variant (the shape of the vocal tract) is in two splits. The variants Reed and
# caleb cannot serve: their breath comes from the C library's rand(), which any thread of the process may advance.
_BASE_VOICES: dict[str, tuple[Voice, ...]] = {
    "train": (
        Voice("m", "en-us", "m1", 32, 55, 170),
        Voice("m", "en-gb-x-rp", "m3", 52, 60, 180),
        Voice("m", "en-us", "m5", 70, 45, 165),
        Voice("m", "en-gb-x-gbcwmd", "m7", 46, 50, 175),
        Voice("m", "en-gb-scotland", "m2", 60, 65, 172),
        Voice("m", "en-us", "klatt4", 40, 50, 168),
        Voice("m", "en-us-nyc", "adam", 56, 60, 185),
        Voice("m", "en-029", "Henrique", 50, 55, 175),
        Voice("m", "en-gb-x-gbclan", "Denis", 46, 45, 178),
        Voice("m", "en", "michel", 66, 50, 170),
        Voice("m", "en-us", "Alex", 34, 70, 160),
        Voice("m", "en-gb-x-rp", "Hugo", 30, 40, 182),
        Voice("f", "en-us", "f1", 50, 50, 175),
        Voice("f", "en-gb-x-rp", "f2", 44, 60, 180),
        Voice("f", "en-gb-scotland", "f3", 56, 55, 172),
        Voice("f", "en-us", "f5", 40, 45, 178),
        Voice("f", "en-gb-x-gbclan", "Annie", 50, 50, 170),
        Voice("f", "en-us-nyc", "Alicia", 32, 60, 185),
        Voice("f", "en-us", "linda", 42, 50, 175),
        Voice("f", "en-us", "shelby", 54, 65, 170),
        Voice("f", "en-029", "aunty", 60, 50, 175),
        Voice("f", "en-029", "f2", 70, 40, 165),
        Voice("f", "en-gb-scotland", "f1", 26, 55, 180),
        Voice("f", "en-us", "Annie", 74, 60, 185),
    ),
    "dev": (
        Voice("m", "en-gb-x-rp", "m4", 58, 55, 180),
        Voice("m", "en-us", "miguel", 44, 50, 172),
        Voice("m", "en-us", "klatt", 64, 55, 168),
        Voice("f", "en-us", "f4", 56, 50, 176),
        Voice("f", "en-gb-scotland", "belinda", 34, 55, 175),
        Voice("f", "en-gb-x-gbcwmd", "grandma", 44, 50, 182),
    ),
    "test": (
        Voice("m", "en-us", "m6", 50, 50, 175),
        Voice("m", "en-gb-x-rp", "pablo", 36, 60, 180),
        Voice("m", "en-us-nyc", "norbert", 62, 55, 170),
        Voice("f", "en-us", "Andrea", 30, 55, 165),
        Voice("f", "en-gb-x-rp", "anika", 24, 50, 160),
        Voice("f", "en-gb-scotland", "steph", 54, 60, 178),
    ),
}


def _with_siblings(voices: tuple[Voice, ...]) -> tuple[Voice, ...]:
    """The voices, and of each whose variant occurs once two more, of other pitch, accent and rate."""
    variants = [voice.variant for voice in voices]
    accents = sorted({voice.accent for voice in voices})
    family = list(voices)
    for voice in voices:
        if variants.count(voice.variant) == 1:
            for shift, steps in ((27, 1), (54, 3)):
                accent = accents[(accents.index(voice.accent) + steps) % len(accents)]
                pitch = 10 + (voice.pitch - 10 + shift) % 80
                family.append(
                    Voice(
                        voice.sex,
                        accent,
                        voice.variant,
                        pitch,
                        voice.range,
                        voice.rate - shift // 4,
                    )
                )
    return tuple(family)


# A network that hears 24 voices learns those 24; it takes more to serve voices it never heard.
VOICES = _BASE_VOICES | {"train": _with_siblings(_BASE_VOICES["train"])}


class DemoCorpus:
    """Mixtures of two generated voices and noise, `num_<split>` of them per split.

    Each mixture is as long as the shorter of its two utterances ("min" mode), between `min_seconds` and `max_seconds`.

    Raises:
        ConfigError: eSpeak NG is not installed, or an argument is out of its range.
    """

    name = "demo"

    def __init__(
        self,
        num_train: int = 1600,
        num_dev: int = 60,
        num_test: int = 60,
        seed: int = 0,
        sample_rate: int = 8000,
        min_seconds: float = 3.0,
        max_seconds: float = 5.0,
    ) -> None:
        if not 4000 <= sample_rate <= ESPEAK_RATE:
            raise ConfigError(
                f"demo corpus: sample_rate must be 4000 to {ESPEAK_RATE} Hz, it is {sample_rate}"
            )
        if not (min_seconds >= 2.0 and min_seconds + 1.0 <= max_seconds <= 60.0):
            raise ConfigError(
                "demo corpus: needs 2 <= min_seconds, min_seconds + 1 <= max_seconds <= 60, "
                f"has min_seconds={min_seconds}, max_seconds={max_seconds}"
            )
        self.num_mixtures = {"train": num_train, "dev": num_dev, "test": num_test}
        for split, count in self.num_mixtures.items():
            if count < 0:
                raise ConfigError(f"demo corpus: num_{split} must not be negative, it is {count}")
        if importlib.util.find_spec("espeakng_loader") is None:
            raise ConfigError(
                "demo corpus: its voices need eSpeak NG; run: pip install 'sepdist[demo]'"
            )
        self.seed = seed
        self.sample_rate = sample_rate
        self.min_seconds = min_seconds
        self.max_seconds = max_seconds

    def records(self, split: str) -> Iterator[Mixture]:
        """The mixtures of one split, always the same ones in the same order."""
        if split not in SPLITS:
            raise ConfigError(f"demo corpus: no split {split!r}, it has {', '.join(SPLITS)}")
        voices = VOICES[split]
        for number in range(self.num_mixtures[split]):
            random = rng(self.seed, "demo mixture", split, number)
            first, second = random.choice(len(voices), size=2, replace=False)
            spec = MixtureSpec(
                seed=self.seed,
                split=split,
                number=number,
                voices=(voices[first], voices[second]),
                texts=(self._text(random, split), self._text(random, split)),
                sample_rate=self.sample_rate,
                seconds=(self.min_seconds, self.max_seconds),
            )
            yield Mixture(
                id=f"demo-{split}-{number:06d}",
                speakers=tuple(voice.name for voice in spec.voices),
                sample_rate=self.sample_rate,
                load=functools.partial(render, spec),
                texts=spec.texts,
            )

    def _text(self, random: np.random.Generator, split: str) -> str:
        """Sentences that take about as long as a length drawn between the two bounds."""
        wanted = random.uniform(self.min_seconds, self.max_seconds) / SECONDS_PER_CHARACTER
        text = ""
        while len(text) < 0.75 * wanted:
            tried = [sentence(random, split) for _ in range(6)]
            text = min(
                (f"{text} {more}".strip() for more in tried),
                key=lambda joined: abs(len(joined) - wanted),
            )
        return text


@dataclass(frozen=True)
class MixtureSpec:
    """Everything that one mixture's audio depends on; a record carries this instead of audio."""

    seed: int
    split: str
    number: int
    voices: tuple[Voice, Voice]
    texts: tuple[str, str]
    sample_rate: int
    seconds: tuple[float, float]


def render(spec: MixtureSpec) -> dict[str, np.ndarray]:
    """The s1, s2 and noise of one mixture, float32 [T] each; their sum stays within +-0.9."""
    spoken = [
        speak_within(text, voice, spec.seconds, spec.sample_rate)
        for text, voice in zip(spec.texts, spec.voices, strict=True)
    ]
    length = min(len(wave) for wave in spoken)
    random = rng(spec.seed, "demo level", spec.split, spec.number)
    noise = make_noise(random, spec, length)
    parts = {
        "s1": set_loudness(spoken[0][:length], random.uniform(*SPEECH_LUFS), spec.sample_rate),
        "s2": set_loudness(spoken[1][:length], random.uniform(*SPEECH_LUFS), spec.sample_rate),
        "noise": set_loudness(noise, random.uniform(*NOISE_LUFS), spec.sample_rate),
    }
    peak = np.abs(np.sum(list(parts.values()), axis=0)).max()
    gain = PEAK / peak if peak > PEAK else 1.0
    return {name: (gain * wave).astype(np.float32) for name, wave in parts.items()}


def set_loudness(wave: np.ndarray, lufs: float, sample_rate: int) -> np.ndarray:
    """`wave` [T] at `lufs` (ITU-R BS.1770-4), or as loud as a peak of 0.9 allows."""
    loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(wave.astype(np.float64))
    levelled = wave * 10 ** ((lufs - loudness) / 20)
    peak = np.abs(levelled).max()
    return levelled * (PEAK / peak) if peak >= 1.0 else levelled


def make_noise(random: np.random.Generator, spec: MixtureSpec, length: int) -> np.ndarray:
    """Pink noise; in two of three mixtures with a babble of three to five voices that are not in the mixture."""
    noise = pink(random, length)
    noise /= np.sqrt(np.mean(noise**2))
    others = [number for number, voice in enumerate(VOICES[spec.split]) if voice not in spec.voices]
    if random.uniform() < 1 / 3:
        return noise
    babble = np.zeros(length)
    for number in random.choice(
        others, size=min(len(others), int(random.integers(3, 6))), replace=False
    ):
        voice = babble_voice(spec.seed, spec.split, int(number), spec.sample_rate)
        start = int(random.integers(len(voice)))
        babble += np.take(voice, np.arange(start, start + length), mode="wrap")
    babble /= np.sqrt(np.mean(babble**2))
    return babble + random.uniform(0.1, 1.0) * noise


def pink(random: np.random.Generator, length: int) -> np.ndarray:
    """Noise [length] whose power falls by 3 dB per octave."""
    spectrum = np.fft.rfft(random.standard_normal(length))
    spectrum[0] = 0
    return np.fft.irfft(spectrum[1:] / np.sqrt(np.arange(1, len(spectrum))), n=length)


@functools.lru_cache(maxsize=64)
def babble_voice(seed: int, split: str, number: int, sample_rate: int) -> np.ndarray:
    """About 12 seconds of one voice of the split, level 1.0 RMS, for babble; made once per process."""
    random = rng(seed, "demo babble", split, number)
    text = " ".join(sentence(random, split) for _ in range(5))
    wave = speak(text, VOICES[split][number], VOICES[split][number].rate, sample_rate)
    wave = wave[: int(BABBLE_SECONDS * sample_rate)]
    return wave / np.sqrt(np.mean(wave**2))


def speak_within(
    text: str, voice: Voice, seconds: tuple[float, float], sample_rate: int
) -> np.ndarray:
    """The spoken text, float32 [T] with T/sample_rate within `seconds`; the voice hurries or drawls if it must."""
    shortest, longest = seconds
    rate = voice.rate
    for _ in range(6):
        wave = speak(text, voice, rate, sample_rate)
        duration = len(wave) / sample_rate
        if shortest <= duration <= longest:
            return wave
        wanted = 0.94 * longest if duration > longest else 1.06 * shortest
        rate = round(min(max(rate * duration / wanted, 80), 400))
    raise ValueError(
        f"voice {voice.name} took {duration:.2f} s, not {shortest} to {longest} s, to say {text!r}"
    )


# --- eSpeak NG ---------------------------------------------------------------------------------------------------
ESPEAK_RATE = 22050
_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: the callback has run when espeak_Synth returns
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_VOLUME_PERCENT = 50  # at 100 some variants clip inside eSpeak
# The loader knows a copy by its path, /proc/self/fd/N, so two threads could be given one. eSpeak also sets the locale.
_ONE_AT_A_TIME = threading.Lock()
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def speak(text: str, voice: Voice, rate: int, sample_rate: int) -> np.ndarray:
    """`text` spoken at `rate` words per minute, float32 [T] at `sample_rate`, without the silence around it."""
    seed = derive(0, "espeak", text, voice.name, rate) % 2**31
    with _ONE_AT_A_TIME:
        spoken = _synthesise(text, voice, rate, seed)
    samples = np.frombuffer(spoken, dtype="<i2").astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    margin = ESPEAK_RATE // 50
    samples = samples[max(loud[0] - margin, 0) : loud[-1] + margin]
    return np.asarray(soxr.resample(samples, ESPEAK_RATE, sample_rate), dtype=np.float32)


def _synthesise(text: str, voice: Voice, rate: int, seed: int) -> bytes:
    """int16 little-endian samples at 22,050 Hz.

    eSpeak keeps its oscillators, filters and random numbers in static variables that no call resets, so what it says
    depends on what it said before. A copy of the library in an anonymous file is loaded for each call and dropped
    again: its statics start from zero. That costs about 4 ms.
    """
    image, data_path = _library()
    descriptor = os.memfd_create("espeak-ng")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(image)
        library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    chunks: list[bytes] = []

    @_CALLBACK
    def collect(
        wave: "ctypes._Pointer[ctypes.c_short]", num_samples: int, events: int | None
    ) -> int:
        if wave and num_samples > 0:
            chunks.append(ctypes.string_at(wave, 2 * num_samples))
        return 0

    try:
        found_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, 0)
        assert found_rate == ESPEAK_RATE, f"eSpeak NG says {found_rate} Hz, not {ESPEAK_RATE}"
        library.espeak_SetSynthCallback(collect)
        if library.espeak_SetVoiceByName(f"{voice.accent}+{voice.variant}".encode()) != 0:
            raise ConfigError(
                f"eSpeak NG has no voice {voice.accent}+{voice.variant}: install the pinned extra `demo`"
            )
        levels = (
            (_RATE, rate),
            (_VOLUME, _VOLUME_PERCENT),
            (_PITCH, voice.pitch),
            (_RANGE, voice.range),
        )
        for parameter, value in levels:
            status = library.espeak_SetParameter(parameter, value, 0)
            assert status == 0, f"eSpeak NG refused parameter {parameter} = {value}"
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        spoken = text.encode() + b"\0"
        with interrupts_afterwards():
            status = library.espeak_Synth(
                spoken, ctypes.c_size_t(len(spoken)), 0, 0, 0, _UTF8, None, None
            )
        assert status == 0, f"eSpeak NG ended with status {status} on {text!r}"
        library.espeak_Terminate()
    finally:
        dlclose(library._handle)
    if not any(chunks):
        raise ValueError(f"eSpeak NG said nothing for {text!r}")
    return b"".join(chunks)


@contextlib.contextmanager
def interrupts_afterwards() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: in a function that C calls back, it would be printed and lost."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is None
    ):
        yield
        return
    caught: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught and callable(handler):
        handler(*caught[0])


@functools.lru_cache(maxsize=1)
def _library() -> tuple[bytes, bytes]:
    """The bytes of eSpeak NG's shared library, and the folder of its voices."""
    import espeakng_loader

    return Path(espeakng_loader.get_library_path()).read_bytes(), str(
        espeakng_loader.get_data_path()
    ).encode()
