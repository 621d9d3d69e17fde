"""Windows of a long recording: cut it, separate them, keep one speaker order and cross-fade.

Shapes: B windows of a batch, S speakers, C channels, T samples; n and m are any number of samples.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import soxr


def resampled(blocks: Iterable[np.ndarray], rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """Resample float32 blocks [C, n] of one signal to `new_rate`, without delay (soxr)."""
    if rate == new_rate:
        yield from blocks
        return
    stream: soxr.ResampleStream | None = None
    for block in blocks:
        stream = stream or soxr.ResampleStream(rate, new_rate, len(block), "float32", "HQ")
        frames = np.ascontiguousarray(block.T, dtype=np.float32)
        yield stream.resample_chunk(frames).reshape(-1, len(block)).T
    if stream is not None:
        yield stream.resample_chunk(frames[:0], last=True).reshape(-1, len(block)).T


def cut_windows(
    blocks: Iterable[np.ndarray], size: int, overlap: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Cut a signal that comes in blocks [n] into windows [size]; yields (window, context).

    Neighbours share `overlap` samples. The last window reaches back far enough to be whole: its
    first `context` samples are more than the overlap and not to be used. A signal no longer than
    one window is one window of its own length, even where that is 0.
    """
    hop = size - overlap
    buffer = np.zeros(0, dtype=np.float32)
    before = np.zeros(0, dtype=np.float32)  # the hop before the buffer
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) > size:  # at equality it might be the last, and a whole one
            yield buffer[:size].copy(), 0
            before, buffer = buffer[:hop], buffer[hop:]
    context = min(size - len(buffer), len(before))
    yield np.concatenate([before[len(before) - context :], buffer]), context


def overlap_add(windows: Iterable[np.ndarray], overlap: int) -> Iterator[np.ndarray]:
    """Join windows [S + 1, n] (estimates, then mixture) that overlap; yields blocks [S + 1, m].

    The estimates of each window are put into the order of the window before it. Only raw estimates
    of the two are compared, never a cross-faded or scaled one with a raw one.
    """
    fade_in = (0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / overlap)).astype(np.float32)
    held: np.ndarray | None = None  # end of the window before, not yet emitted, already in order
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
    """The row of `head` [S, n] that continues each speaker of `tail` [S, n].

    It has the largest summed product, which is the least squared difference. `previous` is kept
    where nothing decides, as in silence.
    """
    tail, head = tail.astype(np.float64), head.astype(np.float64)
    score = tail @ head.T
    if np.abs(score).max() <= 1e-6 * np.linalg.norm(tail) * np.linalg.norm(head):
        return previous
    from scipy.optimize import linear_sum_assignment  # late: SciPy takes a second to import

    return linear_sum_assignment(score, maximize=True)[1].tolist()
