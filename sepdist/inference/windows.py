"""Options of a separation and the names of its outputs; without NumPy, so that TAB is fast."""

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


def output_names(recording: str, num_speakers: int, file_format: str) -> list[str]:
    """File names of the outputs, <stem>_s1.wav and so on."""
    stem = PurePosixPath(recording).stem
    return [f"{stem}_s{number}.{file_format}" for number in range(1, num_speakers + 1)]
