"""The data order: a global position in, (data set, shard, sample) out; a pure function of the seed, no state to save.

Positions count samples from the start of training and run on across epochs. Each epoch is one permutation of the data
set: the shards are permuted, then samples are permuted within blocks of a few neighbouring shards, so that a worker
needs only those shards at hand. Step s consumes the positions [s * V * B, (s + 1) * V * B) for V virtual shards of B
samples (micro-batch), and a rank owns a contiguous block of virtual shards. So at any world size no sample is lost or
repeated, and a restart at any step costs nothing.

Where several data sets are trained on together, `Blend` says which of them a position takes its sample from, and which
position of that set's own `Order` it is.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sepdist.seeding import rng

INTERLEAVES = ("drawn", "even")  # how a `Blend` puts the units of several data sets in a row


class Order:
    """Where each position of training lies in a data set whose shards hold `shard_sizes` samples."""

    def __init__(self, seed: int, shard_sizes: tuple[int, ...], block_shards: int = 8) -> None:
        if not shard_sizes or min(shard_sizes) < 1 or block_shards < 1:
            raise ValueError(
                f"no order over shards of sizes {shard_sizes} in blocks of {block_shards}"
            )
        self.seed = seed
        self.shard_sizes = shard_sizes
        self.block_shards = block_shards
        self.num_samples = sum(shard_sizes)
        self._sizes = np.array(shard_sizes)
        self._epoch_plan = lru_cache(maxsize=4)(self._plan_epoch)
        self._block_plan = lru_cache(maxsize=8)(self._plan_block)

    def epoch(self, position: int) -> int:
        """The epoch, from 0, that `position` falls in."""
        return position // self.num_samples

    def locate(self, position: int) -> tuple[int, int]:
        """(shard number, sample number within the shard) of `position`."""
        epoch, block, offset = self._find(position)
        shards, numbers = self._block_plan(epoch, block)
        return int(shards[offset]), int(numbers[offset])

    def upcoming(self, positions: range) -> list[int]:
        """The shards of `positions`, of the rest of their last block and of one block more, in order of first need."""
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
        """(epoch, block within it, offset within the block) of `position`."""
        if position < 0:
            raise ValueError(f"position {position}: positions count from 0")
        epoch, offset = divmod(position, self.num_samples)
        _, ends = self._epoch_plan(epoch)
        block = int(np.searchsorted(ends, offset, side="right"))
        return epoch, block, offset - (int(ends[block - 1]) if block else 0)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards, and for each block the number of samples up to its end."""
        shards = _permutation(len(self.shard_sizes), self.seed, "shard order", epoch)
        firsts = np.arange(0, len(shards), self.block_shards)
        return shards, np.cumsum(np.add.reduceat(self._sizes[shards], firsts))

    def _plan_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For every offset within a block, the shard and the sample number within it."""
        order, _ = self._epoch_plan(epoch)
        shards = order[block * self.block_shards : (block + 1) * self.block_shards]
        ends = np.cumsum(self._sizes[shards])
        places = _permutation(int(ends[-1]), self.seed, "sample order", epoch, block)
        which = np.searchsorted(ends, places, side="right")
        return shards[which], places - (ends - self._sizes[shards])[which]


class Blend:
    """Which data set each position of training takes its sample from: all `micro_batch` of a unit from the same one.

    An epoch holds `units[i]` units of data set i, `interleave`d as drawn (permuted) or even: of two sets, any V units
    in a row, across epochs too, hold their shares of V, rounded down or up. Each set goes through its own positions 0,
    1, 2, ... for ever, so that it neither loses nor repeats a sample, however the epochs of blend and set meet.
    """

    def __init__(
        self, seed: int, units: tuple[int, ...], micro_batch: int, interleave: str = "drawn"
    ) -> None:
        if not units or min(units) < 1 or micro_batch < 1 or interleave not in INTERLEAVES:
            raise ValueError(
                f"no blend of {units} units per epoch, of {micro_batch} samples each, {interleave!r}"
            )
        self.interleave = interleave
        self.seed = seed
        self.units = units
        self.micro_batch = micro_batch
        self._plan = lru_cache(maxsize=4)(self._plan_epoch)

    def locate(self, position: int) -> tuple[int, int]:
        """(number of the data set, position within it) of the global `position`."""
        if len(self.units) == 1:
            return 0, position
        epoch, index = divmod(position // self.micro_batch, sum(self.units))
        number = int(self._plan(epoch)[0][index])
        return number, self.passed(position, number)

    def passed(self, position: int, number: int) -> int:
        """How many samples of data set `number` come before the global `position`."""
        if len(self.units) == 1:
            return position
        unit, offset = divmod(position, self.micro_batch)
        epoch, index = divmod(unit, sum(self.units))
        labels, before = self._plan(epoch)
        whole_units = epoch * self.units[number] + int(before[number, index])
        return whole_units * self.micro_batch + (offset if labels[index] == number else 0)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For every unit of an epoch its data set, and [set, unit] how many units of that set come before it."""
        labels = np.repeat(np.arange(len(self.units)), self.units)
        if self.interleave == "even":
            # In the order of the times at which each set, alone, would give its units at equal distances; of equal
            # times (equal as floats too, as IEEE division rounds the exact quotient) the first set's comes first.
            times = np.concatenate([(np.arange(number) + 0.5) / number for number in self.units])
            labels = labels[np.argsort(times, kind="stable")]
        else:
            labels = labels[_permutation(len(labels), self.seed, "data set order", epoch)]
        own = labels == np.arange(len(self.units))[:, None]
        return labels, np.cumsum(own, axis=1) - own


def units_per_epoch(
    num_samples: Sequence[int], weights: Sequence[float | None], micro_batch: int
) -> tuple[int, ...]:
    """The units of each data set in an epoch: one pass of it, or its weight times those of the first set's pass."""
    first = max(1, round(num_samples[0] / micro_batch))
    return tuple(
        max(1, round(size / micro_batch if weight is None else weight * first))
        for size, weight in zip(num_samples, weights, strict=True)
    )


def _permutation(size: int, seed: int, purpose: str, *position: int) -> np.ndarray:
    # NumPy keeps only the raw stream of a bit generator the same for ever, not what Generator makes of it; a run that
    # goes on under another NumPy must find its order again.
    keys = rng(seed, purpose, *position).bit_generator.random_raw(size)
    return np.argsort(keys, kind="stable")


def owned_virtual_shards(num_virtual_shards: int, rank: int, world_size: int) -> range:
    """The contiguous block of virtual shards of one rank; the first ranks own one more where it does not divide."""
    if not 0 <= rank < world_size <= num_virtual_shards:
        raise ValueError(
            f"rank {rank} of {world_size} with {num_virtual_shards} virtual shards: 1 to that many ranks"
        )
    each, rest = divmod(num_virtual_shards, world_size)
    first = rank * each + min(rank, rest)
    return range(first, first + each + (rank < rest))


def positions_of(step: int, virtual_shard: int, num_virtual_shards: int, micro_batch: int) -> range:
    """The positions that one virtual shard takes in one step."""
    first = (step * num_virtual_shards + virtual_shard) * micro_batch
    return range(first, first + micro_batch)
