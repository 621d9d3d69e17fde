"""Shared records: what a corpus yields (Utterance, Mixture) and what a model trains on (Batch).

A corpus record is a small, picklable description. Its audio is read only when `load()` is called,
so a list of 50,000 records can be cut into shards and sent to other machines.

Shapes: B batch, S sources, T samples (audio frames).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

AUDIO = ("mixture", "sources", "noise", "estimates")  # the fields of a batch with samples
MAIN = "main"  # name of `data.train`, the data set whose task validation measures


@dataclass(frozen=True)
class Utterance:
    """One person speaking alone. `load()` returns float32 [T] at `sample_rate`, full scale 1.0."""

    id: str
    speaker: str
    sample_rate: int
    load: Callable[[], np.ndarray]
    text: str = ""


@dataclass(frozen=True)
class Mixture:
    """Several people speaking at once. `load()` returns members by name, float32 [T] of one length.

    The members are the sources "s1", "s2", ... and optionally "noise", and the mixture is their
    sum, or "mix" beside them where it is not; or "mix" alone where the sources are unknown. "e1",
    "e2", ... may be added: a separator's estimates, in the order of the sources. `metadata`, called
    with the stored members (int16), returns extra JSON metadata for the sample.
    """

    id: str
    speakers: tuple[str, ...]
    sample_rate: int
    load: Callable[[], Mapping[str, np.ndarray]]
    texts: tuple[str, ...] = ()
    metadata: Callable[[Mapping[str, np.ndarray]], dict[str, Any]] | None = None
    may_be_silent: bool = False  # any member throughout, as long as a source is not


@dataclass
class Batch:
    """Input of an objective: items padded to equal length; `lengths` counts their true samples."""

    ids: list[str]
    positions: Tensor  # int64 [B], global positions of the items in the data order
    mixture: Tensor  # float32 [B, T]
    sources: Tensor | None  # float32 [B, S, T]; None without ground truth
    noise: Tensor | None  # float32 [B, T]; None if none was added
    lengths: Tensor  # int64 [B]
    speakers: list[tuple[str, ...]] = field(default_factory=list)
    data_set: str = MAIN  # all items come from the same data set
    estimates: Tensor | None = None  # float32 [B, S, T], a separator's, in the order of the sources
    num_silent: int = 0  # sources, or mixtures where these are unknown, that hold no sound

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its audio on `device`."""
        audio = {name: getattr(self, name) for name in AUDIO}
        moved: Any = {name: send(x, device) for name, x in audio.items() if x is not None}
        return replace(self, **moved)

    def without_audio(self) -> "Batch":
        """Return the rest of the batch, which takes little memory."""
        return replace(self, mixture=torch.empty(0), sources=None, noise=None, estimates=None)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to `device`; a GPU copies while the host goes on, which takes pinned memory."""
    pins = torch.device(device).type == "cuda" and not x.is_cuda
    return (x.pin_memory() if pins else x).to(device, non_blocking=True)


def on_device(steps: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Yield batches on `device`; a GPU copies them, beside its computation, before it needs them.

    As no step waits for the GPU, the batches of the next one come here while it still computes.
    """
    if device.type != "cuda":
        yield from ([batch.to(device) for batch in batches] for batches in steps)
        return
    beside, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batches in steps:
        with torch.cuda.stream(beside):
            moved = [batch.to(device) for batch in batches]
        computing.wait_stream(beside)
        for audio in (getattr(batch, name) for batch in moved for name in AUDIO):
            if audio is not None:
                audio.record_stream(computing)  # its memory is not used again before
        yield moved
