"""The training stream: for every step, one batch per virtual shard that this rank owns.

Feeds supply the items: `crops.Crops` of stored samples or `dynamic.DynamicMixing`. Threads decode
ahead. Everything random derives from the position, so world size and threads change no bits.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from types import MappingProxyType
from typing import Protocol

from sepdist.data.background import Background
from sepdist.data.crops import Damage
from sepdist.data.dataset import Item, collate
from sepdist.data.members import DataError
from sepdist.data.order import Blend, owned_virtual_shards, positions_of, units_per_epoch
from sepdist.data.records import Batch

logger = logging.getLogger(__name__)


class Feed(Protocol):
    """The items of one data set, addressed by the set's own positions."""

    num_samples: int  # positions per epoch
    crop_samples: int  # length of a batch; items may be shorter

    def item(self, position: int, damages: list[Damage]) -> Item:
        """Return an item, in any thread; append replaced damaged samples to `damages`."""

    def arrange(self, blend: Blend, number: int) -> None:
        """Order the samples in the lanes of data set `number` of `blend`."""

    def prefetch(self, positions: range, lanes: range) -> None:
        """Get the shards of the coming positions in `lanes` in the background."""

    def digest(self) -> str:
        """Identify the data."""

    def close(self) -> None:
        """End the background threads."""


class TrainStream:
    """The batches of one rank, step by step.

    `feeds` are the data sets by name, the main one first; a set with a weight w gives w batches per
    batch of the main one, any other set one pass per epoch. `interleave` and `order` are those of
    order.py. `seconds_waited` counts the waiting for data, `num_silent` the silent sources.
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
        order: int = 2,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch}: it must be positive")
        self.names, self.feeds = list(feeds), list(feeds.values())
        sizes = [feed.num_samples for feed in self.feeds]
        num_lanes = 1 if order == 1 else num_virtual_shards
        shares = [weights.get(name) for name in self.names]
        units = units_per_epoch(sizes, shares, micro_batch, num_lanes)
        self.blend = Blend(seed, units, micro_batch, interleave, num_lanes)
        for number, feed in enumerate(self.feeds):
            feed.arrange(self.blend, number)
        self.num_virtual_shards = num_virtual_shards
        self.micro_batch = micro_batch
        self.owned = owned_virtual_shards(num_virtual_shards, rank, world_size)
        self._lanes = range(1) if order == 1 else self.owned
        self.prefetch_steps = max(0, prefetch_steps)
        self.max_damaged = max_damaged
        self.seconds_waited = 0.0
        self.num_silent = 0
        self._damaged: set[tuple[str, str]] = set()
        self._decoders = Background(max(1, num_threads), "decode")

    @property
    def num_damaged(self) -> int:
        """Distinct damaged samples that this rank has replaced."""
        return len(self._damaged)

    def main_epoch(self, position: int) -> int:
        """The epoch of the main data set's first sample at or after the global `position`."""
        return self.blend.passed(position, 0) // self.feeds[0].num_samples

    def digest(self) -> str:
        """Identify the data; several sets with their units per epoch and how they interleave."""
        if len(self.feeds) == 1:
            return self.feeds[0].digest()
        sets = zip(self.blend.units, self.names, self.feeds, strict=True)
        text = " + ".join(f"{units} {name} {feed.digest()}" for units, name, feed in sets)
        return text if self.blend.interleave == "drawn" else f"{text}, {self.blend.interleave}"

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """Yield, from `first_step` on without end, one batch per owned virtual shard.

        An error of a decoding thread is raised here, at the step that needed the sample.
        """
        ahead: deque[list[Future[tuple[Batch, list[Damage]]]]] = deque()
        step = first_step
        try:
            while True:
                submitted, end = step + len(ahead), step + self.prefetch_steps + 1
                self._prefetch(step, end)
                for later in range(submitted, end):
                    jobs = [self._decoders.submit(self._batch, later, own) for own in self.owned]
                    ahead.append(jobs)
                began = time.monotonic()
                decoded = [future.result() for future in ahead.popleft()]
                self.seconds_waited += time.monotonic() - began
                for batch, damages in decoded:
                    self._count(damages)
                    self.num_silent += batch.num_silent
                yield [batch for batch, _ in decoded]
                step += 1
        finally:
            for future in (future for futures in ahead for future in futures):
                future.cancel()

    def close(self) -> None:
        """End the background threads."""
        for feed in self.feeds:
            feed.close()
        self._decoders.close()

    def _prefetch(self, step: int, end: int) -> None:
        """Announce the positions of the steps [step, end) to the feeds."""
        global_batch = self.num_virtual_shards * self.micro_batch
        for number, feed in enumerate(self.feeds):
            first, stop = (self.blend.passed(at * global_batch, number) for at in (step, end))
            feed.prefetch(range(first, stop), self._lanes)

    def _batch(self, step: int, virtual_shard: int) -> tuple[Batch, list[Damage]]:
        damages: list[Damage] = []
        positions = positions_of(step, virtual_shard, self.num_virtual_shards, self.micro_batch)
        number, first = self.blend.locate(positions.start)
        feed = self.feeds[number]
        items = [feed.item(own, damages) for own in range(first, first + self.micro_batch)]
        return collate(items, positions, feed.crop_samples, self.names[number]), damages

    def _count(self, damages: list[Damage]) -> None:
        # In the consumer, so that a run ends at the same step however far its threads are ahead.
        for damage in damages:
            if (damage.url, damage.key) in self._damaged:
                continue
            self._damaged.add((damage.url, damage.key))
            what = f"{damage.url}: {damage.error} (position {damage.position}"
            if self.num_damaged > self.max_damaged:
                allowed = f"data.max_damaged={self.max_damaged} are allowed"
                counts = f"{self.num_damaged} damaged samples, {allowed}"
                raise DataError(f"{what}; {counts})") from damage.error
            logger.warning("%s); replaced by the next sample", what)
