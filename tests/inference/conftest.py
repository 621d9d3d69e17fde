"""Fixtures of the tests of inference."""

import io
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
from rich.console import Console


@pytest.fixture
def run_verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a program of sepdist/cli on the words of a command line; returns its exit status."""

    def run(program: ModuleType, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", [program.__name__, *words])
        try:
            return int(program.main() or 0)
        except SystemExit as exit_:
            return int(exit_.code or 0)

    return run


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=140)
