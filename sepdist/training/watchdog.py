"""A worker that makes no progress: beats in; after too long without one, every thread's stack in the log and an exit.

A rank that hangs holds all others in a collective, where no error ever reaches them: each rank's watchdog ends its own
process, and Ray starts the workers again from the newest checkpoint.
"""

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

EXIT_STATUS = 42
POLL_SECONDS = 1.0
TIMES_USUAL = 10.0  # a beat may take so many times the 95th percentile of those before


def end_process() -> None:
    """Exit without clean-up, which would wait for the thread that hangs."""
    os._exit(EXIT_STATUS)


class Watchdog:
    """Ends the process if no `beat` comes for `hang_seconds`, or longer where beats are usually slow.

    The first beat, and one after `expect_slow`, may take `startup_seconds`: the first step compiles. `hang_seconds` 0
    watches nothing. Time in which the whole process was stopped (a suspended machine) does not count.
    """

    def __init__(
        self,
        hang_seconds: float,
        startup_seconds: float,
        on_hang: Callable[[], None] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hang_seconds = hang_seconds
        self.startup_seconds = startup_seconds
        self._on_hang = on_hang
        self._clock = clock
        self._lock = threading.Lock()
        self._intervals: deque[float] = deque(maxlen=100)
        self._last_beat = self._last_look = clock()
        self._allowed = startup_seconds
        self._stopped = threading.Event()
        if hang_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Progress was made."""
        with self._lock:
            now = self._clock()
            if self._allowed < self.startup_seconds:
                self._intervals.append(now - self._last_beat)
            self._last_beat = now
            usual = (
                statistics.quantiles(self._intervals, n=20)[-1] if len(self._intervals) > 1 else 0.0
            )
            self._allowed = min(max(self.hang_seconds, TIMES_USUAL * usual), self.startup_seconds)

    def expect_slow(self) -> None:
        """What comes next may take `startup_seconds`."""
        with self._lock:
            self._last_beat = self._clock()
            self._allowed = self.startup_seconds

    def close(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            if self.overdue():
                self._on_hang()
                return

    def overdue(self) -> bool:
        """Whether the beat is overdue; if so, the stacks of all threads are in the log."""
        with self._lock:
            now = self._clock()
            if now - self._last_look > 5 * POLL_SECONDS:
                self._last_beat += now - self._last_look  # this thread did not run either
            self._last_look = now
            silent, allowed = now - self._last_beat, self._allowed
        if silent <= allowed:
            return False
        logger.error(
            "no progress for %.0f s, %.0f s are allowed: ending this worker; its threads:",
            silent,
            allowed,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        return True
