"""The order of training data: a pure function from a global position to (data set, shard, sample).

Positions count samples from the start of training and continue across epochs. Each epoch is one
permutation of a data set: its shards are permuted, then samples within blocks of a few neighbouring
shards, so a worker needs only those shards at hand. Step s takes the positions
[s * V * B, (s + 1) * V * B) for V virtual shards of B samples (the micro-batch), and each rank owns
a contiguous block of virtual shards. So no sample is lost or repeated at any world size, and a
restart at any step needs no other state and takes no longer.

With several data sets, `Blend` maps a global position to a data set and a position in its `Order`.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sepdist.seeding import rng

INTERLEAVES = ("drawn", "even")  # how a `Blend` arranges the units of its data sets


class Order:
    """Map positions to samples of a data set whose shards hold `shard_sizes` samples."""

    def __init__(self, seed: int, shard_sizes: tuple[int, ...], block_shards: int = 8) -> None:
        if not shard_sizes or min(shard_sizes) < 1 or block_shards < 1:
            sizes = f"sizes {shard_sizes} in blocks of {block_shards}"
            raise ValueError(f"no order over shards of {sizes}: both must be positive")
        self.seed = seed
        self.shard_sizes = shard_sizes
        self.block_shards = block_shards
        self.num_samples = sum(shard_sizes)
        self._sizes = np.array(shard_sizes)
        self._epoch_plan = lru_cache(maxsize=4)(self._plan_epoch)
        self._block_plan = lru_cache(maxsize=8)(self._plan_block)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard number, sample number within the shard) of `position`."""
        epoch, block, offset = self._find(position)
        shards, numbers = self._block_plan(epoch, block)
        return int(shards[offset]), int(numbers[offset])

    def upcoming(self, positions: range) -> list[int]:
        """Shards to have at hand, in order of first use: up to one block beyond `positions`."""
        needed: dict[int, None] = {}
        position = positions.start
        while len(needed) < len(self.shard_sizes):
            epoch, block, offset = self._find(position)
            shards, _ = self._block_plan(epoch, block)
            needed.update(dict.fromkeys(shards[offset:].tolist()))
            if position >= positions.stop:
                break
            position += len(shards) - offset
        return list(needed)

    def _find(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, block within it, offset within the block) of `position`."""
        if position < 0:
            raise ValueError(f"position {position}: positions count from 0")
        epoch, offset = divmod(position, self.num_samples)
        _, ends = self._epoch_plan(epoch)
        block = int(np.searchsorted(ends, offset, side="right"))
        return epoch, block, offset - (int(ends[block - 1]) if block else 0)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in order, and the number of samples up to the end of each block."""
        shards = _permutation(len(self.shard_sizes), self.seed, "shard order", epoch)
        firsts = np.arange(0, len(shards), self.block_shards)
        return shards, np.cumsum(np.add.reduceat(self._sizes[shards], firsts))

    def _plan_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and sample number for every offset within a block."""
        order, _ = self._epoch_plan(epoch)
        shards = order[block * self.block_shards : (block + 1) * self.block_shards]
        ends = np.cumsum(self._sizes[shards])
        places = _permutation(int(ends[-1]), self.seed, "sample order", epoch, block)
        which = np.searchsorted(ends, places, side="right")
        return shards[which], places - (ends - self._sizes[shards])[which]


class Blend:
    """Map global positions to one of several data sets and a position within it.

    A unit is `micro_batch` consecutive positions, which all take their samples from one data set.
    An epoch has `units[i]` units of data set i. With `interleave="drawn"` they are permuted anew in
    every epoch. "even" spaces each set evenly: of two sets, every window of V consecutive units,
    also across epochs, holds floor or ceil of each set's share of V.
    Each set is read at its own positions 0, 1, 2, ..., so none of its samples is lost or repeated.
    """

    def __init__(
        self, seed: int, units: tuple[int, ...], micro_batch: int, interleave: str = "drawn"
    ) -> None:
        if not units or min(units) < 1 or micro_batch < 1 or interleave not in INTERLEAVES:
            wanted = f"{units} units per epoch, of {micro_batch} samples each, {interleave!r}"
            raise ValueError(f"no blend of {wanted}: all positive, one of {INTERLEAVES}")
        self.interleave = interleave
        self.seed = seed
        self.units = units
        self.micro_batch = micro_batch
        self._plan = lru_cache(maxsize=4)(self._plan_epoch)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (number of the data set, position within it) of the global `position`."""
        if len(self.units) == 1:
            return 0, position
        epoch, index = divmod(position // self.micro_batch, sum(self.units))
        number = int(self._plan(epoch)[0][index])
        return number, self.passed(position, number)

    def passed(self, position: int, number: int) -> int:
        """Count the samples of data set `number` before the global `position`."""
        if len(self.units) == 1:
            return position
        unit, offset = divmod(position, self.micro_batch)
        epoch, index = divmod(unit, sum(self.units))
        sets, before = self._plan(epoch)
        whole_units = epoch * self.units[number] + int(before[number, index])
        return whole_units * self.micro_batch + (offset if sets[index] == number else 0)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the data set of every unit, and [set, unit] the units of a set before it."""
        sets = np.repeat(np.arange(len(self.units)), self.units)
        if self.interleave == "even":
            # Each set alone would have its units at equal distances; sort by these times. Equal
            # times, equal as floats too because IEEE division rounds exactly, go to the first set.
            times = np.concatenate([(np.arange(number) + 0.5) / number for number in self.units])
            sets = sets[np.argsort(times, kind="stable")]
        else:
            sets = sets[_permutation(len(sets), self.seed, "data set order", epoch)]
        own = sets == np.arange(len(self.units))[:, None]
        return sets, np.cumsum(own, axis=1) - own


def units_per_epoch(
    num_samples: Sequence[int], weights: Sequence[float | None], micro_batch: int
) -> tuple[int, ...]:
    """Units of each set in an epoch: its weight times those of the first set; None is one pass."""
    first = max(1, round(num_samples[0] / micro_batch))
    return tuple(
        max(1, round(size / micro_batch if weight is None else weight * first))
        for size, weight in zip(num_samples, weights, strict=True)
    )


def _permutation(size: int, seed: int, purpose: str, *position: int) -> np.ndarray:
    # NumPy guarantees only the raw stream of a bit generator across versions, not Generator's
    # methods, and a run that continues under another NumPy needs the same order.
    keys = rng(seed, purpose, *position).bit_generator.random_raw(size)
    return np.argsort(keys, kind="stable")


def owned_virtual_shards(num_virtual_shards: int, rank: int, world_size: int) -> range:
    """The contiguous block of virtual shards of one rank; the first ranks take the remainder."""
    if not 0 <= rank < world_size <= num_virtual_shards:
        shards = f"{num_virtual_shards} virtual shards"
        raise ValueError(f"rank {rank} of {world_size} with {shards}: use 1 to that many ranks")
    each, rest = divmod(num_virtual_shards, world_size)
    first = rank * each + min(rank, rest)
    return range(first, first + each + (rank < rest))


def positions_of(step: int, virtual_shard: int, num_virtual_shards: int, micro_batch: int) -> range:
    """The positions of one virtual shard in one step."""
    first = (step * num_virtual_shards + virtual_shard) * micro_batch
    return range(first, first + micro_batch)
