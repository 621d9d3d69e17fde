"""Options of a separation and the names of its outputs; without NumPy, so that TAB is fast."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

FORMATS = {"flac": ("PCM_16", "PCM_24"), "wav": ("PCM_16", "PCM_24", "FLOAT")}  # of the outputs
PCM = {"s16le": "<i2", "f32le": "<f4"}  # of streams


class SeparationError(ValueError):
    """A recording that cannot be separated; the message names it and says what to do."""


@dataclass(frozen=True)
class Windows:
    """The windows of a recording; `batch_size` of them are separated at once."""

    window_seconds: float = 8.0
    overlap_seconds: float = 4.0  # at most half of a window
    batch_size: int = 1  # more are no faster on a CPU, and twice as slow with glibc's defaults

    def __post_init__(self) -> None:
        if not 0 < self.overlap_seconds <= self.window_seconds / 2 < float("inf"):
            raise SeparationError(
                f"an overlap of {self.overlap_seconds} s does not fit a window of "
                f"{self.window_seconds} s: it must be above 0 and at most half of it"
            )
        if self.batch_size < 1:
            raise SeparationError(f"a batch has at least one window, not {self.batch_size}")


def output_stems(recordings: Sequence[str]) -> dict[str, str]:
    """The stem of each recording's outputs; a recording that is named twice is there once.

    Recordings of one stem keep their paths below the folder that all share, as in a/x and b/x, and
    their suffixes if only these differ.
    """
    given = ("stdin" if one == "-" else one for one in recordings)
    places = (f"/{one}" if "://" in one else os.path.expanduser(one) for one in given)
    names = {os.path.abspath(place): one for place, one in zip(places, recordings, strict=True)}
    common, candidates = os.path.commonpath(map(os.path.dirname, names)), {}
    for place, name in names.items():
        relative = os.path.relpath(place, common)
        candidates[name] = (PurePosixPath(place).stem, os.path.splitext(relative)[0], relative)
    counts = Counter(one for own in candidates.values() for one in set(own))
    return {
        name: next((one for one in own if counts[one] == 1), own[-1])
        for name, own in candidates.items()
    }


def output_names(stem: str, num_speakers: int, file_format: str) -> list[str]:
    """File names of the outputs, <stem>_s1.wav and so on."""
    return [f"{stem}_s{number}.{file_format}" for number in range(1, num_speakers + 1)]


def check_options(
    output: str, file_format: str, subtype: str, channels: str | int, num: int = 1024, of: str = ""
) -> range:
    """Return the channels to separate, from 1, of `num`; 0 alone stands for the mean of all.

    SeparationError for options that are not known or do not fit each other or the recording `of`.
    """
    if subtype not in ("", *FORMATS.get(file_format, ())) or file_format not in FORMATS:
        known = "; ".join(f"{name} with {', '.join(some)}" for name, some in FORMATS.items())
        raise SeparationError(f"outputs of {file_format} {subtype}: there are {known}")
    if output == "-" and channels == "each":
        raise SeparationError("standard output takes one channel: channels=1, 2, ... or mean")
    if channels in ("mean", "each"):
        return range(1) if channels == "mean" else range(1, num + 1)
    if not str(channels).isdecimal() or not 1 <= int(channels) <= num:
        raise SeparationError(f"{of} channels={channels}: there are mean, each and 1 to {num}")
    return range(int(channels), int(channels) + 1)
