"""Separate recordings: audio of any rate and length in, one file per speaker out.

    python -m sepdist.separate --model runs/a --output separated meeting.wav
    python -m sepdist.separate --model s3://bucket/exports/a --output s3://bucket/out --format flac a.wav s3://bucket/b.flac

The recording is read in blocks (channels averaged), resampled to the model's rate and cut into overlapping windows, so
memory does not grow with its length. Windows are joined by cross-fades; the order of the speakers is carried from one
to the next by the estimates' correlation on the overlap. Each output then gets the gain with which the sum of all comes
closest to the recording, and, if one would clip, all are scaled down together. Outputs <stem>_s1.wav, ... are mono
16-bit, as long as the input to the sample and at its rate, and appear only when they are complete.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch
from torch import nn

from sepdist import storage
from sepdist.allocator import keep_freed_memory
from sepdist.metrics.permutation import best_permutation

BLOCK_SAMPLES = 1 << 16
PEAK_LIMIT = 0.99
FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16")}


class SeparationError(ValueError):
    """A recording that cannot be separated; the message names it and says what to do."""


@dataclass(frozen=True)
class Windows:
    """How a recording is cut: `overlap_seconds` at most half of `window_seconds`; `batch_size` windows at once."""

    window_seconds: float = 8.0
    overlap_seconds: float = 4.0
    batch_size: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.overlap_seconds <= self.window_seconds / 2:
            raise SeparationError(
                f"an overlap of {self.overlap_seconds} s does not fit a window of {self.window_seconds} s: "
                "it must be above 0 and at most half of it"
            )
        if self.batch_size < 1:
            raise SeparationError(f"a batch has at least one window, not {self.batch_size}")


@dataclass
class Separation:
    """What `separate_file` made."""

    outputs: list[str]
    num_samples: int
    sample_rate: int
    gains: list[float]  # by speaker: from the model's level to the recording's, the common scale not included
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
            estimates = _estimate(model, model_rate, rate, mono, windows or Windows(), recording, device, fit)
            raw = _RawEstimates(work / "estimates.f32", num_samples, estimates)
        gains = fit.gains()
        loudest = float(np.max(np.abs(gains) * raw.peaks))
        scale = min(1.0, PEAK_LIMIT / loudest) if loudest > 0 else 1.0
        warnings = [] if fit.heard else [f"{recording} (the mean of its channels) is silent; so are its outputs"]
        if scale < 1:
            warnings.append(f"{recording}: all outputs are scaled by {scale:.3f}, because one would have clipped")
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
    return [f"{PurePosixPath(recording).stem}_s{number}.{file_format}" for number in range(1, num_speakers + 1)]


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
        raise SeparationError(f"{name} is not audio that can be read ({error.error_string})") from error
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
            raise SeparationError(f"{name} is cut short: it ends after {done} of {sound.frames} samples")
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            at = (done + int(np.argmin(finite))) / sound.samplerate
            raise SeparationError(f"{name} holds a sample that is not a number, {at:.4f} s from its start")
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
        raise SeparationError(f"an overlap of {windows.overlap_seconds} s is less than one sample at {model_rate} Hz")
    blocks = resampled((block[None] for block in mono), rate, model_rate)
    cut = cut_windows((block[0] for block in blocks), size, overlap)

    def fitted() -> Iterator[np.ndarray]:
        for joined in overlap_add(run_windows(model, cut, windows.batch_size, name, model_rate, device), overlap):
            fit.add(mixture=joined[-1], estimates=joined[:-1])
            yield joined[:-1]

    return resampled(fitted(), model_rate, rate)


def resampled(blocks: Iterable[np.ndarray], rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """Float32 blocks [C, n] at `rate` as blocks [C, m] at `new_rate` (soxr, no delay); unchanged at equal rates."""
    if rate == new_rate:
        yield from blocks
        return
    stream: soxr.ResampleStream | None = None
    num_channels = 1
    for block in blocks:
        if stream is None:
            num_channels = len(block)
            stream = soxr.ResampleStream(rate, new_rate, num_channels, dtype="float32", quality="HQ")
        yield _resample(stream, block)
    if stream is not None:
        yield _resample(stream, np.zeros((num_channels, 0), dtype=np.float32), last=True)


def _resample(stream: soxr.ResampleStream, block: np.ndarray, last: bool = False) -> np.ndarray:
    frames = np.ascontiguousarray(block.T, dtype=np.float32)
    return stream.resample_chunk(frames, last=last).reshape(-1, len(block)).T


def cut_windows(blocks: Iterable[np.ndarray], size: int, overlap: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows [size] of a signal that comes in blocks, each with how many of its first samples are context only.

    Neighbours share `overlap` samples. The last window reaches back far enough to be whole: what it takes beyond the
    overlap is context. A signal no longer than one window is one window of its own length.
    """
    hop = size - overlap
    buffer = np.zeros(0, dtype=np.float32)
    before = np.zeros(0, dtype=np.float32)  # the hop before the buffer
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) > size:  # at equality it might be the last, and a whole one
            yield buffer[:size].copy(), 0
            before, buffer = buffer[:hop], buffer[hop:]
    if len(buffer):
        context = min(size - len(buffer), len(before))
        yield np.concatenate([before[len(before) - context :], buffer]), context


