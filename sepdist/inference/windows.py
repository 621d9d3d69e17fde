"""Options of a separation and the names of its outputs; without NumPy, so that TAB is fast."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

FORMATS = ("flac", "wav")  # of the outputs


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


def output_stems(recordings: Iterable[str]) -> dict[str, str]:
    """The stem of each recording's outputs; one that is named twice is there once.

    It is the stem of the recording, with as many of its folders as tell it from the others:
    a/talk.wav and b/talk.wav have a/talk and b/talk. Where only suffixes differ, they are kept.
    """
    found = {os.path.abspath(os.path.expanduser(one)): one for one in recordings}
    candidates = {}
    for place, name in found.items():
        *folders, last = PurePosixPath(place).parts
        ends = dict.fromkeys((PurePosixPath(last).stem, last))
        starts = [folders[depth:] for depth in range(len(folders), 0, -1)]
        candidates[name] = ["/".join([*start, end]) for end in ends for start in starts]
    counts = Counter(itertools.chain(*candidates.values()))
    return {
        name: next((one for one in own if counts[one] == 1), f"{own[0]}#{number}")
        for number, (name, own) in enumerate(candidates.items())
    }


def output_names(stem: str, num_speakers: int, file_format: str) -> list[str]:
    """File names of the outputs, <stem>_s1.wav and so on."""
    return [f"{stem}_s{number}.{file_format}" for number in range(1, num_speakers + 1)]
