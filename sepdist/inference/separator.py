"""Separate waves and recordings of any length and rate into one wave or file per speaker."""

import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import soundfile
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from sepdist import slots, storage
from sepdist.inference.export import load_separator
from sepdist.inference.recordings import (
    BLOCK_SAMPLES,
    Track,
    chosen_channels,
    of_channel,
    open_recording,
    publish,
    read_blocks,
    write_audio,
    write_raw,
)
from sepdist.inference.stitching import cut_windows, overlap_add, resampled
from sepdist.inference.windows import SeparationError, Windows, check_outputs, output_names

PEAK_LIMIT = 0.99
QUIET_PEAK = 2.0**-6  # of outputs: below it 16 bits keep fewer than 10 of them
DEEP = ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")  # recordings of more than 16 bits
MIN_RATE, MAX_RATE = 1000, 768_000  # Hz; a smaller number is probably in kHz


@dataclass
class Separation:
    """The outputs of `Separator.file` and how they were scaled."""

    outputs: list[str]
    num_samples: int
    sample_rate: int
    gains: list[float]  # by output, from the model's level to the recording's, without `scale`
    scale: float  # common to all outputs; below 1 where one would have clipped
    subtype: str  # of the outputs, such as PCM_16
    warnings: list[str]


@dataclass(repr=False, eq=False)
class Separator:
    """A model that separates waves and recordings of any length and rate.

    Overlapping windows are separated and joined; speakers keep their order from one to the next.
    Each voice gets the level at which their sum is closest to the mixture.
    """

    model: nn.Module  # [B, T] -> [B, S, T]; moved to the device and put into eval mode
    sample_rate: int  # of the model
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    windows: Windows = field(default_factory=Windows)
    lineage: Mapping[str, Any] = field(default_factory=dict)  # of the run that trained the model
    url: str = ""  # the folder that the model was loaded from

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()
        self._min_length = int(getattr(self.model, "min_length", 1))

    def __repr__(self) -> str:
        kind, origin = type(self.model).__name__, f" from {self.url}" if self.url else ""
        return f"<Separator: {kind} at {self.sample_rate} Hz on {self.device}{origin}>"

    @cached_property
    def num_speakers(self) -> int:
        """How many speakers the model gives; found by separating a second of silence."""
        return len(self(np.zeros(self.sample_rate, np.float32), self.sample_rate))

    def __call__(
        self, wave: ArrayLike | Tensor, sample_rate: float, *, channels: str | int = "mean"
    ) -> NDArray[np.float32]:
        """Separate a wave [T] or [C, T]; returns [S, T] at the same rate.

        The wave is an array, a tensor on any device or a list, of floats or of integers of 16 or 32
        bits, whose full scale becomes 1. Its `channels` are averaged ("mean"), or one is taken (1,
        2, ...), or "each" is separated: [C, S, T]. The voices may exceed +-1.

        Raises:
            SeparationError: the wave has another shape or type, is empty or holds NaN, or the model
                gives NaN.
        """
        check_outputs("wav", None, channels)
        wave_TC, estimates = as_frames(wave), []
        for channel in chosen_channels(channels, wave_TC.shape[1], "the wave"):
            raw, own = io.BytesIO(), of_channel(wave_TC, channel)
            blocks = (own[i : i + BLOCK_SAMPLES] for i in range(0, len(own), BLOCK_SAMPLES))
            gains = self._run(blocks, len(own), sample_rate, "the wave", raw)[0].gains()
            estimates_TS = np.frombuffer(raw.getbuffer(), "<f4").reshape(-1, len(gains))
            scaled = np.multiply(estimates_TS.T, gains[:, None], dtype=np.float32, order="C")
            estimates.append(scaled)
        return np.stack(estimates) if channels == "each" else estimates[0]

    def file(
        self,
        recording: str | os.PathLike[str],
        output_folder: str | os.PathLike[str],
        *,
        file_format: str = "wav",
        subtype: str | None = None,
        channels: str | int = "mean",
        stem: str = "",
        progress: Callable[[float, float], None] = lambda seconds, total: None,
    ) -> Separation:
        """Separate a recording (path or s3://) into <stem>_s1.wav and so on in `output_folder`.

        Outputs are mono and appear when they are complete. Their `subtype` is PCM_16, PCM_24 or
        FLOAT (not in flac); unless given 24 bits for a recording of more than 16, or whose outputs
        stay below 1/64 of full scale, else 16. If one would clip, all but FLOAT are scaled down.
        `channels` is as in `__call__`; with "each" the outputs are <stem>_c1_s1.wav and so on.

        `-` is standard input as a recording and standard output as the folder: one file of all
        outputs, a channel each. `stem` is the recording's unless it is given; it may begin with
        folders. `progress` gets the seconds of each block read and of the recording. Memory does
        not grow with the recording; scratch files take 4 bytes per sample of each output, and of
        each channel of m4a, webm and the like.

        Raises:
            SeparationError: the recording is no file of audio, empty, cut short or holds NaN, or
                the model gives NaN.
            OSError: the recording cannot be read, or an output not be written.
        """
        given = (recording, output_folder)
        recording, output_folder = (os.path.expanduser(os.fsdecode(one)) for one in given)
        check_outputs(file_format, subtype, channels)
        piped, remote = output_folder == "-", storage.is_remote(output_folder)
        local = None if piped or remote else Path(output_folder)
        if local:
            local.mkdir(parents=True, exist_ok=True)
        # Unfinished files lie in the output folder, where finishing one is a rename.
        with tempfile.TemporaryDirectory(prefix=".separating-", dir=local) as folder:
            work = Path(folder)
            with open_recording(recording, work) as sound:
                num_samples, rate, deep = sound.frames, sound.samplerate, sound.subtype in DEEP
                tracks, warnings = self._tracks(sound, recording, channels, work, progress)
            gains = np.concatenate([track.gains for track in tracks])
            peak = float(np.max(np.abs(gains) * np.concatenate([track.peaks for track in tracks])))
            subtype = subtype or ("PCM_24" if deep or 0 < peak < QUIET_PEAK else "PCM_16")
            scale = 1.0 if subtype == "FLOAT" else PEAK_LIMIT / max(peak, PEAK_LIMIT)
            stem = stem or PurePosixPath(recording if recording != "-" else "stdin").stem
            outputs = (
                ["-"]
                if piped
                else [
                    storage.join(local or output_folder, name)
                    for track in tracks
                    for name in output_names(stem, len(track.gains), file_format, track.suffix)
                ]
            )
            files = {work / f"{number}.{file_format}": out for number, out in enumerate(outputs)}
            write_audio([*files], tracks, scale, rate, subtype)
            publish(files)
        if scale < 1:
            warnings.append(f"{recording}: all scaled by {scale:.3g}, or one would have clipped")
        return Separation(outputs, num_samples, rate, gains.tolist(), scale, subtype, warnings)

    def _tracks(
        self,
        sound: soundfile.SoundFile,
        name: str,
        channels: str | int,
        work: Path,
        progress: Callable[[float, float], None],
    ) -> tuple[list[Track], list[str]]:
        """Separate the mean or the chosen channels of a recording into files; and warnings."""
        tracks: list[Track] = []
        chosen = chosen_channels(channels, sound.channels, name)
        warnings = [f"{name}: {note}"] if (note := getattr(sound, "note", "")) else []
        for channel in chosen:
            path = work / f"{len(tracks)}.f32"
            with path.open("w+b") as raw:
                of_all = partial(_of_passes, progress, len(chosen))
                blocks = read_blocks(sound, name, channel, of_all)
                fit, peaks = self._run(blocks, sound.frames, sound.samplerate, name, raw)
            suffix = f"_c{channel}" if channels == "each" else ""
            tracks.append(Track(path, suffix, fit.gains(), peaks))
            if fit.products[-1, -1] == 0:  # the energy of the mixture
                heard = f"channel {channel}" if channel else "the mean of its channels"
                warnings.append(f"{name} ({heard}) is silent; so are its outputs")
        return tracks, warnings

    def _run(
        self, blocks: Iterable[np.ndarray], length: int, rate: float, name: str, raw: IO[bytes]
    ) -> tuple["LevelFit", np.ndarray]:
        """Write estimates of blocks [n, C] as float32 frames; returns levels to apply and peaks."""
        if not MIN_RATE <= rate <= MAX_RATE or rate % 1:
            allowed = f"a sample rate is whole, from {MIN_RATE} up to {MAX_RATE}"
            raise SeparationError(f"{name}: {rate} Hz; {allowed}")
        if length == 0:
            raise SeparationError(f"{name} is empty: it has no samples")
        size = max(round(self.windows.window_seconds * self.sample_rate), self._min_length, 2)
        overlap = min(max(round(self.windows.overlap_seconds * self.sample_rate), 1), size // 2)
        mono = resampled(_mono_blocks(blocks, rate, name), int(rate), self.sample_rate)
        separated = self._run_windows(cut_windows((one[0] for one in mono), size, overlap), name)
        fit = LevelFit(overlap_add(separated, overlap))
        return fit, write_raw(raw, resampled(fit, self.sample_rate, int(rate)), length)

    def _run_windows(
        self, windows: Iterator[tuple[np.ndarray, int]], name: str
    ) -> Iterator[np.ndarray]:
        """Separate windows; yields [S + 1, n]: estimates in the model's order, then the mixture.

        The context is cut off. The model does not get windows of digital silence, since it may
        divide by their power: their estimates are silence.
        """
        while batch := list(itertools.islice(windows, self.windows.batch_size)):
            mixtures_BT = np.stack([wave for wave, _ in batch])
            audible_B = mixtures_BT.any(axis=1)
            inputs_BT = mixtures_BT[audible_B]
            if not len(inputs_BT):  # noise, to learn how many outputs the model has
                shape = mixtures_BT[:1].shape
                inputs_BT = np.random.default_rng(0).standard_normal(shape, np.float32)
            separated = self._forward(inputs_BT, name)
            estimates_BST = np.zeros((len(batch), *separated.shape[1:]), np.float32)
            estimates_BST[audible_B] = separated[: audible_B.sum()]
            for estimates_ST, (wave_T, context) in zip(estimates_BST, batch, strict=True):
                yield np.concatenate([estimates_ST, wave_T[None]])[:, context:]

    def _forward(self, mixtures_BT: np.ndarray, name: str) -> np.ndarray:
        """float32 [B, S, T]; signals shorter than the model takes are padded with zeros and cut."""
        length = mixtures_BT.shape[1]
        missing = max(0, self._min_length - length)
        padded_BT = torch.from_numpy(np.pad(mixtures_BT, ((0, 0), (0, missing)))).to(self.device)
        try:
            with torch.inference_mode():
                estimates_BST = self.model(padded_BT).float().cpu()
        except RuntimeError as error:  # of torch: most often the memory is too small
            reason = str(error).partition("\n")[0]
            given = tuple(padded_BT.shape)
            raise SeparationError(f"{name}: the model fails on {given}: {reason}") from error
        shape = tuple(estimates_BST.shape)
        if len(shape) != 3 or shape[::2] != padded_BT.shape or not shape[1]:
            raise SeparationError(
                f"the model made {shape} of {tuple(padded_BT.shape)}; "
                "it must be [B, S, T] of [B, T]"
            )
        if not torch.isfinite(estimates_BST).all():
            raise SeparationError(
                f"{name}: the model's estimates hold NaN or infinity; its weights may be damaged"
            )
        return estimates_BST[..., :length].numpy()


def load(
    model: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    plugins: str | Sequence[str] = (),
    compile: bool = False,
    window_seconds: float = Windows.window_seconds,
    overlap_seconds: float = Windows.overlap_seconds,
    batch_size: int = Windows.batch_size,
) -> Separator:
    """Load a trained separator: `voices = load("runs/a")(wave, sample_rate)`.

    `model` is a run_dir, whose best checkpoint is taken, or an export; a path or s3://. The default
    device is a GPU where there is one. `plugins` names packages that may define the model. With
    `compile` the first call takes seconds longer and later ones less, if the model can be compiled.
    Longer windows and overlaps keep speakers apart over longer pauses; a larger batch may be faster
    on a GPU.

    Raises:
        ValueError: there is no separator at `model`, or a device or option cannot be used.
        OSError: `model` cannot be read.
    """
    windows = Windows(window_seconds, overlap_seconds, batch_size)
    slots.use_plugins([plugins] if isinstance(plugins, str) else plugins)
    export = load_separator(os.fspath(model))
    for module in export.model.modules():
        if hasattr(module, "compiled"):  # as in ConvTasNet and its blocks
            module.compiled = compile  # type: ignore[assignment]
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return Separator(device=place, windows=windows, **vars(export))
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise SeparationError(f"device {device!r} cannot be used: {reason}") from error


def as_frames(wave: ArrayLike | Tensor) -> np.ndarray:
    """float32 [T, C] of a wave [T] or [C, T]; SeparationError for anything else."""
    if isinstance(wave, Tensor):
        wave = wave.detach().cpu()
        wave = wave.float() if wave.is_floating_point() else wave  # NumPy has no bfloat16
    array = np.asarray(wave)
    if array.dtype in (np.int16, np.int32):
        array = array / -float(np.iinfo(array.dtype).min)
    if array.dtype.kind != "f":
        raise SeparationError(f"the wave holds {array.dtype}: give floats, int16 or int32")
    if array.ndim not in (1, 2) or array.shape[0] > array.shape[-1] > 0:
        hint = "give [T] or [C, T] (soundfile's [T, C] as wave.T)"
        raise SeparationError(f"the wave has shape {array.shape}: {hint}")
    with np.errstate(over="ignore"):  # what is too large becomes infinity, and is refused
        return np.atleast_2d(array).T.astype(np.float32)


def _of_passes(progress: Callable[[float, float], None], num: int, done: float, of: float) -> None:
    progress(done, num * of)


def _mono_blocks(blocks: Iterable[np.ndarray], rate: float, name: str) -> Iterator[np.ndarray]:
    """The mean of the channels of blocks [n, C], as blocks [1, n]."""
    done = 0
    for block in blocks:
        finite = (np.abs(block) < 1e15).all(axis=1)  # squares of more may exceed float32
        if not finite.all():
            place = f"{(done + int(np.argmin(finite))) / rate:.4f} s from its start"
            raise SeparationError(f"{name} has a huge value, NaN or infinity {place}")
        done += len(block)
        yield block.mean(axis=1)[None]


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
