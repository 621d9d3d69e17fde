"""From finished data sets to batches: positions in, decoded crops in the canonical order out.

`Dataset` reads single full-length items (validation, test); `TrainStream` yields, for every step, one Batch for each
virtual shard this rank owns, decoded ahead by threads. What it trains on are feeds: `Crops` of the samples as they are
stored, or mixtures made on the way (`dynamic.DynamicMixing`). Everything random derives from the position.

Shapes: B batch, S sources, T samples.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from sepdist.data.background import Background
from sepdist.data.dataset import Dataset, Item, collate
from sepdist.data.members import DataError
from sepdist.data.order import Blend, Order, owned_virtual_shards, positions_of, units_per_epoch
from sepdist.data.records import Batch
from sepdist.seeding import rng

logger = logging.getLogger(__name__)
MAX_REPLACEMENTS = 100  # positions tried in a row for one damaged sample


@dataclass(frozen=True)
class Damage:
    """A damaged sample that a feed met, and the position of its order that it should have filled."""

    url: str
    position: int
    key: str
    error: DataError


class Feed(Protocol):
    """What a TrainStream takes from one data set; positions are the data set's own."""

    @property
    def url(self) -> str:
        """The data set, for messages."""

    @property
    def num_samples(self) -> int:
        """The positions of an epoch."""

    @property
    def crop_samples(self) -> int:
        """The length of a batch; items may be shorter."""

    def item(self, position: int, damages: list[Damage]) -> Item:
        """The item at `position`, in any thread; damaged samples that others replace are added to `damages`."""

    def prefetch(self, positions: range) -> None:
        """Get the shards of the coming positions in the background."""

    def digest(self) -> str:
        """What identifies the data."""

    def close(self) -> None:
        """End the threads."""


def crop_length(crop_seconds: float, sample_rate: int) -> int:
    """Samples in a crop."""
    if round(crop_seconds * sample_rate) < 1:
        raise ValueError(f"crop_seconds={crop_seconds} at {sample_rate} Hz: it must be positive")
    return round(crop_seconds * sample_rate)


def beyond_replacing(damages: Sequence[Damage]) -> DataError:
    """The error of a position for which no sound sample was found."""
    last = damages[-1]
    return DataError(
        f"{last.url}: {last.error} (position {last.position}; {len(damages)} damaged samples in a row)"
    )


class Crops:
    """The samples of one data set as they are stored, each cut to `crop_seconds` at a place drawn for its position."""

    def __init__(self, dataset: Dataset, *, seed: int, crop_seconds: float) -> None:
        self.dataset = dataset
        self.url = dataset.url
        self.order = Order(seed, tuple(shard.num_samples for shard in dataset.manifest.shards))
        self.num_samples = self.order.num_samples
        self.seed = seed
        self.crop_samples = crop_length(crop_seconds, dataset.manifest.sample_rate)

    def item(self, position: int, damages: list[Damage]) -> Item:
        """The crop at `position`; where its sample is damaged, one of the next position's sample that is not."""
        met: list[Damage] = []
        for candidate in range(position, position + 1 + MAX_REPLACEMENTS):
            shard_number, number = self.order.locate(candidate)
            shard = self.dataset.cache.open(shard_number)
            sample = shard.samples[number]
            start, stop = self._crop(position, sample.num_samples)
            try:
                item = Item(
                    sample.key, sample.speakers, self.dataset.read(shard, number, start, stop)
                )
            except DataError as error:
                met.append(Damage(self.url, candidate, sample.key, error))
                continue
            damages += met
            return item
        raise beyond_replacing(met) from met[-1].error

    def _crop(self, position: int, num_samples: int) -> tuple[int, int]:
        """Where the crop at `position` begins and ends in a sample of `num_samples`."""
        spare = num_samples - self.crop_samples
        if spare <= 0:
            return 0, num_samples
        # The raw stream of the bit generator, because that one never changes between versions of NumPy.
        start = int(rng(self.seed, "crop", position).bit_generator.random_raw()) % (spare + 1)
        return start, start + self.crop_samples

    def prefetch(self, positions: range) -> None:
        """Get the shards of `positions` and of the block after them in the background."""
        self.dataset.cache.prefetch(self.order.upcoming(positions))

    def digest(self) -> str:
        """The sha256 of the data set."""
        return self.dataset.manifest.digest()

    def close(self) -> None:
        """End the threads."""
        self.dataset.cache.close()


