"""Separate waves and recordings of any length and rate into one wave or file per speaker."""

import io
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import soundfile
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from sepdist import audio, hub, slots, storage
from sepdist.inference.export import load_separator
from sepdist.inference.stitching import Pauses, cleaned, cut_windows, overlap_add, resampled
from sepdist.inference.windows import SeparationError, Windows, check_options, output_names

logger = logging.getLogger(__name__)
BLOCK_SAMPLES = 1 << 16
PEAK_LIMIT = 0.99
QUIET_PEAK = 2.0**-6  # of outputs: below it 16 bits keep fewer than 10 of them
FAINT = 2.0**-8  # peak of a window
DEEP = ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")  # recordings of more than 16 bits
MIN_RATE, MAX_RATE = 1000, 768_000  # Hz; a smaller number is probably in kHz


@dataclass
class Separation:
    """The outputs of `Separator.file` and how they were scaled."""

    outputs: list[str]
    num_samples: int
    sample_rate: int
    gains: list[float]  # by output, from the model's level to the recording's, without `scale`
    scale: float  # common to all speakers; below 1 where an output would have clipped
    warnings: list[str]
    subtype: str = ""  # of the outputs, such as PCM_16

    def settle(self, peaks: Sequence[float], name: str) -> None:
        """Choose scale and, unless it is given, subtype of all outputs by the channels' peaks."""
        quiet = any(0 < peak < QUIET_PEAK for peak in peaks)
        self.subtype = self.subtype or ("PCM_24" if quiet else "PCM_16")
        if self.subtype != "FLOAT" and max(peaks) > PEAK_LIMIT:
            self.scale = PEAK_LIMIT / max(peaks)
            self.warnings += [f"{name}: all scaled by {self.scale:.3g}, or one would have clipped"]


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
        wave_TC, raw = as_frames(wave), io.BytesIO()
        if channels == "each":
            return np.stack([self(wave_T, sample_rate) for wave_T in wave_TC.T])
        if channel := check_options("", "wav", "", channels, wave_TC.shape[1], "wave")[0]:
            wave_TC = wave_TC[:, channel - 1 : channel]
        blocks = (wave_TC[i : i + BLOCK_SAMPLES] for i in range(0, len(wave_TC), BLOCK_SAMPLES))
        fit, _, warnings = self._run(blocks, len(wave_TC), sample_rate, "the wave", raw)
        for warning in warnings:
            logger.warning("the wave: %s", warning)
        gains = fit.gains()
        estimates_TS = np.frombuffer(raw.getbuffer(), "<f4").reshape(-1, len(gains))
        return np.multiply(estimates_TS.T, gains[:, None], dtype=np.float32, order="C")

    def file(
        self,
        recording: str | os.PathLike[str],
        output_folder: str | os.PathLike[str],
        *,
        file_format: str = "wav",
        subtype: str = "",
        channels: str | int = "mean",
        stem: str = "",
        progress: Callable[[float, float], None] = lambda seconds, total: None,
    ) -> Separation:
        """Separate a recording (path or s3://) into <stem>_s1.wav and so on in `output_folder`.

        Outputs are mono and appear when they are complete. Their `subtype` is PCM_16, PCM_24 or
        (wav) FLOAT; by default PCM_24 for a recording of more than 16 bits or for outputs below
        1/64 of full scale, else PCM_16. If one would clip, all are scaled down, but for FLOAT.
        `channels` are those of `__call__`; "each" makes <stem>_c1_s1.wav and so on.
        `-` is standard input as the recording, standard output as the folder: one file with a
        channel per speaker. `stem` is the recording's unless it is given; it may begin with
        folders. `progress` gets the seconds of each block read and of the recording. Memory does
        not grow with the recording; scratch files take 4 bytes per sample of each output.

        Raises:
            SeparationError: the recording is no file of audio, empty, cut short or holds NaN, or
                the model gives NaN.
            OSError: the recording cannot be read, or an output not be written.
        """
        given = (recording, output_folder)
        recording, output_folder = (os.path.expanduser(os.fsdecode(one)) for one in given)
        check_options(output_folder, file_format, subtype, channels)
        piped = output_folder == "-"
        local = None if piped or storage.is_remote(output_folder) else Path(output_folder)
        if local:
            local.mkdir(parents=True, exist_ok=True)
        # Unfinished files lie in the output folder, where finishing one is a rename.
        with tempfile.TemporaryDirectory(prefix=".separating-", dir=local) as folder:
            work, files = Path(folder), dict[Path, str]()
            name = recording if recording != "-" else "stdin"
            with _open(recording, work) as sound:
                notes = [f"{name}: {sound.note}"] if getattr(sound, "note", "") else []
                depth = subtype or ("PCM_24" if sound.subtype in DEEP else "")
                done = Separation([], sound.frames, sound.samplerate, [], 1.0, notes, depth)
                options = (output_folder, file_format, subtype, channels, sound.channels, name)
                found = dict[int, tuple[np.ndarray, float]]()  # gains and peak
                for channel in check_options(*options):
                    blocks = _read_blocks(sound, name, channel, progress)
                    found[channel] = self._channel(blocks, name, channel, work, done)
            done.settle([peak for _, peak in found.values()], name)
            for channel, (gains, _) in found.items():
                own = (stem or PurePosixPath(name).stem) + f"_c{channel}" * (channels == "each")
                names = output_names(own, len(gains), file_format)
                urls = ["-"] if piped else [storage.join(local or output_folder, n) for n in names]
                paths = [work / f"{channel}-{one}.{file_format}" for one in range(len(urls))]
                _write_audio(paths, work / f"{channel}.f32", gains * done.scale, done)
                files |= zip(paths, urls, strict=True)
            if local and os.path.realpath(recording) in map(os.path.realpath, files.values()):
                raise SeparationError(f"{name}: an output would replace it: use another folder")
            _publish(files, work)
        done.outputs = [*files.values()]
        return done

    def _channel(
        self, blocks: Iterable[np.ndarray], name: str, channel: int, work: Path, done: Separation
    ) -> tuple[np.ndarray, float]:
        """Separate a channel (0: the mean) into a scratch file; returns gains [S] and the peak."""
        with (work / f"{channel}.f32").open("w+b") as raw:
            fit, peaks, warnings = self._run(blocks, done.num_samples, done.sample_rate, name, raw)
        gains, heard = fit.gains(), f"channel {channel}" if channel else "the mean of its channels"
        if fit.products[-1, -1] == 0:  # the energy of the mixture
            warnings.append("silent; so are its outputs")
        done.warnings += [f"{name} ({heard}): {one}" for one in warnings]
        done.gains += gains.tolist()
        return gains, float(np.max(np.abs(gains) * peaks))

    def _run(
        self, blocks: Iterable[np.ndarray], length: int, rate: float, name: str, raw: IO[bytes]
    ) -> tuple["LevelFit", np.ndarray, list[str]]:
        """Write estimates of blocks [n, C] as float32 frames; returns levels, peaks, warnings."""
        if not MIN_RATE <= rate <= MAX_RATE or rate % 1:
            allowed = f"a sample rate is whole, from {MIN_RATE} up to {MAX_RATE}"
            raise SeparationError(f"{name}: {rate} Hz; {allowed}")
        if length == 0:
            raise SeparationError(f"{name} is empty: it has no samples")
        size = max(round(self.windows.window_seconds * self.sample_rate), self._min_length, 2)
        overlap = min(max(round(self.windows.overlap_seconds * self.sample_rate), 1), size // 2)
        mono = resampled(_mono_blocks(blocks, rate, name), int(rate), self.sample_rate)
        cut = cut_windows((one[0] for one in mono), size, overlap)
        windows = ((cleaned(wave_T, self.sample_rate), context) for wave_T, context in cut)
        separated = self._run_windows(windows, name)
        pauses = Pauses(lambda w: self._forward(w[None], name)[0], self.sample_rate, size, overlap)
        fit = LevelFit(overlap_add(separated, overlap, pauses))
        peaks = _write_raw(raw, resampled(fit, self.sample_rate, int(rate)), length)
        return fit, peaks, pauses.warnings()

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
        """float32 [B, S, T]; signals shorter than the model takes are padded with zeros and cut.

        Faint signals, at which the epsilons of normalisations tell, are louder for the model.
        """
        length = mixtures_BT.shape[1]
        peak_B1 = np.abs(mixtures_BT).max(axis=1, keepdims=True, initial=0)
        gain_B1 = np.where(peak_B1 < FAINT, np.exp2(np.frexp(FAINT / (peak_B1 + 1e-30))[1]), 1)
        gain_B1 = gain_B1.astype(np.float32)  # powers of two, so nothing is rounded
        missing = max(0, self._min_length - length)
        padded = np.pad(mixtures_BT * gain_B1, ((0, 0), (0, missing)))
        padded_BT = torch.from_numpy(padded).to(self.device)
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
        return estimates_BST[..., :length].numpy() / gain_B1[..., None]


def load(
    model: str | os.PathLike[str] = hub.READY,
    *,
    device: torch.device | str | None = None,
    plugins: str | Sequence[str] = (),
    compile: bool = False,
    window_seconds: float = Windows.window_seconds,
    overlap_seconds: float = Windows.overlap_seconds,
    batch_size: int = Windows.batch_size,
) -> Separator:
    """Load a trained separator: `voices = load("runs/a")(wave, sample_rate)`.

    `model` is a run_dir, whose best checkpoint is taken, or an export, by path, s3:// or hf://; the
    default is the small one that comes with the package (sepdist/pretrained/). The default
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


def _open(name: str, work: Path) -> soundfile.SoundFile:
    path = Path(os.path.abspath(name))
    if name == "-":
        name, path = "stdin", work / "recording"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    elif storage.is_remote(name):
        path = work / "recording"
        storage.fetch_file(name, path)
    storage.size(path)  # its errors name the file and say what to do
    if not path.is_file():  # opening a pipe may never return
        raise SeparationError(f"{name} is a folder, pipe or device; give a file of audio")
    try:
        return audio.open_sound(path, work)
    except audio.AudioError as error:
        raise SeparationError(str(error).replace(str(path), name)) from error
    except OSError as error:
        raise storage.disk_error(name, "read", error) from error


def _read_blocks(
    sound: soundfile.SoundFile, name: str, channel: int, progress: Callable[[float, float], None]
) -> Iterator[np.ndarray]:
    """All channels (0) or one in float32 blocks [n, C], as many samples as the header promises."""
    rate, done = sound.samplerate, 0
    while done < sound.frames:
        try:
            if channel > 1 and not done:
                sound.seek(0)  # after another channel
            block = sound.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise SeparationError(
                f"{name} is damaged {done / rate:.2f} s from its start: {error}"
            ) from error
        if len(block) == 0:
            raise SeparationError(f"{name} is cut short: it has {done} of {sound.frames} samples")
        done += len(block)
        yield block[:, channel - 1 : channel] if channel else block
        progress(len(block) / rate, sound.frames / rate)


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


def _write_raw(file: IO[bytes], blocks: Iterable[np.ndarray], num_samples: int) -> np.ndarray:
    """Write blocks [S, n] as float32 frames, cut or padded to `num_samples`; returns peaks [S]."""
    peaks, done = np.zeros(1), 0
    try:
        for block in blocks:
            kept = block[:, : num_samples - done]
            done += kept.shape[1]
            peaks = np.maximum(peaks, np.abs(kept).max(axis=1, initial=0.0))
            file.write(np.ascontiguousarray(kept.T, dtype="<f4").tobytes())
        # Resampling there and back may lose a sample or two by rounding: those are silence.
        file.write(bytes(4 * len(peaks) * (num_samples - done)))
        file.flush()
    except OSError as error:
        raise storage.disk_error(file.name, "write", error) from error
    return peaks


def _write_audio(paths: list[Path], scratch: Path, gains: np.ndarray, like: Separation) -> None:
    """Write each speaker of the scratch file, times its gain, to its path; or all to one."""
    width = len(gains) // len(paths)
    large = 4 * like.num_samples * width > 2**32 - 2**16 and paths[0].suffix == ".wav"
    given = (like.sample_rate, width, like.subtype, None, "RF64" if large else None)
    try:
        with ExitStack() as stack, scratch.open("rb") as stream:
            files = [
                stack.enter_context(soundfile.SoundFile(str(path), "w", *given)) for path in paths
            ]
            while data := stream.read(4 * len(gains) * BLOCK_SAMPLES):
                frames = np.frombuffer(data, dtype="<f4").reshape(-1, len(gains)) * gains
                for file, wave in zip(files, np.split(frames, len(paths), axis=1), strict=True):
                    file.write(wave)
    except soundfile.LibsndfileError as error:
        kind = f"an output in {paths[0].suffix[1:]} at {like.sample_rate} Hz"
        raise OSError(f"{kind} could not be written ({error}); is the disk full?") from error


def _publish(files: Mapping[Path, str], work: Path) -> None:
    """Move finished files to the outputs, all or none; `work` keeps what they replace until then.

    A local output that was there before is there again if another cannot be written.
    """
    with ExitStack() as undo:
        for path, output in files.items():
            if output == "-":
                with path.open("rb") as file:
                    shutil.copyfileobj(file, sys.stdout.buffer)
                continue
            remote = storage.is_remote(output)
            before = storage.exists(output) if remote else os.path.lexists(output)
            if remote:
                storage.put_file(path, output)
            else:
                if Path(output).is_dir():
                    raise IsADirectoryError(f"{output} is a folder, where an output belongs")
                Path(output).parent.mkdir(parents=True, exist_ok=True)
                if before:
                    older = Path(output).rename(work / f"{path.name}.older")
                    undo.callback(older.replace, output)
                path.replace(output)
            if not before:
                undo.callback(storage.remove, output)
        undo.pop_all()
