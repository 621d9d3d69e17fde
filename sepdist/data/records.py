"""The records that cross the seams: what a corpus yields (Utterance, Mixture) and what a model trains on (Batch).

A record of a corpus is a light, picklable description; its audio is read only when `load()` is called, so that a
list of 50,000 records can be cut into shards and handed to other machines.

Shapes: B batch, S sources, T samples (audio frames).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAIN = "main"  # the data set of the task that validation measures, `data.train`


@dataclass(frozen=True)
class Utterance:
    """One person speaking alone. `load()` returns float32 [T] at `sample_rate`, full scale 1.0."""

    id: str
    speaker: str
    sample_rate: int
    load: Callable[[], np.ndarray]
    text: str = ""
    sex: str = ""


@dataclass(frozen=True)
class Mixture:
    """Several people at once. `load()` returns its parts, each float32 [T] of one common length T at `sample_rate`.

    The parts are "s1", "s2", ... and possibly "noise", whose sum is the mixture; or "mix" alone where no sources exist.
    "e1", "e2", ... may stand beside the sources: what a separator made of the mixture, in their order.
    """

    id: str
    speakers: tuple[str, ...]
    sample_rate: int
    load: Callable[[], Mapping[str, np.ndarray]]
    texts: tuple[str, ...] = ()
    measure: Callable[[Mapping[str, np.ndarray]], dict[str, Any]] | None = (
        None  # the parts in, more facts to store out
    )


@dataclass
class Batch:
    """What an objective reads: items of equal length, of which `lengths` says how much is signal and not padding."""

    ids: list[str]
    positions: Tensor  # int64 [B], the global positions of the items in the data order
    mixture: Tensor  # float32 [B, T]
    sources: Tensor | None  # float32 [B, S, T]; None where there is no ground truth
    noise: Tensor | None  # float32 [B, T]; None where none was added
    lengths: Tensor  # int64 [B]
    speakers: list[tuple[str, ...]] = field(default_factory=list)
    data_set: str = MAIN  # all items of a batch come from one
    estimates: Tensor | None = (
        None  # float32 [B, S, T], of a separator, in the order of the sources
    )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return replace(
            self,
            mixture=self.mixture.to(device, non_blocking=True),
            sources=move(self.sources),
            noise=move(self.noise),
            estimates=move(self.estimates),
        )