class TrainStream:
    """What one rank trains on, step by step. `seconds_waited` counts the time the consumer had to wait for data.

    `feeds` are the data sets by name, the main one first. Of those with a weight an epoch holds so many batches per
    batch of the main one, of the others one pass. `interleave` as in `Blend`.
    """

    def __init__(
        self,
        feeds: Mapping[str, Feed],
        *,
        seed: int,
        num_virtual_shards: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_threads: int = 1,
        prefetch_steps: int = 4,
        max_damaged: int = 0,
        weights: Mapping[str, float] = MappingProxyType({}),
        interleave: str = "drawn",
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch}: it must be positive")
        self.names, self.feeds = list(feeds), list(feeds.values())
        sizes = [feed.num_samples for feed in self.feeds]
        units = units_per_epoch(sizes, [weights.get(name) for name in self.names], micro_batch)
        self.blend = Blend(seed, units, micro_batch, interleave)
        self.num_virtual_shards = num_virtual_shards
        self.micro_batch = micro_batch
        self.owned = owned_virtual_shards(num_virtual_shards, rank, world_size)
        self.prefetch_steps = max(0, prefetch_steps)
        self.max_damaged = max_damaged
        self.seconds_waited = 0.0
        self._damaged: set[tuple[str, str]] = set()
        self._decoders = Background(max(1, num_threads), "decode")

    @property
    def num_damaged(self) -> int:
        """Different damaged samples that this rank has replaced."""
        return len(self._damaged)

    def main_epoch(self, position: int) -> int:
        """The epoch, from 0, of the main data set's first sample at or after the global `position`."""
        return self.blend.passed(position, 0) // self.feeds[0].num_samples

    def digest(self) -> str:
        """What identifies the data: all sets, and of several the units of each in an epoch and how they interleave."""
        if len(self.feeds) == 1:
            return self.feeds[0].digest()
        parts = zip(self.names, self.blend.units, self.feeds, strict=True)
        sets = " + ".join(f"{units} {name} {feed.digest()}" for name, units, feed in parts)
        return sets if self.blend.interleave == "drawn" else f"{sets}, {self.blend.interleave}"

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """For every step from `first_step` on, for ever, one Batch per owned virtual shard; any start costs the same.

        An error of a decoding thread is raised here, at the step that needed the sample.
        """
        ahead: deque[list[Future[tuple[Batch, list[Damage]]]]] = deque()
        step = first_step
        try:
            while True:
                submitted, end = step + len(ahead), step + self.prefetch_steps + 1
                self._prefetch(step, end)
                for later in range(submitted, end):
                    ahead.append(
                        [self._decoders.submit(self._batch, later, shard) for shard in self.owned]
                    )
                began = time.monotonic()
                decoded = [future.result() for future in ahead.popleft()]
                self.seconds_waited += time.monotonic() - began
                for _, damages in decoded:
                    self._count(damages)
                yield [batch for batch, _ in decoded]
                step += 1
        finally:
            for future in (future for futures in ahead for future in futures):
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        for feed in self.feeds:
            feed.close()
        self._decoders.close()

    def _prefetch(self, step: int, end: int) -> None:
        """Announce the positions of the steps [step, end) to the feeds."""
        global_batch = self.num_virtual_shards * self.micro_batch
        for number, feed in enumerate(self.feeds):
            first, stop = (self.blend.passed(at * global_batch, number) for at in (step, end))
            feed.prefetch(range(first, stop))

    def _batch(self, step: int, virtual_shard: int) -> tuple[Batch, list[Damage]]:
        damages: list[Damage] = []
        positions = positions_of(step, virtual_shard, self.num_virtual_shards, self.micro_batch)
        number, first = self.blend.locate(positions.start)
        feed = self.feeds[number]
        items = [feed.item(own, damages) for own in range(first, first + self.micro_batch)]
        return collate(items, positions, feed.crop_samples, self.names[number]), damages

    def _count(self, damages: list[Damage]) -> None:
        # In the consumer and not in the threads, so that the run ends at the same step however far they are ahead.
        for damage in damages:
            if (damage.url, damage.key) in self._damaged:
                continue
            self._damaged.add((damage.url, damage.key))
            what = f"{damage.url}: {damage.error} (position {damage.position}"
            if len(self._damaged) > self.max_damaged:
                allowed = f"data.max_damaged={self.max_damaged} are allowed"
                raise DataError(
                    f"{what}; {len(self._damaged)} damaged samples, {allowed})"
                ) from damage.error
            logger.warning("%s); replaced by the next position", what)