def run_windows(
    model: nn.Module,
    windows: Iterable[tuple[np.ndarray, int]],
    batch_size: int,
    name: str,
    model_rate: int,
    device: torch.device | str,
) -> Iterator[np.ndarray]:
    """[S + 1, n] for each window: its estimates as the model orders them, then its mixture; context cut off.

    A window of digital silence is not shown to the model (whose normalisation may divide by its power): its estimates
    are silence.
    """
    batch: list[tuple[np.ndarray, int]] = []
    num_speakers: int | None = None

    def run() -> Iterator[np.ndarray]:
        nonlocal num_speakers
        loud = [bool(wave.any()) for wave, _ in batch]
        shown = [wave for (wave, _), is_loud in zip(batch, loud, strict=True) if is_loud]
        if num_speakers is None and not shown:  # nothing but silence so far: how many outputs has the model?
            shown = [np.random.default_rng(0).standard_normal(len(batch[0][0])).astype(np.float32)]
        estimates = _forward(model, np.stack(shown), name, model_rate, device) if shown else None
        if estimates is not None:
            num_speakers = estimates.shape[1]
        assert num_speakers is not None
        results = iter(estimates) if estimates is not None else iter(())
        for (wave, context), is_loud in zip(batch, loud, strict=True):
            own = next(results) if is_loud else np.zeros((num_speakers, len(wave)), dtype=np.float32)
            yield np.concatenate([own, wave[None]])[:, context:]

    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            yield from run()
            batch = []
    if batch:
        yield from run()


def _forward(
    model: nn.Module, mixtures: np.ndarray, name: str, model_rate: int, device: torch.device | str
) -> np.ndarray:
    """float32 [B, S, T] from [B, T]; a signal shorter than the model takes is padded with zeros and cut again."""
    length = mixtures.shape[1]
    missing = max(0, int(getattr(model, "min_length", 1)) - length)
    mixture_BT = torch.from_numpy(np.pad(mixtures, ((0, 0), (0, missing)))).to(device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        estimates_BST = model(mixture_BT).float().cpu()
    model.train(was_training)
    if estimates_BST.ndim != 3 or estimates_BST.shape[::2] != mixture_BT.shape:
        raise SeparationError(
            f"the model made {tuple(estimates_BST.shape)} of {tuple(mixture_BT.shape)}; it must be [B, S, T] of [B, T]"
        )
    if not torch.isfinite(estimates_BST).all():
        raise SeparationError(f"{name}: the model's estimates hold NaN or infinity; its weights may be damaged")
    return estimates_BST[..., :length].numpy()


def overlap_add(windows: Iterable[np.ndarray], overlap: int) -> Iterator[np.ndarray]:
    """Join windows [S + 1, n] (estimates, then mixture) of which neighbours share `overlap` samples; yields [S + 1, m].

    The estimates of each window are put into the order that the window before it has. Only raw estimates of the two
    are compared, never a cross-faded or scaled one with a raw one.
    """
    fade_in = (0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / overlap)).astype(np.float32)
    held: np.ndarray | None = None  # what is not yet given out of the window before, in the common order
    order: list[int] = []
    for window in windows:
        if held is None:
            order = list(range(len(window) - 1))
            held = window
            continue
        tail, head = held[:, -overlap:], window[:, :overlap]
        order = _continued_order(tail[:-1], head[:-1], order)
        rows = [*order, len(window) - 1]
        yield held[:, :-overlap]
        yield tail * (1 - fade_in) + head[rows] * fade_in
        held = window[rows][:, overlap:]
    if held is not None:
        yield held


