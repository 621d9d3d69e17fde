"""Label switching: the share of utterances whose best permutation changed since the epoch before.

Neither data order nor the number of workers matters. Each worker notes its own items; at times the
main rank adds what all have noted to its table, of 32 bytes for each utterance.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SwitchTracker:
    """Permutation ranks by id, of this epoch and the last (paper 1, section 5.3 and figure 2)."""

    def __init__(self) -> None:
        self._noted: list[tuple[int, int, int]] = []  # position, hash of the id, rank
        self._previous = np.empty((0, 2), np.int64)  # by row: hash of an id, rank; each id once
        self._current = [self._previous]  # the same in the order of positions, in pieces

    def update(self, ids: Sequence[str], permutation: Iterable[Any], positions: Iterable) -> None:
        """Note the permutation rank of each item; a later position replaces an earlier one."""
        self._noted += zip(map(int, positions), map(_key, ids), map(int, permutation), strict=True)

    def take(self) -> np.ndarray:
        """Return what this worker has noted since the last call, for `add`."""
        noted, self._noted = self._noted, []
        return np.array(noted, np.int64).reshape(-1, 3)

    def add(self, noted: Iterable[np.ndarray]) -> None:
        """Add what all workers have noted to the table."""
        notes = np.concatenate([np.empty((0, 3), np.int64), *noted])
        self._current.append(notes[np.argsort(notes[:, 0], kind="stable"), 1:])

    def end_epoch(self) -> float | None:
        """Share of changed permutations among the ids of both epochs; None if there are none."""
        newest_first = np.concatenate(self._current)[::-1]
        _, places = np.unique(newest_first[:, 0], return_index=True)
        before, now = self._previous, newest_first[places]
        self._previous, self._current = now, [now[:0]]
        _, old, new = np.intersect1d(before[:, 0], now[:, 0], True, return_indices=True)
        changed = np.count_nonzero(before[old, 1] != now[new, 1])
        return changed / len(old) if len(old) else None

    def previous(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the ranks of the last whole epoch, of those of `ids` that it had."""
        keys = np.array([_key(id_) for id_ in ids], np.int64)
        _, places, numbers = np.intersect1d(self._previous[:, 0], keys, return_indices=True)
        return dict(zip((ids[n] for n in numbers), self._previous[places, 1].tolist(), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Return the table, for `load`."""
        current = torch.from_numpy(np.concatenate(self._current))
        return {"previous": torch.from_numpy(self._previous), "current": current}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from `tensors`, or from the dicts by id that older checkpoints have."""
        tables = {"previous": [], "current": []} | dict(saved)
        for name, table in tables.items():
            rows = [(_key(i), r) for i, r in table.items()] if isinstance(table, dict) else table
            tables[name] = np.array(rows, np.int64).reshape(-1, 2)
        self._previous, self._current = tables["previous"], [tables["current"]]


def _key(id_: str) -> int:
    digest = hashlib.blake2b(id_.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
