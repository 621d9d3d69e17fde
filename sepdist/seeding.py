"""Every random choice of the system derives from here: (seed, purpose, position) in, a generator out.

Nothing is ever derived from a rank, a worker, a process id or the time, so a crop, a mixture or a dropout mask is the
same on 1 or 512 workers, and the same again after a restart.
"""

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *position: int | str) -> int:
    """A 128-bit integer that depends on every argument; equal arguments give equal integers on every machine."""
    text = "\x1f".join([str(int(seed)), purpose, *(str(part) for part in position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def rng(seed: int, purpose: str, *position: int | str) -> np.random.Generator:
    """A NumPy generator (Philox, counter based) for one purpose at one position."""
    return np.random.Generator(np.random.Philox(key=derive(seed, purpose, *position)))


def torch_seed(seed: int, purpose: str, *position: int | str) -> int:
    """A seed for `torch.manual_seed` (63 bits), for dropout and weight initialisation."""
    return derive(seed, purpose, *position) & (2**63 - 1)
