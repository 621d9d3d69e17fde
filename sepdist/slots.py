"""Plug-in packages, whose modules may stand in the slots of a config."""

import importlib
from collections.abc import Sequence


def use_plugins(names: Sequence[str]) -> None:
    """Import the packages that the user has named."""
    for name in names:
        importlib.import_module(name)
