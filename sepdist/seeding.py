"""Derive every random generator of the system from (seed, purpose, position).

Nothing derives from a rank, a worker, a process id or the time. So a crop, a mixture or a dropout
mask is the same on 1 and on 512 workers, and the same again after a restart.
"""

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *position: int | str) -> int:
    """Hash all arguments to a 128-bit integer, the same on every machine."""
    text = "\x1f".join([str(int(seed)), purpose, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def rng(seed: int, purpose: str, *position: int | str) -> np.random.Generator:
    """NumPy generator (Philox, counter based) for one purpose at one position."""
    return np.random.Generator(np.random.Philox(key=derive(seed, purpose, *position)))


def torch_seed(seed: int, purpose: str, *position: int | str) -> int:
    """63-bit seed for `torch.manual_seed`: dropout and weight initialisation."""
    return derive(seed, purpose, *position) & (2**63 - 1)
