"""LibriMix's way to make mixtures: a recipe (files and gains) to audio, and new recipes drawn from lists of files.

In: paths of speech and noise files. Out: `Recipe`s, light and picklable, and the parts they stand for (`render`).
Follows LibriMix (Cosentino et al. 2020, "LibriMix: An Open-Source Dataset for Generalizable Speech Separation", section
2, and its published scripts' order of operations). Everything random comes from `sepdist.seeding.rng`.

Shapes: T samples.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np

from sepdist import audio
from sepdist.audio import AudioError
from sepdist.seeding import rng

Mode = Literal["min", "max"]
SPEECH_LUFS = (-33.0, -25.0)
NOISE_LUFS = (-38.0, -30.0)
MAX_PEAK = 0.9  # of a mixture, and of a source that would reach full scale
FADE_WINDOW_SECONDS = (
    1.0  # of the Hann window; its rising half is the cross-fade of a repeated noise
)


KEPT_BYTES = 2**30  # decoded audio that a draw keeps in memory
MAX_ATTEMPTS = 1000  # to find a combination of utterances that was not drawn before


@dataclass(frozen=True)
class Part:
    """One file of a mixture: its path below the root of its kind, and the factor on its samples."""

    path: str
    gain: float


@dataclass(frozen=True)
class Recipe:
    """One row of LibriMix's metadata: what is mixed, and how loud."""

    id: str
    sources: tuple[Part, ...]
    noise: Part | None


@dataclass(frozen=True)
class Choice:
    """What was drawn for one mixture before any audio is read; levels are targets in LUFS."""

    sources: tuple[Path, ...]
    levels: tuple[float, ...]
    noise: Path | None
    noise_level: float


def sample_key(name: str) -> str:
    """`name` with 'p' for '.', because the key of a shard's sample ends at its first dot.

    In the names of WSJ0-mix and WHAM!, `<utt1>_<level1>_<utt2>_<level2>`, fields 2, 4, ... are numbers: the first 'p'
    in those is the dot, so the original name is recovered. Elsewhere two names may meet, which `unique` reports.
    """
    return name.replace(".", "p")


