"""Windows of a long recording: cut, separate, put in one speaker order and cross-fade."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import soxr
import torch
from torch import nn

from sepdist.metrics.permutation import best_permutation


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
            stream = soxr.ResampleStream(
                rate, new_rate, num_channels, dtype="float32", quality="HQ"
            )
        yield _resample(stream, block)
    if stream is not None:
        yield _resample(stream, np.zeros((num_channels, 0), dtype=np.float32), last=True)


def _resample(stream: soxr.ResampleStream, block: np.ndarray, last: bool = False) -> np.ndarray:
    frames = np.ascontiguousarray(block.T, dtype=np.float32)
    return stream.resample_chunk(frames, last=last).reshape(-1, len(block)).T


def cut_windows(
    blocks: Iterable[np.ndarray], size: int, overlap: int
) -> Iterator[tuple[np.ndarray, int]]:
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
        if (
            num_speakers is None and not shown
        ):  # nothing but silence so far: how many outputs has the model?
            shown = [np.random.default_rng(0).standard_normal(len(batch[0][0])).astype(np.float32)]
        estimates = _forward(model, np.stack(shown), name, model_rate, device) if shown else None
        if estimates is not None:
            num_speakers = estimates.shape[1]
        assert num_speakers is not None
        results = iter(estimates) if estimates is not None else iter(())
        for (wave, context), is_loud in zip(batch, loud, strict=True):
            own = (
                next(results) if is_loud else np.zeros((num_speakers, len(wave)), dtype=np.float32)
            )
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
        raise SeparationError(
            f"{name}: the model's estimates hold NaN or infinity; its weights may be damaged"
        )
    return estimates_BST[..., :length].numpy()


def overlap_add(windows: Iterable[np.ndarray], overlap: int) -> Iterator[np.ndarray]:
    """Join windows [S + 1, n] (estimates, then mixture) of which neighbours share `overlap` samples; yields [S + 1, m].

    The estimates of each window are put into the order that the window before it has. Only raw estimates of the two
    are compared, never a cross-faded or scaled one with a raw one.
    """
    fade_in = (0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / overlap)).astype(np.float32)
    held: np.ndarray | None = (
        None  # what is not yet given out of the window before, in the common order
    )
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
