"""Signal functions on NumPy waveforms: decode, check, resample, measure and set levels, fit and crop.

In: audio files (or their bytes) and float waveforms, full scale 1.0. Out: float32 arrays, [T] or [T, C], and numbers.
Nothing here draws at random, and nothing knows of corpora or shards.

Shapes: T samples (audio frames), C channels.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from pathlib import Path

import numpy as np
import pyloudnorm
import soundfile
import soxr
from scipy.signal import resample_poly as scipy_resample_poly

SUFFIXES = (".flac", ".wav")
SILENCE = (
    2.0**-15
)  # one step of 16-bit audio: a wave that never reaches it would be stored as zeros
MIN_LOUDNESS_SECONDS = 0.4  # one gating block of ITU-R BS.1770


class AudioError(ValueError):
    """Audio that is missing, undecodable, empty, silent, not finite, too short or of an unexpected rate."""


def decode(source: str | Path | bytes, stop: int | None = None) -> tuple[np.ndarray, int]:
    """The first `stop` frames (None: all) of an encoded file: float32 [T] if mono, else [T, C], and its rate in Hz.

    `source` is a path or the file's bytes. AudioError names the file if it is missing or cannot be decoded.
    """
    name = f"{len(source)} bytes of audio" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise AudioError(
            f"{name}: no such file; check the corpus's root folder and that its download is complete"
        )
    try:
        wave, rate = soundfile.read(
            io.BytesIO(source) if isinstance(source, bytes) else str(source),
            frames=-1 if stop is None else stop,
            dtype="float32",
        )
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: cannot be decoded ({error}); fetch the file again") from error
    return wave, int(rate)


def duration_seconds(path: str | Path) -> float:
    """How long a file lasts by its header, without decoding it."""
    try:
        return float(soundfile.info(str(path)).duration)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: cannot be read ({error}); fetch the file again") from error


def load_channel(path: str | Path, stop: int | None = None) -> tuple[np.ndarray, int]:
    """The first channel of a file, float32 [T], at the file's own rate, and that rate; sound by `check`."""
    wave, rate = decode(path, stop)
    return check(wave if wave.ndim == 1 else np.ascontiguousarray(wave[:, 0]), str(path)), rate


def check(wave_T: np.ndarray, name: str) -> np.ndarray:
    """The wave itself, if it is not empty, all finite and not silent; else an AudioError that begins with `name`."""
    if wave_T.size == 0:
        raise AudioError(
            f"{name}: empty, it has no samples; fetch the file again or leave it out of the corpus"
        )
    peak = float(np.max(np.abs(wave_T)))
    if not np.isfinite(peak):
        at = int(np.argmin(np.isfinite(wave_T)))
        raise AudioError(
            f"{name}: NaN or infinite, first at sample {at}; fetch the file again or leave it out"
        )
    if peak < SILENCE:
        raise AudioError(
            f"{name}: silent, its peak {peak:.2g} is below one 16-bit step; leave it out of the corpus"
        )
    return wave_T


def require_rate(rate: int, wanted: int, name: str, *, exactly: bool = False) -> None:
    """AudioError unless audio at `rate` Hz may serve at `wanted` Hz; up-sampling adds no band and is refused."""
    if rate == wanted or (rate > wanted and not exactly):
        return
    raise AudioError(
        f"{name}: its rate is {rate} Hz where {wanted} Hz is wanted; set sample_rate={rate} or convert it"
    )


