"""Read recordings in blocks and write the outputs of a separation, complete or not at all.

Shapes: S speakers, C channels, T samples; n is any number of samples.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from sepdist import audio, storage
from sepdist.inference.windows import SeparationError

BLOCK_SAMPLES = 1 << 16
MAX_WAV_BYTES = 2**32 - 2**16  # a larger one is written as RF64


@dataclass
class Track:
    """The estimates of one channel, or of the mean of all, as float32 frames in a file."""

    path: Path
    suffix: str  # of its outputs' names
    gains: np.ndarray  # [S]
    peaks: np.ndarray  # [S], without the gains


def open_recording(recording: str, work: Path) -> soundfile.SoundFile:
    """Open a path, an s3:// object or `-`, standard input; what is fetched lies in `work`."""
    path, name = Path(os.path.abspath(recording)), recording
    if recording == "-":
        path, name = work / "recording", "standard input"
        if sys.stdin.isatty():
            raise SeparationError("standard input is a terminal: pipe a recording into it")
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    elif storage.is_remote(recording):
        path = work / "recording"
        storage.fetch_file(recording, path)
    storage.size(path)  # its errors name the file and say what to do
    if not path.is_file():  # opening a pipe may never return
        raise SeparationError(f"{name} is a folder, pipe or device; give a file of audio")
    try:
        return audio.open_sound(path, work)
    except audio.AudioError as error:
        raise SeparationError(str(error).replace(str(path), name)) from error
    except OSError as error:
        raise storage.disk_error(name, "read", error) from error


def chosen_channels(channels: str | int, num_channels: int, name: str) -> list[int]:
    """The channels to separate, from 1; [0] stands for the mean of all."""
    if channels == "each":
        return list(range(1, num_channels + 1))
    channel = 0 if channels == "mean" else int(channels)
    if channel > num_channels:
        raise SeparationError(f"{name} has no channel {channel}, only {num_channels}")
    return [channel]


def of_channel(wave_TC: np.ndarray, channel: int) -> np.ndarray:
    """One channel [T, 1], or for 0 all of them."""
    return wave_TC[:, channel - 1 : channel] if channel else wave_TC


def read_blocks(
    sound: soundfile.SoundFile, name: str, channel: int, progress: Callable[[float, float], None]
) -> Iterator[np.ndarray]:
    """A channel (0: all) in float32 blocks [n, C], as many samples as the header promises."""
    rate, done = sound.samplerate, 0
    if channel > 1:
        sound.seek(0)
    while done < sound.frames:
        try:
            block = sound.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise SeparationError(
                f"{name} is damaged {done / rate:.2f} s from its start: {error}"
            ) from error
        if len(block) == 0:
            raise SeparationError(f"{name} is cut short: it has {done} of {sound.frames} samples")
        done += len(block)
        yield of_channel(block, channel)
        progress(len(block) / rate, sound.frames / rate)


def write_raw(file: IO[bytes], blocks: Iterable[np.ndarray], num_samples: int) -> np.ndarray:
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


def write_audio(
    paths: list[Path], tracks: Sequence[Track], scale: float, rate: int, subtype: str
) -> None:
    """Write every speaker of the tracks at its level: one per file, or as channels of one file."""
    width = sum(len(track.gains) for track in tracks) // len(paths)  # channels of a file
    num_bytes = width * tracks[0].path.stat().st_size // len(tracks[0].gains)  # at 32 bits
    large = paths[0].suffix == ".wav" and num_bytes > MAX_WAV_BYTES
    try:
        with ExitStack() as stack:
            streams = [stack.enter_context(track.path.open("rb")) for track in tracks]
            outs = [
                soundfile.SoundFile(
                    path, "w", rate, width, subtype, format="RF64" if large else None
                )
                for path in paths
            ]
            for out in outs:
                stack.enter_context(out)
            while True:
                blocks = [
                    np.fromfile(stream, "<f4", len(track.gains) * BLOCK_SAMPLES).reshape(
                        -1, len(track.gains)
                    )
                    * (track.gains * scale)
                    for stream, track in zip(streams, tracks, strict=True)
                ]
                frames_TS = np.concatenate(blocks, axis=1)
                if not len(frames_TS):
                    return
                for i, out in enumerate(outs):
                    out.write(frames_TS[:, i * width : (i + 1) * width])
    except soundfile.LibsndfileError as error:
        raise OSError(
            f"{paths[0].name} could not be written ({error}); is the disk full?"
        ) from error


def publish(files: Mapping[Path, str]) -> None:
    """Move finished files to the outputs; if that is interrupted, none is left without the rest."""
    with ExitStack() as undo:
        for path, output in files.items():
            if output == "-":
                with path.open("rb") as file:
                    shutil.copyfileobj(file, sys.stdout.buffer)
                continue
            if storage.is_remote(output):
                storage.put_file(path, output)
            else:
                Path(output).parent.mkdir(parents=True, exist_ok=True)
                path.replace(output)
            undo.callback(storage.remove, output)
        undo.pop_all()
