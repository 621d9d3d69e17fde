"""Helpers of the corpora that are folders of audio files: keys, tables, loading, missing files."""

import csv
import hashlib
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sepdist import audio
from sepdist.audio import AudioError

logger = logging.getLogger(__name__)
MAX_KEY_BYTES = 100 - len(".noise.flac")  # of a file name in a ustar archive


def sample_key(name: str) -> str:
    """Make a name the key of a sample: '-' for '/', 'p' for '.', and cut, with a hash, at 89 bytes.

    A WebDataset key ends at its first dot. In the names of WSJ0-mix and WHAM!,
    `<utt1>_<level1>_<utt2>_<level2>`, the first 'p' in fields 2, 4, ... is the dot, so the original
    name can be recovered. Elsewhere two names may become one key, which `require_unique` reports.
    """
    key = re.sub(r"[\x00-\x1f\x7f]", "_", printable(name).replace("/", "-").replace(".", "p"))
    if len(key.encode()) <= MAX_KEY_BYTES:
        return key
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
    return f"{key.encode()[: MAX_KEY_BYTES - 13].decode(errors='ignore')}-{digest}"


def printable(name: str) -> str:
    """Write the bytes of a file name that are not UTF-8 as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


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
        return path.read_text("utf-8-sig")  # lines end in \n; `splitlines` knows more, as U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8 ({error}); save it as UTF-8") from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file whose first line names its columns; ValueError names what is wrong with it.

    A .tsv file has tabs between its columns, and quotes in it mean nothing.
    """
    text, tabs = io.StringIO(read_text(path), newline=""), path.suffix == ".tsv"
    kind: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    rows = csv.DictReader(text, **kind)
    try:
        found = []
        for row in rows:
            if None in row:
                more = f"has more cells than columns ({', '.join(rows.fieldnames or ())})"
                raise ValueError(f"{path}, line {rows.line_num}: {more}")
            found.append(row)
        return found
    except csv.Error as error:
        where = f"{path}, line {rows.line_num}"
        raise ValueError(f"{where}: is not a CSV file ({error}); check its quotes") from error


def load(
    path: str,
    sample_rate: int,
    resample: Callable[[np.ndarray, int, int], np.ndarray] = audio.resample,
    *,
    exactly: bool = False,
) -> np.ndarray:
    """Load the first channel of a file, float32 [T] at `sample_rate`; lower rates are an error."""
    wave, rate = audio.load_channel(path)
    audio.require_rate(rate, sample_rate, path, exactly=exactly)
    return audio.clip(resample(wave, rate, sample_rate), path)


def read_members(
    paths: Mapping[str, Path], sample_rate: int = 0, *, exactly: bool = False
) -> tuple[dict[str, np.ndarray], int]:
    """Read the files of a mixture, float32 [T], and their rate; AudioError unless all are alike."""
    members, rate = dict[str, np.ndarray](), sample_rate
    for member, path in paths.items():
        members[member], found = audio.load_channel(path, may_be_silent=True)
        audio.require_rate(found, rate, str(path), exactly=exactly or len(members) > 1)
        rate, first = found, next(iter(members))
        if (size := members[member].size) != members[first].size:
            other = f"{paths[first]} has {members[first].size}"
            raise AudioError(f"{path}: {size} samples where {other}; generate it again")
    return members, rate


def load_generated(
    paths: Mapping[str, Path],
    sample_rate: int,
    mixture: Path | None = None,
    *,
    own: bool = False,
    exactly: bool = True,
) -> dict[str, np.ndarray]:
    """Load the members of a mixture, float32 [T]; AudioError unless rates and lengths are equal.

    If there is a file `mixture`, it has to be their sum, but for clipping and the rounding of each
    file to 16 bits. With `own` it need not be, and is the member "mix". Without `exactly`, higher
    rates are resampled.
    """
    keep = mixture is not None and (own or mixture.is_file())
    files = {**paths, "mix": mixture} if keep and mixture else paths
    members, rate = read_members(files, sample_rate, exactly=exactly)
    if keep and not own and (off := off_sum(members.pop("mix"), members.values())):
        wrong = f"is not the sum of {', '.join(members)}, off by up to {off:.0f} steps of 16 bits"
        raise AudioError(f"{mixture}: {wrong}; generate it again, or keep it (mixture=own)")
    waves = {name: audio.resample(wave, rate, sample_rate) for name, wave in members.items()}
    return {name: audio.clip(wave, str(files[name])) for name, wave in waves.items()}


def off_sum(mixed_T: np.ndarray, waves: Iterable[np.ndarray]) -> float:
    """By how many steps of 16 bits a mixture is off the sum, both clipped; 0 within rounding."""
    waves = list(waves)
    total = np.clip(sum(waves), -1.0, 1.0)
    off = float(np.max(np.abs(np.clip(mixed_T, -1.0, 1.0) - total))) / audio.SILENCE
    return off if off > len(waves) / 2 + 1 else 0.0