def resample(wave_T: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """The wave at another rate, by soxr's very-high-quality filter: float32 [T * new_rate / rate, rounded]."""
    if rate == new_rate:
        return wave_T.astype(np.float32, copy=False)
    return soxr.resample(wave_T.astype(np.float32, copy=False), rate, new_rate, quality="VHQ")


def resample_poly(wave_T: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """The wave at another rate, by the polyphase filter of the LibriMix and WSJ0-mix recipes, in the wave's own dtype.

    The length is ceil(T * new_rate / rate).
    """
    if rate == new_rate:
        return wave_T
    divisor = gcd(rate, new_rate)
    return scipy_resample_poly(wave_T, new_rate // divisor, rate // divisor)


def rms(wave_T: np.ndarray) -> float:
    """Root mean square, computed in float64; 0 of an empty wave."""
    return float(np.sqrt(np.mean(np.square(wave_T, dtype=np.float64)))) if wave_T.size else 0.0


@lru_cache(maxsize=8)
def _meter(rate: int) -> pyloudnorm.Meter:
    return pyloudnorm.Meter(rate)


def loudness(wave_T: np.ndarray, rate: int, name: str = "the wave") -> float:
    """Integrated loudness in LUFS (ITU-R BS.1770-4); AudioError below 0.4 s or where the gate passes nothing."""
    if wave_T.size < MIN_LOUDNESS_SECONDS * rate:
        seconds = wave_T.size / rate
        raise AudioError(
            f"{name}: lasts {seconds:.2f} s, loudness needs {MIN_LOUDNESS_SECONDS} s; leave it out"
        )
    measured = float(_meter(rate).integrated_loudness(wave_T))
    if not np.isfinite(measured):
        raise AudioError(
            f"{name}: below the loudness gate of -70 LUFS throughout; leave it out of the corpus"
        )
    return measured


def db_to_gain(decibels: float) -> float:
    """The amplitude factor of a level difference in dB."""
    return float(10.0 ** (decibels / 20.0))


def gain_for_snr(signal_T: np.ndarray, noise_T: np.ndarray, snr_db: float) -> float:
    """The factor on `noise` that puts `signal` `snr_db` above it, by power over the whole waves."""
    noise_level = rms(noise_T)
    if noise_level == 0.0:
        raise AudioError("the noise is silent: no gain puts it at an SNR")
    return rms(signal_T) / noise_level / db_to_gain(snr_db)


def at_level_of(mixture_T: np.ndarray, wave_T: np.ndarray, max_peak: float = 1.0) -> np.ndarray:
    """The wave at the mixture's RMS, or below it where its peak would pass `max_peak`; silence stays silence."""
    peak = float(np.abs(wave_T).max())
    return (
        wave_T * np.float32(min(rms(mixture_T) / rms(wave_T), max_peak / peak))
        if peak > 0
        else wave_T
    )


def fit(wave_T: np.ndarray, num_samples: int) -> np.ndarray:
    """The wave cut at, or zero-padded at its end to, `num_samples`."""
    if wave_T.size >= num_samples:
        return wave_T[:num_samples]
    return np.pad(wave_T, (0, num_samples - wave_T.size))


def crop(wave_T: np.ndarray, start: int, num_samples: int) -> np.ndarray:
    """`num_samples` of the wave from `start`, zero-padded at the end where the wave is over."""
    assert 0 <= start <= wave_T.size, (start, wave_T.size)
    return fit(wave_T[start:], num_samples)


def peak_of_sum(waves: Sequence[np.ndarray], gains: Sequence[float]) -> float:
    """The peak of the sum of scaled waves, each zero-padded to the longest; float64."""
    total = np.zeros(max(wave.size for wave in waves))
    for wave, gain in zip(waves, gains, strict=True):
        total[: wave.size] += gain * wave
    return float(np.max(np.abs(total)))


def find_files(folder: str | Path) -> list[Path]:
    """Every .wav and .flac file below a local folder, sorted by path; AudioError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        beside = (
            sorted(p.name for p in folder.parent.iterdir() if p.is_dir())
            if folder.parent.is_dir()
            else []
        )
        there = (
            f"its parent holds {', '.join(beside[:8])}"
            if beside
            else "its parent does not exist or is empty"
        )
        raise AudioError(f"{folder}: no such folder ({there}); check the root and the split")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise AudioError(
            f"{folder}: no {' or '.join(SUFFIXES)} file below it; check the root and the split"
        )
    return found
