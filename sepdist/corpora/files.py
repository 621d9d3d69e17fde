"""Helpers of the corpora that are folders of audio files: keys, loading, missing files."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from sepdist import audio
from sepdist.audio import AudioError


def sample_key(name: str) -> str:
    """Replace '.' by 'p', because the key of a shard's sample ends at its first dot.

    In the names of WSJ0-mix and WHAM!, `<utt1>_<level1>_<utt2>_<level2>`, fields 2, 4, ... are
    numbers: the first 'p' in those is the dot, so the original name can be recovered. Elsewhere two
    names may become one key, which `require_unique` reports.
    """
    return name.replace(".", "p")


def require_unique(keys: Iterable[str], where: str) -> None:
    """Raise ValueError naming a key that occurs twice."""
    for key, count in Counter(keys).most_common(1):
        if count > 1:
            raise ValueError(f"{where}: two items have the id {key!r}; rename or remove one")


def require_files(paths: Iterable[Path], advice: str) -> None:
    """Raise AudioError naming the first missing file, the number of missing files and `advice`."""
    paths = set(paths)
    if missing := sorted(path for path in paths if not path.is_file()):
        count = f"{len(missing)} of {len(paths)} are missing"
        raise AudioError(f"{missing[0]}: no such file ({count}); {advice}")


def load(
    path: str,
    sample_rate: int,
    resample: Callable[[np.ndarray, int, int], np.ndarray] = audio.resample,
) -> np.ndarray:
    """Load the first channel of a file, float32 [T] at `sample_rate`; lower rates are an error."""
    wave, rate = audio.load_channel(path)
    audio.require_rate(rate, sample_rate, path)
    return np.clip(resample(wave, rate, sample_rate), -1.0, 1.0)


def load_generated(paths: Mapping[str, Path], sample_rate: int) -> dict[str, np.ndarray]:
    """Load the members of a mixture, float32 [T]; AudioError unless rates and lengths are equal."""
    members: dict[str, np.ndarray] = {}
    for member, path in paths.items():
        wave, rate = audio.load_channel(path)
        audio.require_rate(rate, sample_rate, str(path), exactly=True)
        members[member] = wave
        first = next(iter(members))
        if wave.size != members[first].size:
            raise AudioError(
                f"{path}: {wave.size} samples where {paths[first]} has {members[first].size}; "
                "generate it again"
            )
    return members
