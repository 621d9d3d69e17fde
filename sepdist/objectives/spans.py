"""Random spans and noise for the self-supervised objectives, one generator per item.

Everything is drawn from the raw bit stream, the only one that NumPy keeps the same in all versions,
so a resumed run masks what it would have masked under another NumPy too.
"""

import numpy as np
import torch
from torch import Tensor

from sepdist.data.records import Batch, send
from sepdist.objectives.contract import sources_of


def uniform(generator: np.random.Generator) -> float:
    """Draw a number in [0, 1)."""
    return (int(generator.bit_generator.random_raw()) >> 11) * 2.0**-53


def draw_spans(
    generator: np.random.Generator, length: int, span: int, share: float, least: int = 1
) -> np.ndarray:
    """Draw round(length * share / span) spans, at least `least`: their places, int64 [K, span].

    The starts differ; spans may overlap.
    """
    count = max(least, round(length * share / span))
    room = max(0, length - span + 1)
    if count > room:
        raise ValueError(
            f"an item of length {length} has room for {room} spans of {span}, not for {count}"
        )
    starts: dict[int, None] = {}
    while len(starts) < count:
        starts.setdefault(int(generator.bit_generator.random_raw()) % room)
    return np.array(list(starts))[:, None] + np.arange(span)


def noisy(
    batch: Batch, draws: list[np.random.Generator], probability: float, gain: float
) -> tuple[Tensor, Tensor]:
    """Return the input and the clean first source, [B, T] each.

    With `probability`, `gain` times the item's noise is added to its input.
    """
    clean_BT = sources_of(batch)[:, 0]
    if not probability:
        return clean_BT, clean_BT
    if batch.noise is None:
        raise ValueError(
            f"noise_probability={probability} needs noise: set data.noise=true, or it to 0"
        )
    gains_B = torch.tensor([gain if uniform(draw) < probability else 0.0 for draw in draws])
    return clean_BT + send(gains_B, clean_BT.device)[:, None] * batch.noise, clean_BT
