"""Separate a pipe block by block with a causal model: PCM or WAV in, PCM out."""

import wave
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from sepdist.inference.separator import Separator
from sepdist.inference.windows import PCM, SeparationError

BLOCK_SECONDS = 0.02  # read, separated and written at once


def separate_stream(
    separator: Separator,
    source: Any,  # a BufferedReader
    sink: BinaryIO,
    pcm: str,
    tell: Callable[[str], None] = print,
) -> None:
    """Write the estimates of `source`, interleaved, as raw samples of the format `pcm`.

    `source` is a 16-bit WAV file or raw mono samples of that format at the model's rate. `tell`
    gets the latency at first and the length at last. The levels are the model's own.

    Raises:
        ValueError: the model is not causal, the WAV file has another rate or width, or the stream
            is empty, ends within a sample or holds NaN.
    """
    make, rate = getattr(separator.model, "streamer", None), separator.sample_rate
    if make is None or separator.model._forward_hooks:  # a hook that chooses among all outputs
        raise SeparationError("--stream: this model needs whole recordings; use a causal one")
    stream, num_channels, kind = make(), 1, np.dtype(PCM[pcm])
    num_frames, done, clipped = round(BLOCK_SECONDS * rate), 0, 0
    read: Callable[[int], bytes] = lambda frames: source.read(frames * kind.itemsize)  # noqa: E731
    if source.peek(4)[:4] == b"RIFF":
        try:
            file = wave.open(source)  # noqa: SIM115
        except (wave.Error, EOFError) as error:
            raise SeparationError(f"--stream: WAV: {error}; give 16 bits, or raw") from error
        if (file.getframerate(), file.getsampwidth()) != (rate, 2):
            found = f"{file.getframerate()} Hz and {8 * file.getsampwidth()} bits"
            raise SeparationError(f"--stream: WAV of {found}; give {rate} Hz and 16 bits")
        read, num_channels, kind = file.readframes, file.getnchannels(), np.dtype("<i2")
    latency = f"latency {1000 * stream.latency_samples / rate:g} ms"
    tell(f"{latency} after blocks of {1000 * BLOCK_SECONDS:g} ms; {pcm}, {rate} Hz")
    while data := read(num_frames):
        if len(data) % (kind.itemsize * num_channels):
            raise SeparationError("--stream: the input ends within a sample")
        block_T = np.frombuffer(data, kind).reshape(-1, num_channels).mean(1, dtype=np.float32)
        block_T /= np.float32(32768 if kind.itemsize == 2 else 1)
        if not np.isfinite(block_T).all():
            raise SeparationError(f"--stream: NaN or infinity {done / rate:.2f} s from the start")
        clipped += _write(sink, stream.push(torch.from_numpy(block_T)), pcm)
        done += len(block_T)
    if not done:
        raise SeparationError("--stream: standard input is empty")
    clipped += _write(sink, stream.finish(), pcm)
    tell(f"{done / rate:.2f} s separated" + (f", {clipped} samples clipped" if clipped else ""))


def _write(sink: BinaryIO, estimates_ST: torch.Tensor, pcm: str) -> int:
    """Write samples; returns how many were cut to full scale."""
    wide = estimates_ST.T.cpu().numpy()
    wide = np.rint(wide * 32768) if pcm == "s16le" else wide
    frames = np.clip(wide, -32768, 32767) if pcm == "s16le" else wide
    sink.write(frames.astype(PCM[pcm]).tobytes())
    sink.flush()
    return int((frames != wide).sum())
