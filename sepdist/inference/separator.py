"""Separate recordings of any length and rate into one file per speaker."""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import nn

from sepdist import storage
from sepdist.inference.stitching import (
    FORMATS,
    SeparationError,
    Windows,
    cut_windows,
    output_names,
    overlap_add,
    resampled,
)

BLOCK_SAMPLES = 1 << 16
PEAK_LIMIT = 0.99


@dataclass
class Separation:
    """The outputs of `separate_file` and how they were scaled."""

    outputs: list[str]
    num_samples: int
    sample_rate: int
    gains: list[float]  # by speaker, from the model's level to the recording's, without `scale`
    scale: float  # common to all speakers; below 1 where an output would have clipped
    warnings: list[str]


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
    """Separate a recording (path or s3://) into `output_folder`, replacing each output as a whole.

    `model` maps [B, T] at `model_rate` to [B, S, T]. A silent recording gives silent outputs and a
    warning. `progress` gets the seconds of each block read, and the seconds of the recording.
    Memory does not grow with the recording; scratch files take 4 bytes per sample of each output.

    Raises:
        SeparationError: the recording is empty, unreadable, cut short or holds NaN, or the model
            gives NaN.
    """
    recording, output_folder = str(recording), str(output_folder)
    windows = windows or Windows()
    if file_format not in FORMATS:
        raise SeparationError(f"format {file_format!r} is not one of {', '.join(FORMATS)}")
    local = None if storage.is_remote(output_folder) else Path(output_folder)
    if local:
        local.mkdir(parents=True, exist_ok=True)
    # Unfinished files lie in the output folder, where finishing one is a rename.
    with tempfile.TemporaryDirectory(prefix=".separating-", dir=local) as folder:
        work = Path(folder)
        path, scratch = Path(recording), work / "estimates.f32"
        if storage.is_remote(recording):
            path = work / "recording"
            storage.fetch_file(recording, path)
        with _open(path, recording) as sound:
            num_samples, rate = sound.frames, sound.samplerate
            size, overlap = _sizes(model, model_rate, windows)
            mono = resampled(_mono_blocks(sound, recording, progress), rate, model_rate)
            cut = cut_windows((block[0] for block in mono), size, overlap)
            separated = run_windows(model, cut, windows.batch_size, recording, device)
            fit = LevelFit(overlap_add(separated, overlap))
            peaks = _write_raw(scratch, resampled(fit, model_rate, rate), num_samples)
        gains, warnings = fit.gains(), []
        loudest = float(np.max(np.abs(gains) * peaks))
        scale = PEAK_LIMIT / max(loudest, PEAK_LIMIT)
        if fit.products[-1, -1] == 0:  # the energy of the mixture
            warnings.append(f"{recording} (the mean of its channels) is silent; so are its outputs")
        if scale < 1:
            why = "because one would have clipped"
            warnings.append(f"{recording}: all outputs are scaled by {scale:.3f}, {why}")
        names = output_names(recording, len(gains), file_format)
        outputs = [storage.join(output_folder, name) for name in names]
        _write_audio([work / name for name in names], scratch, gains * scale, rate)
        for name, output in zip(names, outputs, strict=True):
            if local:
                (work / name).replace(output)
            else:
                storage.put_file(work / name, output)
    return Separation(outputs, num_samples, rate, gains.tolist(), scale, warnings)


def _open(path: Path, name: str) -> soundfile.SoundFile:
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    try:
        return soundfile.SoundFile(str(path))
    except soundfile.LibsndfileError as error:
        raise SeparationError(f"{name} is not readable audio ({error.error_string})") from error


