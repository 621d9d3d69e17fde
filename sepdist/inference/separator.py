"""Separate recordings of any length and rate into one file per speaker."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import nn

from sepdist import storage
from sepdist.inference.stitching import (
    SeparationError,
    Windows,
    cut_windows,
    overlap_add,
    resampled,
    run_windows,
)

BLOCK_SAMPLES = 1 << 16
PEAK_LIMIT = 0.99
FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16")}


@dataclass
class Separation:
    """What `separate_file` made."""

    outputs: list[str]
    num_samples: int
    sample_rate: int
    gains: list[
        float
    ]  # by speaker: from the model's level to the recording's, the common scale not included
    scale: float  # common to all speakers; below 1 where an output would have clipped
    warnings: list[str] = field(default_factory=list)


def separate_file(
    model: nn.Module,
    model_rate: int,
    recording: str | Path,
    output_folder: str | Path,
    *,
    windows: Windows | None = None,
    file_format: str = "wav",
    device: torch.device | str = "cpu",
    progress: Callable[[float, float], None] = lambda seconds, total: None,
) -> Separation:
    """Separate one recording (path or s3://) into `output_folder`; existing outputs are replaced, each as a whole.

    `model` maps [B, T] at `model_rate` to [B, S, T]. A silent recording gives silent outputs and a warning. `progress`
    is called with the seconds read so far and in all. Beside the outputs it needs 4 bytes of disk per sample of each.

    Raises:
        SeparationError: the recording is empty, unreadable, cut short or holds NaN, or the model gives NaN.
    """
    recording, output_folder = str(recording), str(output_folder)
    if file_format not in FORMATS:
        raise SeparationError(f"format {file_format!r} is not one of {', '.join(FORMATS)}")
    with _work_folder(output_folder) as work:
        path = Path(recording)
        if storage.is_remote(recording):
            path = work / "recording"
            storage.fetch_file(recording, path)
        with _open(path, recording) as sound:
            num_samples, rate = sound.frames, sound.samplerate
            fit = _LevelFit()
            mono = _mono_blocks(sound, recording, progress)
            estimates = _estimate(
                model, model_rate, rate, mono, windows or Windows(), recording, device, fit
            )
            raw = _RawEstimates(work / "estimates.f32", num_samples, estimates)
        gains = fit.gains()
        loudest = float(np.max(np.abs(gains) * raw.peaks))
        scale = min(1.0, PEAK_LIMIT / loudest) if loudest > 0 else 1.0
        warnings = (
            []
            if fit.heard
            else [f"{recording} (the mean of its channels) is silent; so are its outputs"]
        )
        if scale < 1:
            warnings.append(
                f"{recording}: all outputs are scaled by {scale:.3f}, because one would have clipped"
            )
        names = output_names(recording, len(gains), file_format)
        written = [work / name for name in names]
        raw.write(written, gains * scale, rate, file_format)
        outputs = [storage.join(output_folder, name) for name in names]
        for local, output in zip(written, outputs, strict=True):
            if storage.is_remote(output):
                storage.put_file(local, output)
            else:
                local.replace(output)
    return Separation(outputs, num_samples, rate, gains.tolist(), scale, warnings)


def output_names(recording: str, num_speakers: int, file_format: str) -> list[str]:
    """File names of the outputs, <stem>_s1.wav and so on."""
    return [
        f"{PurePosixPath(recording).stem}_s{number}.{file_format}"
        for number in range(1, num_speakers + 1)
    ]


@contextmanager
def _work_folder(output_folder: str) -> Iterator[Path]:
    """A folder for unfinished files: inside a local output folder, so that finishing one is a rename."""
    parent = None
    if not storage.is_remote(output_folder):
        parent = Path(output_folder)
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".separating-", dir=parent) as folder:
        yield Path(folder)


def _open(path: Path, name: str) -> soundfile.SoundFile:
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    try:
        sound = soundfile.SoundFile(str(path))
    except soundfile.LibsndfileError as error:
        raise SeparationError(
            f"{name} is not audio that can be read ({error.error_string})"
        ) from error
    if sound.frames == 0:
        sound.close()
        raise SeparationError(f"{name} is empty: it has no samples")
    return sound


def _mono_blocks(
    sound: soundfile.SoundFile, name: str, progress: Callable[[float, float], None]
) -> Iterator[np.ndarray]:
    """The mean of the channels in float32 blocks [n], checked; as many samples as the header promises."""
    done = 0
    while done < sound.frames:
        try:
            block = sound.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise SeparationError(
                f"{name} is damaged {done / sound.samplerate:.2f} s from its start: {error}"
            ) from error
        if len(block) == 0:
            raise SeparationError(
                f"{name} is cut short: it ends after {done} of {sound.frames} samples"
            )
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            at = (done + int(np.argmin(finite))) / sound.samplerate
            raise SeparationError(
                f"{name} holds a sample that is not a number, {at:.4f} s from its start"
            )
        done += len(block)
        yield block.mean(axis=1)
        progress(done / sound.samplerate, sound.frames / sound.samplerate)


def _estimate(
    model: nn.Module,
    model_rate: int,
    rate: int,
    mono: Iterator[np.ndarray],
    windows: Windows,
    name: str,
    device: torch.device | str,
    fit: "_LevelFit",
) -> Iterator[np.ndarray]:
    """Raw estimates [S, n] at the recording's rate, in order; `fit` sees them with the mixture at the model's rate."""
    size = max(round(windows.window_seconds * model_rate), int(getattr(model, "min_length", 1)))
    overlap = min(round(windows.overlap_seconds * model_rate), size // 2)
    if overlap < 1:
        raise SeparationError(
            f"an overlap of {windows.overlap_seconds} s is less than one sample at {model_rate} Hz"
        )
    blocks = resampled((block[None] for block in mono), rate, model_rate)
    cut = cut_windows((block[0] for block in blocks), size, overlap)

    def fitted() -> Iterator[np.ndarray]:
        for joined in overlap_add(
            run_windows(model, cut, windows.batch_size, name, model_rate, device), overlap
        ):
            fit.add(mixture=joined[-1], estimates=joined[:-1])
            yield joined[:-1]

    return resampled(fitted(), model_rate, rate)


class _LevelFit:
    """Least squares over a stream: the gain per speaker with which the sum of the estimates is nearest the mixture."""

    def __init__(self) -> None:
        self.gram: np.ndarray | None = None  # [S, S], estimates with estimates
        self.projection: np.ndarray | None = None  # [S], estimates with the mixture
        self.heard = False

    def add(self, mixture: np.ndarray, estimates: np.ndarray) -> None:
        wide = estimates.astype(np.float64)
        gram, projection = wide @ wide.T, wide @ mixture.astype(np.float64)
        self.gram = gram if self.gram is None else self.gram + gram
        self.projection = projection if self.projection is None else self.projection + projection
        self.heard = self.heard or bool(mixture.any())

    def gains(self) -> np.ndarray:
        """[S]; a silent estimate gets 0, and estimates that cannot be told apart share (least norm)."""
        assert self.gram is not None and self.projection is not None
        level = np.sqrt(np.diag(self.gram))
        unit = np.divide(1.0, level, out=np.zeros_like(level), where=level > 0)
        solution, *_ = np.linalg.lstsq(
            self.gram * np.outer(unit, unit), self.projection * unit, rcond=1e-6
        )
        return solution * unit


class _RawEstimates:
    """Estimates at the model's level in a scratch file of float32 frames, cut or padded to `num_samples`."""

    def __init__(self, path: Path, num_samples: int, blocks: Iterable[np.ndarray]) -> None:
        self.path = path
        self.peaks = np.zeros(1)  # [S], of what is in the file
        done = 0
        with path.open("wb") as file:
            for block in blocks:
                kept = block[:, : num_samples - done]
                done += kept.shape[1]
                self.peaks = np.maximum(self.peaks, np.abs(kept).max(axis=1, initial=0.0))
                self._put(file, kept)
            # Resampling there and back may fall short by a sample or two of rounding: those are silence.
            self._put(file, np.zeros((len(self.peaks), num_samples - done)))

    def _put(self, file: BinaryIO, block: np.ndarray) -> None:
        try:
            file.write(np.ascontiguousarray(block.T, dtype="<f4").tobytes())
        except OSError as error:
            raise storage.disk_error(self.path, "write", error) from error

    def write(self, paths: list[Path], gains: np.ndarray, rate: int, file_format: str) -> None:
        """One audio file per speaker, each sample multiplied by its speaker's gain."""
        container, subtype = FORMATS[file_format]
        try:
            with ExitStack() as stack, self.path.open("rb") as stream:
                files = [
                    stack.enter_context(
                        soundfile.SoundFile(str(path), "w", rate, 1, subtype, format=container)
                    )
                    for path in paths
                ]
                while len(data := stream.read(4 * len(gains) * BLOCK_SAMPLES)):
                    frames = np.frombuffer(data, dtype="<f4").reshape(-1, len(gains)) * gains
                    for speaker, file in enumerate(files):
                        file.write(frames[:, speaker])
        except soundfile.LibsndfileError as error:
            raise OSError(
                f"{paths[0].name} could not be written ({error}); is the disk full?"
            ) from error
