"""Keep speakers apart over pauses: let the model hear the speech before and after one together.

Shapes: S speakers, T samples; n is any number of samples.
"""

from collections.abc import Callable

import numpy as np

FRAME_SECONDS = 0.05
MARGIN = 4  # frames before and after speech that count as speech


class Pauses:
    """Finds pauses, and separates the speech after one together with the speech before it.

    Frames are speech above a level between the quietest and the loudest of the last minutes.
    `separate` maps a mixture [T] to estimates [S, T]; it gets at most `size` + `overlap` samples.
    `unsure` has the times in samples of the speech after pauses longer than the overlap whose
    speakers depend on whether the model hears it behind the speech before the pause or ahead of it.
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
        if not block.size:
            return block
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
        if gaps.max(initial=0) <= self.overlap / 2:
            return None
        new = window[:, active]
        before = before[:, -max(self.overlap, self.size - new.shape[1]) :]
        num, same = before.shape[1], list(range(len(window) - 1))
        together = self.separate(np.concatenate([before[-1], new[-1]]))
        together = together[continued_order(before[:-1], together[:, :num], same)]
        if gaps[0] > self.overlap:
            self._ask_again(before, new, together[:, num:], self.now + int(at[0]))
        rows = continued_order(together[:, num:], new[:-1], same)
        result = window[[*rows, len(rows)]]
        fade_T = np.convolve(active, np.ones(self.frame) / self.frame, "same") * active
        fade_T = np.maximum(2 * fade_T - 1, 0).astype(np.float32)
        result[:-1] *= 1 - fade_T
        result[:-1, active] += together[:, num:] * fade_T[active]
        return result

    def warnings(self) -> list[str]:
        """One warning with the first of the unsure times, [] if there are none."""
        times = [f"{t // 60:.0f}:{t % 60:04.1f}" for t in (one / self.rate for one in self.unsure)]
        shown = ", ".join([*times[:10], *(["..."] if len(times) > 10 else [])])
        what = f"nothing sure tells who is who after {len(times)} long pauses, at {shown}"
        return [f"{what} (min:s): the outputs may exchange their speakers there"] if times else []

    def _ask_again(
        self, before: np.ndarray, new: np.ndarray, estimates: np.ndarray, time: int
    ) -> None:
        """Note that speech at `time` is unsure if new speech heard first has another order."""
        num, same = new.shape[1], list(range(len(estimates)))
        swapped = self.separate(np.concatenate([new[-1], before[-1]]))
        swapped = swapped[continued_order(before[:-1], swapped[:, num:], same)]
        self.unsure = [one for one in self.unsure if one < time - self.size]  # asked again by now
        if continued_order(estimates, swapped[:, :num], same) != same:
            self.unsure.append(time)

    def _speech(self, mixture_T: np.ndarray, update: bool = False) -> np.ndarray:
        """Bool [T]; with `update` the level that tells speech from pauses is that of this wave."""
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


def continued_order(tail: np.ndarray, head: np.ndarray, previous: list[int]) -> list[int]:
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
