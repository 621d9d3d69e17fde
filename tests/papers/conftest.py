"""Composes every stage of the papers' pipelines once."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from sepdist.papers import pipeline

_MADE: dict[tuple[str, ...], Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _compose_each_stage_once() -> Iterator[None]:
    """Pipelines have most stages in common, and composing takes its time."""
    compose = pipeline.composed

    def composed(name: str, overrides: Any, fixed: Any, schema: Any) -> Any:
        key = (name, *overrides, str(fixed))
        if key not in _MADE:
            _MADE[key] = compose(name, overrides, fixed, schema)
        return copy.deepcopy(_MADE[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "composed", composed)
        yield
