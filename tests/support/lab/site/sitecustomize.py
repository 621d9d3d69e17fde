"""Slow each training step down and write when it ended, in the processes of a lab.

A step of a tiny model lasts milliseconds, and every fault would fall between two of them. After a
step this appends "TIME STEP" to the file that LAB_STEPS names, and sleeps for as many seconds as
the file LAB_PACE holds, so that the pace can change while a run goes on.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from types import ModuleType
from typing import Any

ENGINE = "sepdist.training.engine"


class _Pacer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the engine's module as usual, then wraps the step."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        self.usual = importlib.util.find_spec(name)
        assert self.usual is not None and self.usual.origin is not None
        return importlib.util.spec_from_file_location(name, self.usual.origin, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        assert self.usual is not None and self.usual.loader is not None
        self.usual.loader.exec_module(module)
        engine = module.DeepSpeedEngine
        step = engine.step

        def paced(self: Any, batches: list[Any], *more: Any) -> Any:
            result = step(self, batches, *more)
            number = int(batches[0].positions[0]) // (self.num_virtual_shards * self.micro_batch)
            with open(os.environ["LAB_STEPS"], "a") as file:
                file.write(f"{time.time():.3f} {number}\n")
            with open(os.environ["LAB_PACE"]) as file:
                time.sleep(float(file.read() or 0))
            return result

        engine.step = paced


if "LAB_STEPS" in os.environ:
    sys.meta_path.insert(0, _Pacer())
