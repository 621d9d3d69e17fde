"""End a worker that makes no progress, with the stacks of its threads in the log.

A rank that hangs holds all others in a collective operation, where no error reaches them. So each
rank watches itself, and Ray starts the workers again from the newest checkpoint.
"""

import faulthandler
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

TIMES_USUAL = 10.0  # a beat may take this many times the 95th percentile of those before
STDERR = 2  # the descriptor: Ray and pytest replace sys.stderr


@dataclass(eq=False)
class Watchdog:
    """Dump all stacks and exit with status 1 if no `beat` comes for `hang_seconds`.

    More is allowed where beats are usually slow, and `startup_seconds` before the first beat and
    after `expect_slow`, because the first step compiles. `hang_seconds=0` disables the watchdog.

    The timer is faulthandler's, a thread in C that runs even while other C code holds the GIL. It
    does not count time in which the machine was suspended. A process that was stopped (SIGSTOP) for
    longer than allowed ends when it continues; its peers have given it up by then.
    """

    hang_seconds: float
    startup_seconds: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._intervals: deque[float] = deque(maxlen=100)
        self.expect_slow()

    def beat(self) -> None:
        """Report progress, and restart the timer (less than 1 ms)."""
        if self._allowed < self.startup_seconds:
            self._intervals.append(self.clock() - self._last_beat)
        several = len(self._intervals) > 1
        usual = statistics.quantiles(self._intervals, n=20)[-1] if several else 0.0
        self._arm(min(max(self.hang_seconds, TIMES_USUAL * usual), self.startup_seconds))

    def expect_slow(self) -> None:
        """Allow `startup_seconds` until the next beat."""
        self._arm(self.startup_seconds)

    def close(self) -> None:
        """Stop watching for good."""
        self.hang_seconds = 0.0
        faulthandler.cancel_dump_traceback_later()

    def _arm(self, seconds: float) -> None:
        self._last_beat = self.clock()
        self._allowed = seconds
        if self.hang_seconds:
            faulthandler.dump_traceback_later(seconds, file=STDERR, exit=True)
