"""On PYTHONPATH of the chaos benchmark's processes only: SIGUSR1 makes the next training step of a worker spin.

A live lock cannot be brought about from outside like a kill or a stop: the process lives and answers, and only the
thread that trains never comes back.
"""

import signal
import sys


def _live_lock(*_: object) -> None:
    engine = sys.modules.get("sepdist.training.engine")
    if engine is not None:
        engine.DeepSpeedEngine.step = _spin


def _spin(*_: object, **__: object) -> None:
    while True:
        pass


signal.signal(signal.SIGUSR1, _live_lock)
