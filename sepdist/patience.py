"""Tolerate failed writes of a run until they have lasted too long."""

import logging
import time
from dataclasses import dataclass

from sepdist.storage import StorageError

logger = logging.getLogger(__name__)


@dataclass
class Patience:
    """Allows failures for `seconds` from the first one since the last success."""

    seconds: float
    what: str  # that is not written
    since: float | None = None

    def succeeded(self) -> None:
        """Forget the failures before."""
        self.since = None

    def failed(self, error: OSError, began: float) -> None:
        """Warn of a write that failed, begun at time.monotonic() `began`.

        StorageError once the failures have lasted longer than `seconds`.
        """
        self.since = began if self.since is None else self.since
        lasted = time.monotonic() - self.since
        limit = f"training.storage_patience_seconds={self.seconds:g}"
        if lasted >= self.seconds:
            raise StorageError(
                f"{error} ({self.what} not written for {lasted:.0f} s; {limit} are over, the run "
                "ends; once storage is back the same command goes on from the newest checkpoint)"
            ) from error
        logger.warning("%s (%s not written; the run goes on, %s)", error, self.what, limit)
