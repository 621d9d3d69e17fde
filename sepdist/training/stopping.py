"""Stop a run when a signal asks for it: first at a committed step, at the second signal at once."""

import os
import signal
from collections.abc import Callable

from sepdist.config import ConfigError
from sepdist.console import Stopped


class StopRequest:
    """Handles the signals of a process that trains, or that drives training."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self.first: Callable[[], object] | None = None  # called once; without it a signal ends all
        self._lost = ""

    def heard(self, number: int) -> None:
        """Handle a signal in the main thread: Stopped, unless it is the first and `first` is set.

        ConfigError if `lose` sent it.
        """
        if self._lost:
            raise ConfigError(self._lost)
        if self.number or not self.first:
            raise Stopped(self.number or number)
        self.number = number
        self.first()

    def asked(self) -> bool:
        """Return whether a signal came."""
        return bool(self.number)

    def lose(self, reason: str) -> None:
        """End the run at once from any thread, because another command has taken it over."""
        self._lost = reason
        os.kill(os.getpid(), signal.SIGTERM)
