"""Windows of a long recording: cut it, separate them, keep one speaker order and cross-fade.

Shapes: B windows of a batch, S speakers, C channels, T samples; n and m are any number of samples.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import soxr

from sepdist.inference.pauses import Pauses, continued_order


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


def cleaned(wave_T: np.ndarray, rate: int) -> np.ndarray:
    """Return a window without DC, drift and mains hum; one without them as it is, to the bit.

    What is below 20 Hz is removed if over 2 % of the power lie below 10 Hz. Hum stands out by 20 dB
    from the 10 Hz around it, at 50 Hz or two of its first ten multiples; the same for 60 Hz.
    """
    if (width := len(wave_T) / rate) < 0.25:  # bins of 1 Hz
        return wave_T
    power = np.square(np.abs(np.fft.rfft(wave_T * np.hanning(len(wave_T)))))
    removed = [0] if power[: round(10 * width) + 1].sum() > 0.02 * power.sum() else []
    for mains in (50, 60) if width >= 2 else ():
        lines = []
        for hertz in range(mains, min(11 * mains, rate // 2 - 10), mains):
            a, b, c, d = (round((hertz + offset) * width) for offset in (-5, -0.5, 0.5, 5))
            if power[b : c + 1].max() > 100 * np.median(power[a:d]):
                lines.append(hertz)
        removed += lines if mains in lines or len(lines) > 1 else []
    if not removed:
        return wave_T
    from scipy import signal  # late: SciPy takes a second to import

    result, high = wave_T.astype(np.float64), signal.butter(2, 20, "high", fs=rate)
    for hertz in removed:
        taps = signal.iirnotch(hertz, hertz / 1.5, rate) if hertz else high
        result = signal.filtfilt(*taps, result, padlen=min(rate, len(wave_T) - 1))
    if np.abs(result).max() < 1e-6 * np.abs(wave_T).max():  # the rounding of a constant
        return np.zeros_like(wave_T)
    return result.astype(np.float32)


def overlap_add(
    windows: Iterable[np.ndarray], overlap: int, pauses: Pauses
) -> Iterator[np.ndarray]:
    """Join windows [S + 1, n] (estimates, then mixture) that overlap; yields blocks [S + 1, m].

    The estimates of each window are put into the order of the window before it. Only raw estimates
    of the two are compared, never a cross-faded or scaled one with a raw one. Where a window has a
    pause, `pauses` gives the order of all that is not yet emitted.
    """
    fade_in = (0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / overlap)).astype(np.float32)
    held: np.ndarray | None = None  # end of the window before, not yet emitted, already in order
    order: list[int] = []
    for window in windows:
        if held is not None:
            yield pauses.remember(held[:, :-overlap])
        same = list(range(len(window) - 1))
        bridged = pauses.bridged(window)
        if bridged is not None:
            window, order = bridged, same
        if held is None:
            order, held = same, window
            continue
        tail, head = held[:, -overlap:], window[:, :overlap]
        if bridged is None:
            order = continued_order(tail[:-1], head[:-1], order)
        else:
            tail = tail[[*continued_order(head[:-1], tail[:-1], same), len(same)]]
        rows = [*order, len(window) - 1]
        yield pauses.remember(tail * (1 - fade_in) + head[rows] * fade_in)
        held = window[rows][:, overlap:]
    if held is not None:
        yield held
