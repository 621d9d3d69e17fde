"""Label switching: the share of utterances whose best permutation changed since the epoch before.

Utterance ids key the table, so neither data order nor the number of workers matters. Each worker
records its own items; before an epoch ends, all exchange `state_dict()` and `merge` the list.
"""

from collections.abc import Iterable, Sequence
from typing import Any


class SwitchTracker:
    """Permutation ranks by id, of this epoch and the last (paper 1, section 5.3 and figure 2)."""

    def __init__(self) -> None:
        self._previous: dict[str, int] = {}
        self._current: dict[str, int] = {}

    def update(self, ids: Sequence[str], permutation: Iterable[Any]) -> None:
        """Record the permutation rank of each item; a later one replaces an earlier one."""
        self._current |= {id_: int(rank) for id_, rank in zip(ids, permutation, strict=True)}

    def merge(self, states: Iterable[dict[str, Any]]) -> None:
        """Become the union of the workers' states; all workers must merge the same list."""
        states = list(states)
        self._previous = {id_: rank for one in states for id_, rank in one["previous"].items()}
        self._current = {id_: rank for one in states for id_, rank in one["current"].items()}

    def end_epoch(self) -> float | None:
        """Share of changed permutations among the ids of both epochs; None if there are none."""
        both = self._previous.keys() & self._current.keys()
        changed = sum(self._previous[id_] != self._current[id_] for id_ in both)
        self._previous, self._current = self._current, {}
        return changed / len(both) if both else None

    def state_dict(self) -> dict[str, Any]:
        """Return both epochs, JSON-able."""
        return {"previous": dict(self._previous), "current": dict(self._current)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.merge([state])
