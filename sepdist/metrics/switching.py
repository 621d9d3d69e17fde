"""Label switching: the best permutation of every training item in, the share that changed since the epoch before out.

The table is keyed by utterance id, so that neither the order of the data nor the number of workers matters. Each
worker notes its own items; before an epoch is closed the workers exchange `state_dict()` and `merge` all of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any


class SwitchTracker:
    """Permutation ranks of this epoch and of the one before, by utterance id (paper 1, section 5.3 and figure 2)."""

    def __init__(self) -> None:
        self._previous: dict[str, int] = {}
        self._current: dict[str, int] = {}

    def update(self, ids: Sequence[str], permutation: Iterable[Any]) -> None:
        """Note the permutation rank of each item; of an id seen twice in an epoch the later counts."""
        for id_, rank in zip(ids, permutation, strict=True):
            self._current[id_] = int(rank)

    def merge(self, states: Iterable[dict[str, Any]]) -> None:
        """Become the union of the workers' states, the same on every worker that merges the same list."""
        previous: dict[str, int] = {}
        current: dict[str, int] = {}
        for state in states:
            previous |= state["previous"]
            current |= state["current"]
        self._previous, self._current = previous, current

    def end_epoch(self) -> float | None:
        """The share, of the ids seen in both epochs, whose permutation changed; None where there is no such id."""
        both = self._previous.keys() & self._current.keys()
        changed = sum(self._previous[id_] != self._current[id_] for id_ in both)
        self._previous, self._current = self._current, {}
        return changed / len(both) if both else None

    def state_dict(self) -> dict[str, Any]:
        """Both epochs, as JSON can hold them."""
        return {"previous": dict(self._previous), "current": dict(self._current)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.merge([state])