def unique(keys: Sequence[str], where: str) -> None:
    """ValueError that names the first key standing twice."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ValueError(
                f"{where}: two items have the id {key!r}; rename or remove one of them"
            )
        seen.add(key)


def extend_noise(noise_T: np.ndarray, rate: int, num_samples: int) -> np.ndarray:
    """The noise cut to `num_samples`, or repeated until it lasts so long, each repeat cross-faded into the last.

    The fade is the rising half of a one-second Hann window (rate // 2 + 1 samples), as in LibriMix's scripts. Noise not
    longer than that fade, with which those scripts fail, is faded over half of its length.
    """
    size = noise_T.size
    if size >= num_samples:
        return noise_T[:num_samples]
    if size < 4:
        raise AudioError(f"a noise of {size} samples cannot be extended to {num_samples}")
    overlap = int(FADE_WINDOW_SECONDS * rate) // 2 + 1
    if size <= overlap:
        overlap = size // 2
    rise = np.hanning(2 * overlap - 1)[:overlap].astype(noise_T.dtype)
    extended = np.empty(num_samples + size, dtype=noise_T.dtype)
    extended[:size] = noise_T
    end = size
    while end < num_samples:
        seam = extended[end - overlap : end]
        seam *= rise[::-1]
        seam += rise * noise_T[:overlap]
        extended[end : end + size - overlap] = noise_T[overlap:]
        end += size - overlap
    return extended[:num_samples].copy()


def fit_lengths(waves: Sequence[np.ndarray], mode: Mode) -> list[np.ndarray]:
    """All waves cut to the shortest ("min") or zero-padded to the longest ("max")."""
    lengths = [wave.size for wave in waves]
    return [audio.fit(wave, min(lengths) if mode == "min" else max(lengths)) for wave in waves]


def _load_at(path: Path, rate: int | None, stop: int | None = None) -> tuple[np.ndarray, int]:
    wave, own = audio.load_channel(path, stop)
    if rate is not None and own != rate:
        raise AudioError(
            f"{path}: its rate is {own} Hz, the speech it is mixed with has {rate} Hz; convert one of them"
        )
    return wave, own


def render(
    recipe: Recipe,
    speech_root: str,
    noise_root: str | None,
    sample_rate: int,
    mode: Mode,
    num_sources: int,
) -> dict[str, np.ndarray]:
    """The parts of a mixture, "s1".."s<num_sources>" and "noise" if there is a root for it, float32 [T] each.

    LibriMix's order: read, noise cut or extended to the longest source, times gain, resample_poly, cut or pad over ALL
    sources of the recipe (so a Libri1Mix item has the length of its pair), clipped at full scale as a PCM file would.
    """
    waves: list[np.ndarray] = []
    rate: int | None = None
    for part in recipe.sources:
        wave, rate = _load_at(Path(speech_root) / part.path, rate)
        audio.require_rate(rate, sample_rate, str(Path(speech_root) / part.path))
        waves.append(wave)
    assert rate is not None, recipe
    names = [f"s{number}" for number in range(1, len(waves) + 1)]
    gains = [part.gain for part in recipe.sources]
    if noise_root is not None:
        if recipe.noise is None:
            raise ValueError(f"mixture {recipe.id}: its metadata names no noise; set noise=false")
        longest = max(wave.size for wave in waves)
        noise, _ = _load_at(Path(noise_root) / recipe.noise.path, rate, longest)
        waves.append(extend_noise(noise, rate, longest))
        names.append("noise")
        gains.append(recipe.noise.gain)
    scaled = [wave * np.float32(gain) for wave, gain in zip(waves, gains, strict=True)]
    fitted = fit_lengths([audio.resample_poly(wave, rate, sample_rate) for wave in scaled], mode)
    wanted = {f"s{number}" for number in range(1, num_sources + 1)} | {"noise"}
    return {
        name: np.clip(wave, -1.0, 1.0).astype(np.float32)
        for name, wave in zip(names, fitted, strict=True)
        if name in wanted
    }


def choose(
    speakers: Mapping[str, Sequence[Path]],
    noises: Sequence[Path],
    *,
    num_mixtures: int,
    num_sources: int,
    seed: int,
    split: str,
) -> list[Choice]:
    """Draw what stands in each mixture: different speakers, each as likely as any other, then one utterance of each.

    No combination of utterances is drawn twice. `noises` may be empty: then no mixture has noise.
    """
    names = sorted(speakers)
    if len(names) < num_sources:
        raise ValueError(
            f"split {split!r} has {len(names)} speakers, a mixture needs {num_sources} different ones"
        )
    chosen: list[Choice] = []
    seen: set[frozenset[Path]] = set()
    for number in range(num_mixtures):
        generator = rng(seed, "librimix draw", split, number)
        for _ in range(MAX_ATTEMPTS):
            who = [names[i] for i in generator.choice(len(names), num_sources, replace=False)]
            paths = tuple(
                speakers[name][int(generator.integers(len(speakers[name])))] for name in who
            )
            if frozenset(paths) not in seen:
                break
        else:
            total = sum(len(paths) for paths in speakers.values())
            raise ValueError(
                f"split {split!r}: no new combination after {number} of {num_mixtures} mixtures from {total} "
                f"utterances of {len(names)} speakers; lower num_mixtures"
            )
        seen.add(frozenset(paths))
        levels = tuple(float(level) for level in generator.uniform(*SPEECH_LUFS, num_sources))
        noise_level = float(generator.uniform(*NOISE_LUFS))
        noise = noises[int(generator.integers(len(noises)))] if noises else None
        chosen.append(Choice(paths, levels, noise, noise_level))
    return chosen


class _Measured:
    """Loudness, peak, length and rate of files, each decoded once; waves are kept while they fit in `KEPT_BYTES`."""

    def __init__(self) -> None:
        self._speech: dict[Path, tuple[float, float, int, int]] = {}
        self._waves: dict[Path, tuple[np.ndarray, int]] = {}
        self._bytes = 0
        self._lock = Lock()

    def wave(self, path: Path) -> tuple[np.ndarray, int]:
        """The decoded file and its rate; decoded again only where memory for it was short."""
        if path not in self._waves:
            loaded = audio.load_channel(path)
            with self._lock:
                if self._bytes + loaded[0].nbytes > KEPT_BYTES:
                    return loaded
                self._bytes += loaded[0].nbytes
                self._waves[path] = loaded
        return self._waves[path]

    def speech(self, path: Path) -> tuple[float, float, int, int]:
        """(LUFS, peak, samples, rate) of a whole file."""
        if path not in self._speech:
            wave, rate = self.wave(path)
            self._speech[path] = (
                audio.loudness(wave, rate, str(path)),
                float(np.max(np.abs(wave))),
                wave.size,
                rate,
            )
        return self._speech[path]


def guarded_gains(
    targets: Sequence[float],
    loudnesses: Sequence[float],
    peaks: Sequence[float],
    waves: Callable[[], Sequence[np.ndarray]],
) -> list[float]:
    """The gains that bring parts from their loudness to the targets, with LibriMix's two guards against clipping.

    A part that would reach full scale is put at a peak of 0.9 instead, and all are lowered together if the sum of
    `waves()` would peak above 0.9; these peak at `peaks` at most.
    """
    gains = [
        audio.db_to_gain(target - now) for target, now in zip(targets, loudnesses, strict=True)
    ]
    gains = [
        gain if gain * peak < 1.0 else MAX_PEAK / peak
        for gain, peak in zip(gains, peaks, strict=True)
    ]
    # The sum of the peaks bounds the peak of the sum, so most mixtures need no second look at their audio.
    if sum(gain * peak for gain, peak in zip(gains, peaks, strict=True)) > MAX_PEAK:
        peak = audio.peak_of_sum(waves(), gains)
        if peak > MAX_PEAK:
            gains = [gain * MAX_PEAK / peak for gain in gains]
    return gains


def _gains(choice: Choice, measured: _Measured) -> list[float]:
    """The gains of a drawn mixture in max mode, noise last.

    The noise is measured as it is heard: cut or extended to the longest source.
    LibriMix's scripts measure sources padded to the longest: on real speech their gains differ by 1e-7 dB in the median
    and at most 0.2 dB, and only this way is an utterance measured once for all its mixtures.
    """
    facts = [measured.speech(path) for path in choice.sources]
    rate = facts[0][3]
    loudnesses, peaks = [fact[0] for fact in facts], [fact[1] for fact in facts]
    targets = list(choice.levels)
    noise: np.ndarray | None = None
    for path, fact in zip(choice.sources, facts, strict=True):
        if fact[3] != rate:
            raise AudioError(
                f"{path}: its rate is {fact[3]} Hz, {choice.sources[0]} has {rate} Hz; convert one of them"
            )
    if choice.noise is not None:
        whole, own = measured.wave(choice.noise)
        if own != rate:
            raise AudioError(
                f"{choice.noise}: its rate is {own} Hz, the speech has {rate} Hz; convert one of them"
            )
        noise = extend_noise(whole, rate, max(fact[2] for fact in facts))
        loudnesses.append(audio.loudness(noise, rate, str(choice.noise)))
        peaks.append(float(np.max(np.abs(noise))))
        targets.append(choice.noise_level)
    noises = [] if noise is None else [noise]
    return guarded_gains(
        targets,
        loudnesses,
        peaks,
        lambda: [*(measured.wave(path)[0] for path in choice.sources), *noises],
    )


def draw(
    speakers: Mapping[str, Sequence[Path]],
    noises: Sequence[Path],
    speech_root: Path,
    noise_root: Path | None,
    *,
    num_mixtures: int,
    num_sources: int,
    seed: int,
    split: str,
) -> list[Recipe]:
    """`num_mixtures` new recipes by LibriMix's rules from files below the two roots (speaker -> utterances).

    Loudness of speech U(-33, -25) LUFS per source and of noise U(-38, -30) LUFS at the files' own rate; see `choose`
    and `_gains`. Equal arguments and files give equal recipes, whatever the number of threads.
    """
    choices = choose(
        speakers, noises, num_mixtures=num_mixtures, num_sources=num_sources, seed=seed, split=split
    )
    measured = _Measured()
    with ThreadPoolExecutor(max_workers=cpu_count() or 1) as pool:
        # Each file once, before mixtures that share it run side by side.
        list(
            pool.map(
                measured.speech,
                dict.fromkeys(path for choice in choices for path in choice.sources),
            )
        )
        list(
            pool.map(
                measured.wave,
                dict.fromkeys(choice.noise for choice in choices if choice.noise is not None),
            )
        )
        all_gains = list(pool.map(lambda choice: _gains(choice, measured), choices))
    recipes = []
    for choice, gains in zip(choices, all_gains, strict=True):
        sources = tuple(
            Part(path.relative_to(speech_root).as_posix(), gain)
            for path, gain in zip(choice.sources, gains[:num_sources], strict=True)
        )
        noise = None
        if choice.noise is not None:
            assert noise_root is not None
            noise = Part(choice.noise.relative_to(noise_root).as_posix(), gains[-1])
        recipes.append(Recipe("_".join(path.stem for path in choice.sources), sources, noise))
    return recipes
