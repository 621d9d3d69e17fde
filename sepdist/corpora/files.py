"""Helpers of the corpora that are folders of audio files: keys, tables, loading, missing files."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from sepdist import audio
from sepdist.audio import AudioError

logger = logging.getLogger(__name__)


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


def report_left_out(where: Path | str, count: int, what: str) -> None:
    """Log how much of a corpus is not used, unless it is nothing."""
    if count:
        logger.warning("%s: left out %d %s", where, count, what)


def read_text(path: Path) -> str:
    """Read a text in UTF-8, with or without a byte-order mark; ValueError names another file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8 ({error}); save it as UTF-8") from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file whose first line names its columns; ValueError names it."""
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: is not a CSV file ({error})") from error


def load(
    path: str,
    sample_rate: int,
    resample: Callable[[np.ndarray, int, int], np.ndarray] = audio.resample,
) -> np.ndarray:
    """Load the first channel of a file, float32 [T] at `sample_rate`; lower rates are an error."""
    wave, rate = audio.load_channel(path)
    audio.require_rate(rate, sample_rate, path)
    return audio.clip(resample(wave, rate, sample_rate), path)


def load_generated(
    paths: Mapping[str, Path], sample_rate: int, mixture: Path | None = None
) -> dict[str, np.ndarray]:
    """Load the members of a mixture, float32 [T]; AudioError unless rates and lengths are equal.

    If there is a file `mixture`, it has to be their sum, but for clipping and the rounding of each
    file to 16 bits.
    """
    members: dict[str, np.ndarray] = {}
    files = {**paths, "mix": mixture} if mixture and mixture.is_file() else paths
    for member, path in files.items():
        wave, rate = audio.load_channel(path, may_be_silent=True)
        audio.require_rate(rate, sample_rate, str(path), exactly=True)
        members[member] = wave
        first = next(iter(members))
        if wave.size != members[first].size:
            other = f"{paths[first]} has {members[first].size}"
            raise AudioError(f"{path}: {wave.size} samples where {other}; generate it again")
    if (mixed := members.pop("mix", None)) is not None:
        total = np.clip(sum(members.values()), -1.0, 1.0)
        off = float(np.max(np.abs(mixed - total))) / audio.SILENCE
        if off > len(files) / 2 + 0.5:
            differs = f"it differs by up to {off:.0f} steps of 16 bits; generate it again"
            raise AudioError(f"{mixture}: is not the sum of {', '.join(members)}, {differs}")
    return members