def _sizes(model: nn.Module, rate: int, windows: Windows) -> tuple[int, int]:
    """Samples of a window and of an overlap."""
    size = max(round(windows.window_seconds * rate), int(getattr(model, "min_length", 1)))
    overlap = min(round(windows.overlap_seconds * rate), size // 2)
    if overlap < 1:
        raise SeparationError(
            f"an overlap of {windows.overlap_seconds} s is less than one sample at {rate} Hz"
        )
    return size, overlap


def _mono_blocks(
    sound: soundfile.SoundFile, name: str, progress: Callable[[float, float], None]
) -> Iterator[np.ndarray]:
    """The mean of the channels in float32 blocks [1, n], as many samples as the header promises."""
    if sound.frames == 0:
        raise SeparationError(f"{name} is empty: it has no samples")
    rate, done = sound.samplerate, 0
    while done < sound.frames:
        try:
            block = sound.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise SeparationError(
                f"{name} is damaged {done / rate:.2f} s from its start: {error}"
            ) from error
        if len(block) == 0:
            raise SeparationError(f"{name} is cut short: it has {done} of {sound.frames} samples")
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            seconds = (done + int(np.argmin(finite))) / rate
            raise SeparationError(f"{name} has a NaN or infinity {seconds:.4f} s from its start")
        done += len(block)
        yield block.mean(axis=1)[None]
        progress(len(block) / rate, sound.frames / rate)


def run_windows(
    model: nn.Module,
    windows: Iterable[tuple[np.ndarray, int]],
    batch_size: int,
    name: str,
    device: torch.device | str,
) -> Iterator[np.ndarray]:
    """Separate windows; yields [S + 1, n]: estimates in the model's order, then the mixture.

    The context is cut off. The model does not get windows of digital silence, since it may divide
    by their power: their estimates are silence.
    """
    windows = iter(windows)
    while batch := list(itertools.islice(windows, batch_size)):
        mixtures_BT = np.stack([wave for wave, _ in batch])
        audible_B = mixtures_BT.any(axis=1)
        inputs_BT = mixtures_BT[audible_B]
        if not len(inputs_BT):  # noise, to learn how many outputs the model has
            inputs_BT = np.random.default_rng(0).standard_normal(mixtures_BT[:1].shape, np.float32)
        separated = _forward(model, inputs_BT, name, device)
        estimates_BST = np.zeros((len(batch), *separated.shape[1:]), np.float32)
        estimates_BST[audible_B] = separated[: audible_B.sum()]
        for estimates_ST, (wave_T, context) in zip(estimates_BST, batch, strict=True):
            yield np.concatenate([estimates_ST, wave_T[None]])[:, context:]


def _forward(
    model: nn.Module, mixtures_BT: np.ndarray, name: str, device: torch.device | str
) -> np.ndarray:
    """float32 [B, S, T]; signals shorter than the model takes are padded with zeros and cut."""
    length = mixtures_BT.shape[1]
    missing = max(0, int(getattr(model, "min_length", 1)) - length)
    padded_BT = torch.from_numpy(np.pad(mixtures_BT, ((0, 0), (0, missing)))).to(device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        estimates_BST = model(padded_BT).float().cpu()
    model.train(was_training)
    if estimates_BST.ndim != 3 or estimates_BST.shape[::2] != padded_BT.shape:
        raise SeparationError(
            f"the model made {tuple(estimates_BST.shape)} of {tuple(padded_BT.shape)}; "
            "it must be [B, S, T] of [B, T]"
        )
    if not torch.isfinite(estimates_BST).all():
        raise SeparationError(
            f"{name}: the model's estimates hold NaN or infinity; its weights may be damaged"
        )
    return estimates_BST[..., :length].numpy()


class LevelFit:
    """Yields estimates [S, n] of blocks [S + 1, n] (estimates, mixture) and fits their levels.

    The fit is least squares: the gain per speaker that brings the sum of the estimates nearest to
    the mixture.
    """

    def __init__(self, blocks: Iterable[np.ndarray]) -> None:
        self.blocks = blocks
        self.products = np.zeros((1, 1))  # [S + 1, S + 1]: of every two rows, summed over time

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self.blocks:
            wide = block.astype(np.float64)
            self.products = self.products + wide @ wide.T
            yield block[:-1]

    def gains(self) -> np.ndarray:
        """[S]; a silent estimate gets 0, and equal estimates share the mixture (least norm)."""
        gram, projection = self.products[:-1, :-1], self.products[:-1, -1]
        level = np.sqrt(np.diag(gram))
        unit = np.divide(1.0, level, out=np.zeros_like(level), where=level > 0)
        solution, *_ = np.linalg.lstsq(gram * np.outer(unit, unit), projection * unit, rcond=1e-6)
        return solution * unit


def _write_raw(path: Path, blocks: Iterable[np.ndarray], num_samples: int) -> np.ndarray:
    """Write blocks [S, n] as float32 frames, cut or padded to `num_samples`; returns peaks [S]."""
    peaks, done = np.zeros(1), 0
    try:
        with path.open("wb") as file:
            for block in blocks:
                kept = block[:, : num_samples - done]
                done += kept.shape[1]
                peaks = np.maximum(peaks, np.abs(kept).max(axis=1, initial=0.0))
                file.write(np.ascontiguousarray(kept.T, dtype="<f4").tobytes())
            # Resampling there and back may lose a sample or two by rounding: those are silence.
            file.write(bytes(4 * len(peaks) * (num_samples - done)))
    except OSError as error:
        raise storage.disk_error(path, "write", error) from error
    return peaks


def _write_audio(paths: list[Path], scratch: Path, gains: np.ndarray, rate: int) -> None:
    """Write each speaker of the scratch file, multiplied by its gain, as 16-bit audio."""
    try:
        with ExitStack() as stack, scratch.open("rb") as stream:
            files = [
                stack.enter_context(soundfile.SoundFile(str(path), "w", rate, 1, "PCM_16"))
                for path in paths
            ]
            while data := stream.read(4 * len(gains) * BLOCK_SAMPLES):
                frames = np.frombuffer(data, dtype="<f4").reshape(-1, len(gains)) * gains
                for file, wave in zip(files, frames.T, strict=True):
                    file.write(wave)
    except soundfile.LibsndfileError as error:
        raise OSError(
            f"{paths[0].name} could not be written ({error}); is the disk full?"
        ) from error
