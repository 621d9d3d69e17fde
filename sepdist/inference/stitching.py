"""Windows of a long recording: cut it, separate them, keep one speaker order and cross-fade.

Shapes: B windows of a batch, S speakers, C channels, T samples; n and m are any number of samples.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import soxr

FRAME_SECONDS = 0.05  # in which speech is told from pauses
MARGIN = 4  # frames before and after speech that count as speech


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

    What is below 20 Hz is removed if over 2 % of the power lie below 10 Hz, denser by 10 dB than
    from 20 to 60 Hz. Hum has over 0.1 % of the power and stands out by 20 dB from the 10 Hz around
    it, at 50 Hz or two of its first ten multiples; the same for 60 Hz.
    """
    if (width := len(wave_T) / rate) < 0.25:  # bins of 1 Hz
        return wave_T
    power = np.square(np.abs(np.fft.rfft(wave_T * np.hanning(len(wave_T)))))
    low, near = power[: round(10 * width) + 1], power[round(20 * width) : round(60 * width)]
    total = power.sum()
    removed = [0] if low.sum() > max(0.02 * total, 10 * len(low) * near.mean()) else []
    for mains in (50, 60) if width >= 2 else ():
        lines = dict[int, float]()
        for hertz in range(mains, min(11 * mains, rate // 2 - 10), mains):
            a, b, c, d = (round((hertz + offset) * width) for offset in (-5, -0.5, 0.5, 5))
            if power[b : c + 1].max() > 100 * np.median(power[a:d]):
                lines[hertz] = power[b : c + 1].sum()
        if (mains in lines or len(lines) > 1) and sum(lines.values()) > total / 1000:
            removed += lines
    if not removed:
        return wave_T
    from scipy import signal  # late: SciPy takes a second to import

    result, high = wave_T.astype(np.float64), signal.butter(2, 20, "high", fs=rate)
    for hertz in removed:
        taps = signal.iirnotch(hertz, hertz / 1.5, rate) if hertz else high
        result = signal.filtfilt(*taps, result, padlen=min(rate, len(wave_T) - 1))
    audible = np.abs(result).max() > 1e-6 * np.abs(wave_T).max()  # not the rounding of a constant
    return (result * audible).astype(np.float32)


class Pauses:
    """Finds pauses, and separates the speech after one together with the speech before it.

    Frames are speech above a level between the quietest and the loudest of the last minutes.
    `separate` maps a mixture [T] to estimates [S, T]; it gets at most `size` + `overlap` samples.
    `unsure` has the times in samples of the speech after pauses longer than the overlap.
    """

    def __init__(
        self, separate: Callable[[np.ndarray], np.ndarray], rate: int, size: int, overlap: int
    ) -> None:
        self.rate, self.separate, self.size, self.overlap = rate, separate, size, overlap
        self.frame = max(1, round(FRAME_SECONDS * rate))
        self.loud, self.quiet, self.least = -np.inf, np.inf, -np.inf  # dB
        self.recent: np.ndarray | None = None  # the last speech [S + 1, n], in order, and mixture
        self.now = self.last_speech = 0  # samples
        self.unsure: list[int] = []

    def remember(self, block: np.ndarray) -> np.ndarray:
        """Return a block [S + 1, n] that is finished, after its speech was kept."""
        active = self._speech(block[-1])
        kept = [block[:, active]] if self.recent is None else [self.recent, block[:, active]]
        self.recent = np.concatenate(kept, axis=1)[:, -self.size :]
        if active.any():
            self.last_speech = self.now + int(np.flatnonzero(active)[-1])
        self.now += block.shape[1]
        return block

    def bridged(self, window: np.ndarray) -> np.ndarray | None:
        """The window [S + 1, n] that begins at `now`, in the common order; None without a pause.

        Its speech is separated again, with pauses left out and after the speech before them.
        """
        active = self._speech(window[-1], update=True)
        at = np.flatnonzero(active)
        before = window[:, :0] if self.recent is None else self.recent
        gaps = np.diff(at, prepend=self.last_speech - self.now if before.size else at[:1])
        if gaps.max(initial=0) <= max(self.overlap / 2, self.frame):
            return None
        new = window[:, active]
        before = before[:, -max(self.overlap, self.size - new.shape[1]) :]
        num, same = before.shape[1], list(range(len(window) - 1))
        together = self.separate(np.concatenate([before[-1], new[-1]]))
        together = together[_continued_order(before[:-1], together[:, :num], same)]
        time = self.now + int(at[0])
        if gaps[0] > self.overlap and (not self.unsure or time > self.unsure[-1] + self.overlap):
            self.unsure.append(time)
        rows = _continued_order(together[:, num:], new[:-1], same)
        result = window[[*rows, len(rows)]]
        width = min(self.frame, len(active))
        fade_T = np.convolve(active, np.ones(width) / width, "same") * active
        fade_T = np.maximum(2 * fade_T - 1, 0).astype(np.float32)
        result[:-1] *= 1 - fade_T
        result[:-1, active] += together[:, num:] * fade_T[active]
        return result

    def warnings(self) -> list[str]:
        """One warning with the first times after long pauses, [] if there are none."""
        times = [f"{t // 60:.0f}:{t % 60:04.1f}" for t in (one / self.rate for one in self.unsure)]
        shown = ", ".join([*times[:10], *(["..."] if len(times) > 10 else [])])
        long = f"{len(times)} pauses longer than the overlap of windows, until {shown} (min:s)"
        return [f"only the voices told who is who after {long}"] if times else []

    def _speech(self, mixture_T: np.ndarray, update: bool = False) -> np.ndarray:
        """Bool [T]; with `update` the level that tells speech from pauses is that of this wave."""
        if not mixture_T.size:
            return np.zeros(0, bool)
        starts = np.arange(0, len(mixture_T), self.frame)
        power = np.add.reduceat(np.square(mixture_T, dtype=np.float64), starts) / self.frame
        level = 10 * np.log10(power + 1e-20)
        if update:
            quiet, loud = np.percentile(level, (10, 95))
            self.loud = max(self.loud - 0.5, loud)  # both are forgotten slowly
            self.quiet = min(max(self.quiet + 1, self.loud - 60), quiet)
            self.least = np.clip(self.quiet + 8, self.loud - 35, self.loud - 12)
        near = np.convolve(level > self.least, np.ones(2 * MARGIN + 1))[MARGIN:]
        return np.repeat(near[: len(level)] > 0.5, self.frame)[: len(mixture_T)]


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
            order = _continued_order(tail[:-1], head[:-1], order)
        else:
            tail = tail[[*_continued_order(head[:-1], tail[:-1], same), len(same)]]
        rows = [*order, len(window) - 1]
        yield pauses.remember(tail * (1 - fade_in) + head[rows] * fade_in)
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
