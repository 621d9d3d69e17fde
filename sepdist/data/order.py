"""The order of training data: a pure function from a global position to (data set, shard, sample).

Positions count samples from the start of training and continue across epochs. Step s takes the
positions [s * V * B, (s + 1) * V * B): B (the micro-batch) for each of V virtual shards, and each
rank owns a contiguous block of virtual shards. Each epoch is one permutation of a data set: its
shards are permuted and cut into lanes, then the samples of a lane are permuted within blocks of a
few neighbouring shards. So no sample is lost or repeated at any world size, and a restart at any
step needs no other state and takes no longer. The versions of the order differ in the lanes:

- 1: one lane for all virtual shards; every rank needs the shards of the global batch
- 2: a lane for each virtual shard, all equally long; a rank needs the shards of its own lanes, of
  which it shares at most the first and the last with its neighbours

With several data sets, `Blend` maps a global position to a data set and a position in its `Order`.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sepdist.seeding import rng

INTERLEAVES = ("drawn", "even")  # how a `Blend` arranges the units of its data sets


class Blend:
    """Map global positions to one of several data sets and a position within it.

    A unit is `micro_batch` consecutive positions, which all take their samples from one data set.
    Units are dealt to the lanes in turn. An epoch has `units[i]` units of data set i, and each lane
    the same number of them in every epoch. With `interleave="drawn"` the units of a lane are
    permuted anew in every epoch. "even" spaces each set evenly: of two sets, every window of V
    consecutive units, also across epochs, holds floor or ceil of each set's share of V.
    Each set is read at its own positions 0, 1, 2, ..., so none of its samples is lost or repeated.
    """

    def __init__(
        self,
        seed: int,
        units: tuple[int, ...],
        micro_batch: int,
        interleave: str = "drawn",
        num_lanes: int = 1,
    ) -> None:
        if len(units) == 1:
            units = (num_lanes,)  # any number gives the same
        positive = bool(units) and min(*units, micro_batch, num_lanes) > 0
        if not positive or interleave not in INTERLEAVES or sum(units) % num_lanes:
            wanted = f"{units} units per epoch in {num_lanes} lanes, of {micro_batch} samples each"
            raise ValueError(f"no blend of {wanted}, {interleave!r}: all positive, {INTERLEAVES}")
        self.interleave = interleave
        self.seed = seed
        self.units = units
        self.micro_batch = micro_batch
        self.num_lanes = num_lanes
        self._drawn = interleave == "drawn" and len(units) > 1
        self._sets = self._deal()
        own = [np.count_nonzero(self._sets == one, axis=0) for one in range(len(units))]
        self.each = np.array(own)  # [set, lane] units in an epoch
        self._plan = lru_cache(maxsize=2)(self._plan_epoch)
        self._unit_lanes = lru_cache(maxsize=64)(self._find_lanes)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (number of the data set, position within it) of the global `position`."""
        epoch, index = divmod(position // self.micro_batch, sum(self.units))
        number = int(self._at(epoch)[0].flat[index])
        return number, self.passed(position, number)

    def passed(self, position: int, number: int) -> int:
        """Count the samples of data set `number` before the global `position`."""
        unit, offset = divmod(position, self.micro_batch)
        epoch, index = divmod(unit, sum(self.units))
        row, lane = divmod(index, self.num_lanes)
        sets, firsts, _ = self._at(epoch)
        own = sets[row] == number
        before = int(firsts[number, row] + np.count_nonzero(own[:lane]))
        whole_units = epoch * self.units[number] + before
        return whole_units * self.micro_batch + (offset if own[lane] else 0)

    def lanes(self, number: int, position: int) -> tuple[int, np.ndarray]:
        """Return the lane of a data set's own `position`, and how many of each lane precede it."""
        unit, offset = divmod(position, self.micro_batch)
        lane, counts = self._unit_lanes(number, unit)
        counts = counts.copy()
        counts[lane] += offset
        return lane, counts

    def _find_lanes(self, number: int, unit: int) -> tuple[int, np.ndarray]:
        """Return the lane of a data set's unit, and the samples of every lane before the unit."""
        epoch, index = divmod(unit, self.units[number])
        sets, firsts, before = self._at(epoch)
        row = int(np.searchsorted(firsts[number], index, side="right")) - 1
        lanes = np.flatnonzero(sets[row] == number)
        index -= int(firsts[number, row])
        counts = epoch * self.each[number] + before[number, row]
        counts[lanes[:index]] += 1
        return int(lanes[index]), counts * self.micro_batch

    def _at(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._plan(epoch if self._drawn else 0)

    def _deal(self) -> np.ndarray:
        """Return [row, lane] the data sets of an epoch's units, those of a drawn one in turn."""
        sets: np.ndarray = np.repeat(np.arange(len(self.units)), self.units)
        if self.interleave == "even":
            # Each set alone would have its units at equal distances; sort by these times. Equal
            # times, equal as floats too because IEEE division rounds exactly, go to the first set.
            times = np.concatenate([(np.arange(number) + 0.5) / number for number in self.units])
            sets = sets[np.argsort(times, kind="stable")]
        return sets.reshape(-1, self.num_lanes).astype(np.int16)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return [row, lane] the data set of each unit; of each set the units in earlier rows, of
        all lanes [set, row] and of one [set, row, lane]."""
        sets = self._sets
        if self._drawn:
            order = _permutation(sets.shape, self.seed, "data set order", epoch)
            sets = np.take_along_axis(sets, order, axis=0)
        own = sets == np.arange(len(self.units))[:, None, None]
        in_rows = own.sum(axis=2)
        before = np.cumsum(own, axis=1, dtype=np.int32) - own
        firsts = np.cumsum(in_rows, axis=1) - in_rows
        return sets, firsts, before


class Order:
    """Map the own positions of data set `number` of a blend to its shards and their samples."""

    def __init__(
        self,
        seed: int,
        shard_sizes: tuple[int, ...],
        block_shards: int = 0,
        blend: Blend | None = None,
        number: int = 0,
    ) -> None:
        self.blend, self.number = blend or Blend(0, (1,), 1), number
        self.block_shards = block_shards or (8 if self.blend.num_lanes == 1 else 4)
        if not shard_sizes or min(shard_sizes) < 1:
            raise ValueError(f"no order over shards of {shard_sizes} samples: all must be positive")
        self.seed = seed
        self.shard_sizes = shard_sizes
        self.num_samples = sum(shard_sizes)
        self._sizes = np.array(shard_sizes)
        self._epoch_plan = lru_cache(maxsize=4)(self._plan_epoch)
        self._block_plan = lru_cache(maxsize=8 * self.blend.num_lanes)(self._plan_block)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard number, sample number within the shard) of `position`."""
        epoch, _, offset = self._find(position)
        return self._sample(epoch, offset)

    def candidates(self, position: int) -> Iterator[tuple[int, int]]:
        """Yield the sample of `position`, then the next ones of its lane, last the whole epoch."""
        epoch, lane, offset = self._find(position)
        for one in range(offset, self._epoch_plan(epoch).lanes[lane + 1]):
            yield self._sample(epoch, one)
        for one in range(*self._epoch_plan(epoch + 1).lanes[lane : lane + 2]):
            yield self._sample(epoch + 1, one)
        for one in range(self.num_samples):
            yield self._sample(epoch, one)

    def upcoming(self, positions: range, lanes: range = range(1)) -> list[int]:
        """Shards of `lanes` to have at hand, by first use: up to one block beyond `positions`."""
        firsts: dict[int, int] = {}  # shard -> samples of its lane before the first use
        starts, stops = self._places(positions.start), self._places(positions.stop)
        epoch = positions.start // self.num_samples
        for lane in (one for one in lanes if self.blend.each[self.number, one]):
            for shard, ahead in self._ahead(epoch, lane, starts[lane], stops[lane]):
                firsts[shard] = min(ahead, firsts.get(shard, ahead))
                if len(firsts) == len(self.shard_sizes):
                    break
        return sorted(firsts, key=firsts.__getitem__)

    def _ahead(self, epoch: int, lane: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the shards of a lane from its place `start`, and how many samples come before."""
        place = start
        while True:
            plan = self._epoch_plan(epoch)
            offset = int(place + plan.shifts[lane])
            if offset >= plan.lanes[lane + 1]:
                epoch += 1
                continue
            block, within = self._block(epoch, offset)
            shards = self._block_plan(epoch, block)[0][within:]
            for shard, use in zip(*np.unique(shards, return_index=True), strict=True):
                yield int(shard), place - start + int(use)
            if place >= stop:
                break
            place += len(shards)

    def _find(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, lane, offset within the epoch's shards in order) of `position`."""
        if position < 0:
            raise ValueError(f"position {position}: positions count from 0")
        epoch = position // self.num_samples
        lane, places = self.blend.lanes(self.number, position)
        return epoch, lane, int(places[lane] + self._epoch_plan(epoch).shifts[lane])

    def _places(self, position: int) -> np.ndarray:
        """Count the samples of every lane before `position`."""
        return self.blend.lanes(self.number, position)[1]

    def _sample(self, epoch: int, offset: int) -> tuple[int, int]:
        block, within = self._block(epoch, offset)
        shards, numbers = self._block_plan(epoch, block)
        return int(shards[within]), int(numbers[within])

    def _block(self, epoch: int, offset: int) -> tuple[int, int]:
        """Return (block, offset within it) of an offset within the epoch."""
        ends = self._epoch_plan(epoch).block_ends
        block = int(np.searchsorted(ends, offset, side="right"))
        return block, offset - (int(ends[block - 1]) if block else 0)

    def _plan_epoch(self, epoch: int) -> "_Epoch":
        shards = _permutation((len(self.shard_sizes),), self.seed, "shard order", epoch)
        ends = np.cumsum(self._sizes[shards])
        before = self._places(epoch * self.num_samples)
        after = self._places((epoch + 1) * self.num_samples)
        lanes = np.concatenate([[0], np.cumsum(after - before)])
        # Of each shard that ends in a lane, how many shards of the lane come before it.
        first_shards = np.searchsorted(ends, lanes, side="right")
        earlier = np.arange(len(shards)) - first_shards[np.searchsorted(lanes, ends) - 1]
        full = earlier % self.block_shards == self.block_shards - 1
        block_ends = np.union1d(ends[full], lanes[1:])
        return _Epoch(shards, ends, block_ends, lanes, lanes[:-1] - before)

    def _plan_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and sample number for every offset within a block."""
        shards, ends, block_ends, _, _ = self._epoch_plan(epoch)
        start, stop = int(block_ends[block - 1]) if block else 0, int(block_ends[block])
        places = start + _permutation((stop - start,), self.seed, "sample order", epoch, block)
        which = np.searchsorted(ends, places, side="right")
        return shards[which], places - (ends - self._sizes[shards])[which]


class _Epoch(NamedTuple):
    """An epoch of an order; its offsets count the samples of the shards in their order."""

    shards: np.ndarray
    ends: np.ndarray  # offset where each of the shards ends
    block_ends: np.ndarray  # the same for each block
    lanes: np.ndarray  # [lane] offset where it begins, and where the last one ends
    shifts: np.ndarray  # [lane] offset minus place within the lane, which counts all epochs


def units_per_epoch(
    sizes: Sequence[int], weights: Sequence[float | None], micro_batch: int, num_lanes: int = 1
) -> tuple[int, ...]:
    """Units of each set in an epoch: its weight times those of the first set; None is one pass.

    Several lanes have as many units each; the sets have the nearest whole numbers of their shares.
    """
    first = max(1, round(sizes[0] / micro_batch))
    rest = zip(sizes[1:], weights[1:], strict=True)
    wanted = [first, *(size / micro_batch if w is None else w * first for size, w in rest)]
    units = [max(1, round(one)) for one in wanted]
    if num_lanes > 1:
        total = num_lanes * max(round(sum(units) / num_lanes), -(-len(units) // num_lanes))
        shares = [one / sum(wanted) * total for one in wanted]
        units = [max(1, int(share)) for share in shares]
        by_need = sorted(range(len(units)), key=lambda i: units[i] - shares[i])
        for i in by_need[: max(0, total - sum(units))]:
            units[i] += 1
        while sum(units) > total:
            units[units.index(max(units))] -= 1
    return tuple(units)


def _permutation(shape: tuple[int, ...], seed: int, purpose: str, *position: int) -> np.ndarray:
    """Permutations of the first axis, one for each index of the others."""
    # NumPy guarantees only the raw stream of a bit generator across versions, not Generator's
    # methods, and a run that continues under another NumPy needs the same order.
    keys = rng(seed, purpose, *position).bit_generator.random_raw(shape)
    return np.argsort(keys, axis=0, kind="stable")


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
