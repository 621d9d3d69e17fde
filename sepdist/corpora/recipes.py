"""LibriMix's recipes: which files are mixed at which gains, drawn and rendered to audio.

Follows LibriMix (Cosentino et al. 2020, "LibriMix: An Open-Source Dataset for Generalizable Speech
Separation", section 2) and the order of operations of its published scripts.

Shapes: T samples.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sepdist import audio
from sepdist.audio import AudioError
from sepdist.seeding import rng

Mode = Literal["min", "max"]
SPEECH_LUFS = (-33.0, -25.0)
NOISE_LUFS = (-38.0, -30.0)
MAX_PEAK = 0.9  # of a mixture, and of a source that would reach full scale
MAX_ATTEMPTS = 1000  # to find a combination of utterances that was not drawn before


class Clip(NamedTuple):
    """One file of a mixture: its path below speech_root or noise_root, and its gain."""

    path: str
    gain: float


class Recipe(NamedTuple):
    """One row of LibriMix's metadata: what is mixed, and how loud."""

    id: str
    sources: tuple[Clip, ...]
    noise: Clip | None


class Choice(NamedTuple):
    """The draw of one mixture, before any audio is read; levels are targets in LUFS."""

    sources: tuple[Path, ...]
    levels: tuple[float, ...]
    noise: Path | None
    noise_level: float


def extend_noise(noise_T: np.ndarray, rate: int, num_samples: int) -> np.ndarray:
    """Cut the noise to `num_samples`, or repeat it up to that length with cross-faded seams.

    The fade is the rising half of a one-second Hann window (rate // 2 + 1 samples), as in
    LibriMix's scripts. Those fail on noise not longer than the fade; here half of it is faded.
    """
    size = noise_T.size
    if size >= num_samples:
        return noise_T[:num_samples]
    if size < 4:
        raise AudioError(f"a noise of {size} samples cannot be extended to {num_samples}")
    overlap = rate // 2 + 1 if size > rate // 2 + 1 else size // 2
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
    """Cut all waves to the shortest ("min") or zero-pad them to the longest ("max")."""
    size = (min if mode == "min" else max)(wave.size for wave in waves)
    return [audio.fit(wave, size) for wave in waves]


def _require_equal_rates(path: Path | None, rate: int, speech_rate: int) -> None:
    if rate != speech_rate:
        other = f"the speech it is mixed with has {speech_rate} Hz"
        raise AudioError(f"{path}: its rate is {rate} Hz, but {other}; convert one of them")


def render(
    recipe: Recipe,
    speech_root: Path,
    noise_root: Path | None,
    sample_rate: int,
    mode: Mode,
    num_sources: int,
) -> dict[str, np.ndarray]:
    """Load the members of a mixture, float32 [T]: s1, ..., and "noise" if there is a `noise_root`.

    LibriMix's order: read, noise cut or extended to the longest source, times gain, resample_poly,
    cut or pad over ALL sources of the recipe (a Libri1Mix item has the length of its pair), clipped
    at full scale as a PCM file would be.
    """
    paths = [speech_root / clip.path for clip in recipe.sources]
    loaded = [audio.load_channel(path) for path in paths]
    rate = loaded[0][1]
    for path, (_, own) in zip(paths, loaded, strict=True):
        _require_equal_rates(path, own, rate)
        audio.require_rate(own, sample_rate, str(path))
    waves = [wave * np.float32(c.gain) for (wave, _), c in zip(loaded, recipe.sources, strict=True)]
    if noise_root is not None:
        if recipe.noise is None:
            raise ValueError(f"mixture {recipe.id}: its metadata names no noise; set noise=false")
        longest = max(wave.size for wave in waves)
        noise, own = audio.load_channel(path := noise_root / recipe.noise.path, longest)
        _require_equal_rates(path, own, rate)
        waves.append(extend_noise(noise, rate, longest) * np.float32(recipe.noise.gain))
        paths.append(path)
    fitted = fit_lengths([audio.resample_poly(wave, rate, sample_rate) for wave in waves], mode)
    clipped = [audio.clip(wave, str(path)) for wave, path in zip(fitted, paths, strict=True)]
    members = {f"s{i}": wave for i, wave in enumerate(clipped[:num_sources], start=1)}
    return members if noise_root is None else members | {"noise": clipped[-1]}


