"""Make SIGUSR1 turn a worker's next training step into an endless loop.

On PYTHONPATH of the chaos benchmark's processes only. Unlike a kill or a stop, a livelock cannot be
caused from outside: the process lives and answers, and only the thread that trains never returns.
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
