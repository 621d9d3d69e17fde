"""What the self-supervised objectives draw for one item: a generator of its position in, indices of spans out.

All of it is made from the raw stream of the bit generator, the only one that NumPy keeps the same for ever, so that a
run that goes on under another NumPy masks what it would have masked.
"""

import numpy as np
import torch
from torch import Tensor

from sepdist.data.records import Batch
from sepdist.seeding import rng


def generators(batch: Batch, seed: int, purpose: str) -> list[np.random.Generator]:
    """One generator for each item, which depends on nothing but its position."""
    return [rng(seed, purpose, position) for position in batch.positions.tolist()]


def uniform(generator: np.random.Generator) -> float:
    """A number in [0, 1)."""
    return (int(generator.bit_generator.random_raw()) >> 11) * 2.0**-53


def span_starts(
    generator: np.random.Generator, length: int, span: int, share: float, least: int = 1
) -> np.ndarray:
    """Where round(length * share / span) spans begin, or `least`: int64, different starts, overlap allowed."""
    count = max(least, round(length * share / span))
    room = max(0, length - span + 1)
    if count > room:
        raise ValueError(
            f"an item of length {length} has room for {room} spans of {span}, {count} are to be masked"
        )
    starts: dict[int, None] = {}
    while len(starts) < count:
        starts.setdefault(int(generator.bit_generator.random_raw()) % room)
    return np.array(list(starts))


def noisy(
    batch: Batch, draws: list[np.random.Generator], probability: float, gain: float
) -> tuple[Tensor, Tensor]:
    """The input and the clean first source, [B, T] each: with `probability`, `gain` times its noise is in the input."""
    if batch.sources is None:
        raise ValueError("this objective needs a clean source; this data set has mixtures only")
    clean_BT = batch.sources[:, 0]
    if not probability:
        return clean_BT, clean_BT
    if batch.noise is None:
        raise ValueError(
            f"noise_probability={probability} needs noise: set data.noise=true, or the probability to 0"
        )
    gains_B = torch.tensor([gain if uniform(draw) < probability else 0.0 for draw in draws])
    return clean_BT + gains_B.to(clean_BT.device)[:, None] * batch.noise, clean_BT