def choose(
    speakers: Mapping[str, Sequence[Path]],
    noises: Sequence[Path],
    num_mixtures: int,
    num_sources: int,
    seed: int,
    split: str,
    even: bool = False,
) -> list[Choice]:
    """Draw the files and levels of each mixture: speakers uniformly, then one utterance of each.

    With `even` each source is of the utterances that were drawn least so far, or where those give
    no new combination, a little more often. The speakers of a mixture differ, and no combination of
    utterances is drawn twice. Loudness is U(-33, -25) LUFS for each source and U(-38, -30) LUFS for
    the noise, at the files' own rate. Without `noises` no mixture has noise.
    """
    names = sorted(speakers)
    if len(names) < num_sources:
        needs = f"a mixture needs {num_sources} of them"
        raise ValueError(f"split {split!r} has {len(names)} speakers, {needs}")
    chosen: list[Choice] = []
    seen: set[frozenset[Path]] = set()
    drawn_before: Counter[Path] = Counter()
    for number in range(num_mixtures):
        draw = rng(seed, "librimix draw", split, number)
        for attempt in range(MAX_ATTEMPTS):
            if even:
                slack = attempt * 10 // MAX_ATTEMPTS  # for the last ones of a round
                paths = _least_drawn(speakers, drawn_before, num_sources, slack, draw)
            else:
                numbers = draw.choice(len(names), num_sources, replace=False)
                drawn = [speakers[names[number]] for number in numbers]
                paths = tuple(own[int(draw.integers(len(own)))] for own in drawn)
            if frozenset(paths) not in seen:
                break
        else:
            total = sum(len(paths) for paths in speakers.values())
            after = f"after {number} of {num_mixtures} mixtures"
            pool = f"from {total} utterances of {len(names)} speakers; lower num_mixtures"
            raise ValueError(f"split {split!r}: no new combination {after} {pool}")
        seen.add(frozenset(paths))
        drawn_before.update(paths)
        levels = tuple(draw.uniform(*SPEECH_LUFS, num_sources).tolist())
        noise_level = float(draw.uniform(*NOISE_LUFS))
        noise = noises[int(draw.integers(len(noises)))] if noises else None
        chosen.append(Choice(paths, levels, noise, noise_level))
    return chosen


def _least_drawn(
    speakers: Mapping[str, Sequence[Path]],
    drawn: Mapping[Path, int],
    num_sources: int,
    slack: int,
    draw: np.random.Generator,
) -> tuple[Path, ...]:
    """Draw sources of different speakers, each from the least drawn of the remaining utterances."""
    rest, paths = dict(sorted(speakers.items())), []
    for _ in range(num_sources):
        least = min(drawn[path] for own in rest.values() for path in own)
        open_ = [(n, one) for n, own in rest.items() for one in own if drawn[one] <= least + slack]
        name, path = open_[int(draw.integers(len(open_)))]
        paths.append(path)
        del rest[name]
    return tuple(paths)


class _Measures(NamedTuple):
    lufs: float
    peak: float
    size: int
    rate: int


def _measure(path: Path, wave_T: np.ndarray, rate: int) -> _Measures:
    lufs = audio.loudness(wave_T, rate, str(path))
    return _Measures(lufs, float(np.max(np.abs(wave_T))), wave_T.size, rate)


def guarded_gains(
    targets: Sequence[float],
    loudnesses: Sequence[float],
    peaks: Sequence[float],
    waves: Callable[[], Sequence[np.ndarray]],
) -> list[float]:
    """Return the gains from loudnesses to targets (LUFS), with LibriMix's guards against clipping.

    A wave that would reach full scale gets a peak of 0.9 instead, and all gains are lowered
    together if the sum of `waves()` would peak above 0.9. `peaks` bound the peaks of these waves.
    """
    gains = []
    for target, now, peak in zip(targets, loudnesses, peaks, strict=True):
        gain = 10.0 ** ((target - now) / 20.0)
        gains.append(gain if gain * peak < 1.0 else MAX_PEAK / peak)
    # The sum of the peaks bounds the peak of the sum, so most mixtures are not summed.
    if sum(gain * peak for gain, peak in zip(gains, peaks, strict=True)) > MAX_PEAK:
        highest = audio.peak_of_sum(waves(), gains)
        if highest > MAX_PEAK:
            gains = [gain * MAX_PEAK / highest for gain in gains]
    return gains


def _gains(measures: Mapping[Path, _Measures], choice: Choice) -> list[float]:
    """Return the gains of a drawn mixture in max mode, noise last.

    The noise is measured as it will be mixed, cut or extended to the longest source. Sources are
    measured whole, not padded to the longest as in LibriMix's scripts: on real speech the gains
    differ by 1e-7 dB in the median, at most by 0.2 dB, and an utterance is measured only once.
    """
    found = [measures[path] for path in choice.sources]
    rate, longest = found[0].rate, max(one.size for one in found)
    targets, noises = list(choice.levels), []
    if choice.noise is not None:
        noise, own = audio.load_channel(choice.noise, longest)
        noises.append(extend_noise(noise, own, longest))
        found.append(_measure(choice.noise, noises[0], own))
        targets.append(choice.noise_level)
    for path, one in zip((*choice.sources, choice.noise), found, strict=False):
        _require_equal_rates(path, one.rate, rate)
    return guarded_gains(
        targets,
        [one.lufs for one in found],
        [one.peak for one in found],
        lambda: [*(audio.load_channel(path)[0] for path in choice.sources), *noises],
    )


def level(choices: Sequence[Choice], speech_root: Path, noise_root: Path | None) -> list[Recipe]:
    """Turn drawn mixtures into recipes with measured gains, equal for any number of threads."""
    used = list(dict.fromkeys(path for choice in choices for path in choice.sources))

    def recipe(choice: Choice) -> Recipe:
        gains, noise = _gains(measures, choice), None
        if choice.noise and noise_root:
            noise = Clip(choice.noise.relative_to(noise_root).as_posix(), gains.pop())
        paths = [path.relative_to(speech_root).as_posix() for path in choice.sources]
        sources = tuple(map(Clip, paths, gains))
        return Recipe("_".join(path.stem for path in choice.sources), sources, noise)

    with ThreadPoolExecutor(cpu_count()) as pool:
        # A source is measured once, however many mixtures it is in.
        measured = pool.map(lambda path: _measure(path, *audio.load_channel(path)), used)
        measures = dict(zip(used, measured, strict=True))
        return list(pool.map(recipe, choices))