def _continued_order(tail: np.ndarray, head: np.ndarray, previous: list[int]) -> list[int]:
    """For each speaker of `tail` [S, n] the row of `head` [S, n] that goes on with it: the largest summed product.

    That is the order of least squared difference. Where nothing speaks for one (silence), the previous order holds.
    """
    tail, head = tail.astype(np.float64), head.astype(np.float64)
    score = tail @ head.T
    if np.abs(score).max() <= 1e-6 * np.linalg.norm(tail) * np.linalg.norm(head):
        return previous
    _, order = best_permutation(torch.from_numpy(score.T.copy())[None])
    return [int(i) for i in order[0]]


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
        solution, *_ = np.linalg.lstsq(self.gram * np.outer(unit, unit), self.projection * unit, rcond=1e-6)
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
                    stack.enter_context(soundfile.SoundFile(str(path), "w", rate, 1, subtype, format=container))
                    for path in paths
                ]
                while len(data := stream.read(4 * len(gains) * BLOCK_SAMPLES)):
                    frames = np.frombuffer(data, dtype="<f4").reshape(-1, len(gains)) * gains
                    for speaker, file in enumerate(files):
                        file.write(frames[:, speaker])
        except soundfile.LibsndfileError as error:
            raise OSError(f"{paths[0].name} could not be written ({error}); is the disk full?") from error


def main() -> None:
    """The command line; a recording that fails is named, the others are still separated, and the exit status is 1."""
    arguments = _parser().parse_args()
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        _check_names(arguments.recordings, arguments.output, arguments.format)
        windows = Windows(arguments.window_seconds, arguments.overlap_seconds, arguments.batch_size)
        from sepdist.training.export import load_separator

        export = load_separator(arguments.model)
        model = export.model.to(arguments.device)
        keep_freed_memory()
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"error: {error}", markup=False)
        sys.exit(1)
    failed = False
    for recording in arguments.recordings:
        try:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                task = bar.add_task(PurePosixPath(recording).name, total=None)
                result = separate_file(
                    model,
                    export.sample_rate,
                    recording,
                    arguments.output,
                    windows=windows,
                    file_format=arguments.format,
                    device=arguments.device,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),  # noqa: B023
                )
        except (ValueError, OSError) as error:
            console.print(f"error: {error}", markup=False)
            failed = True
            continue
        for warning in result.warnings:
            console.print(f"warning: {warning}", markup=False)
        for output in result.outputs:
            print(output)
    sys.exit(1 if failed else 0)


def _parser() -> argparse.ArgumentParser:
    defaults = Windows()
    parser = argparse.ArgumentParser(
        prog="python -m sepdist.separate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", nargs="+", metavar="RECORDING", help="audio file (wav, flac, ogg, ...) or s3://")
    parser.add_argument(
        "--model", required=True, help="run_dir (its best checkpoint is taken) or export; path or s3://"
    )
    parser.add_argument("--output", required=True, help="folder or s3:// prefix for <stem>_s1.wav, <stem>_s2.wav, ...")
    parser.add_argument("--format", choices=sorted(FORMATS), default="wav", help="of the outputs (default: wav)")
    parser.add_argument(
        "--window-seconds",
        type=float,
        default=defaults.window_seconds,
        help="what the model sees (default: %(default)s)",
    )
    parser.add_argument(
        "--overlap-seconds",
        type=float,
        default=defaults.overlap_seconds,
        help="shared by neighbours, at most half a window; longer than the pauses keeps speakers apart (%(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        help="windows at once; memory grows with it (%(default)s)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)"
    )
    return parser


def _check_names(recordings: list[str], output: str, file_format: str) -> None:
    """Two recordings of one stem would write the same files, and an output must not replace a recording."""
    stems: dict[str, str] = {}
    given = {str(Path(name).resolve()) for name in recordings if not storage.is_remote(name)}
    for recording in recordings:
        stem = PurePosixPath(recording).stem
        if stem in stems:
            raise SeparationError(f"{stems[stem]} and {recording} would both be written as {stem}_s1.{file_format}")
        stems[stem] = recording
        for name in output_names(recording, 8, file_format):
            if not storage.is_remote(output) and str(Path(output, name).resolve()) in given:
                raise SeparationError(
                    f"an output of {recording} would replace the recording {name}: use another --output"
                )


if __name__ == "__main__":
    main()
