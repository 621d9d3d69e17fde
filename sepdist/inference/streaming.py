"""Separate a stream from a pipe block by block with a causal model: PCM or WAV in, PCM out."""

import struct
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from sepdist.inference.separator import Separator
from sepdist.inference.windows import PCM, SeparationError

BLOCK_SECONDS = 0.02  # read, separated and written at once


class Sound(NamedTuple):
    """How the samples of a stream are stored, what was read of them, and how many bytes there are.

    The program at the other end of a pipe may not know how many: then it writes 0 or the most.
    """

    sample_rate: int
    num_channels: int
    dtype: str
    first: bytes = b""
    num_bytes: int | None = None


def separate_stream(
    separator: Separator,
    source: BinaryIO,
    sink: BinaryIO,
    pcm: str,
    tell: Callable[[str], None] = print,
) -> None:
    """Write the estimates of `source` to `sink`, interleaved, as raw samples of the format `pcm`.

    `source` is a WAV file or raw mono samples of that format at the model's rate. `tell` gets the
    latency at first and the length at last. The levels are the model's own.

    Raises:
        SeparationError: the model is not causal, the WAV file has another rate or a format that is
            none of `PCM`, or the stream is empty or holds NaN.
    """
    try:
        if separator.model._forward_hooks:
            raise ValueError("its speakers are chosen when the whole recording is separated")
        streamer = getattr(separator.model, "streamer", None)
        stream = streamer() if streamer else None
    except ValueError as error:
        raise SeparationError(f"--stream: {error}") from error
    if stream is None:
        kind = type(separator.model).__name__
        raise SeparationError(f"--stream: {kind} is not causal; train model.causal=true")
    rate = separator.sample_rate
    sound = open_stream(source, Sound(rate, 1, PCM[pcm]))
    if sound.sample_rate != rate:
        raise SeparationError(f"--stream: {sound.sample_rate} Hz; resample to the model's {rate}")
    clipped = done = 0
    latency = 1000 * stream.latency_samples / rate
    tell(f"latency {latency:g} ms after blocks of {1000 * BLOCK_SECONDS:g} ms; {pcm}, {rate} Hz")

    def write(estimates: torch.Tensor) -> int:
        """Write [S, n] samples; returns how many were cut to full scale."""
        frames, loud = estimates.T.cpu().numpy(), 0
        if pcm == "s16le":
            wide = np.rint(frames * 32768.0)
            frames = np.clip(wide, -32768, 32767)
            loud = int((frames != wide).sum())
        sink.write(frames.astype(PCM[pcm]).tobytes())
        sink.flush()
        return loud

    for wave in _blocks(source, sound):
        if not np.isfinite(wave).all():
            raise SeparationError(f"--stream: NaN or infinity {done / rate:.2f} s from its start")
        clipped += write(stream.push(torch.from_numpy(wave)))
        done += len(wave)
    if not done:
        raise SeparationError("--stream: standard input is empty")
    clipped += write(stream.finish())
    tell(f"{done / rate:.2f} s separated" + (f", {clipped} samples clipped" if clipped else ""))


def open_stream(source: BinaryIO, raw: Sound) -> Sound:
    """Read the header of a WAV file up to its samples; else the stream is `raw`."""
    if (first := source.read(4)) != b"RIFF":
        return raw._replace(first=first)
    source.read(8)
    sound = None
    while len(head := source.read(8)) == 8:
        name, size = struct.unpack("<4sI", head)
        if name == b"data" and sound:
            return sound._replace(num_bytes=size if 0 < size < 0x7FFFF000 else None)
        body = source.read(size + size % 2)
        if name == b"fmt " and len(body) >= 16:
            tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            tag = int.from_bytes(body[24:26], "little") if tag == 0xFFFE else tag
            dtype = {(1, 16): "<i2", (3, 32): "<f4"}.get((tag, bits))
            if not dtype or not channels:
                raise SeparationError(f"--stream: WAV of format {tag} with {bits} bits; give PCM")
            sound = Sound(rate, channels, dtype)
    raise SeparationError("--stream: the WAV file has no samples")


def _blocks(source: BinaryIO, sound: Sound) -> Iterator[np.ndarray]:
    """The mean of the channels in blocks of float32; SeparationError if samples are missing."""
    frame = np.dtype(sound.dtype).itemsize * sound.num_channels
    size = frame * max(1, round(BLOCK_SECONDS * sound.sample_rate))
    scale = np.float32(1 / 32768 if sound.dtype == "<i2" else 1)
    left = sys.maxsize if sound.num_bytes is None else sound.num_bytes
    data = sound.first + source.read(min(size, left) - len(sound.first))
    while data:
        if len(data) % frame or (len(data) < min(size, left) and sound.num_bytes):
            raise SeparationError("--stream: the input is cut short; its end is left out")
        values = np.frombuffer(data, sound.dtype).reshape(-1, sound.num_channels)
        yield values.mean(1, dtype=np.float32) * scale
        left -= len(data)
        data = source.read(min(size, left))
