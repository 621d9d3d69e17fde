"""From a finished data set to batches: positions in, decoded crops in the canonical order out.

`Dataset` reads single full-length items (validation, test); `TrainStream` yields, for every step, one Batch for each
virtual shard this rank owns, decoded ahead by threads. Everything random derives from the position.

Shapes: B batch, S sources, T samples.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from sepdist.data.background import Background
from sepdist.data.cache import OpenShard, ShardCache
from sepdist.data.members import DataError
from sepdist.data.order import Order, owned_virtual_shards, positions_of
from sepdist.data.records import Batch
from sepdist.data.shards import Sample, read_manifest, read_sample
from sepdist.seeding import rng

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 100  # positions tried in a row for one damaged sample


@dataclass(frozen=True)
class Item:
    """One row of a batch: a sample, and float32 [T] of each member that matters, all of the same T."""

    position: int
    sample: Sample
    members: dict[str, np.ndarray]


@dataclass(frozen=True)
class Damage:
    """A damaged sample that the stream met, and the position that it should have filled."""

    position: int
    key: str
    error: DataError


class Dataset:
    """One finished data set, of which `num_sources` sources and, if asked, the noise make the mixtures."""

    def __init__(
        self,
        url: str,
        *,
        num_sources: int = 2,
        noise: bool = False,
        cache_dir: str = "~/.cache/sepdist",
        cache_gigabytes: float = 50.0,
    ) -> None:
        self.url = url
        self.manifest = read_manifest(url)
        self.members = self._choose_members(num_sources, noise)
        self.num_sources = 0 if self.members == ("mix",) else num_sources
        self.cache = ShardCache(url, self.manifest, cache_dir, int(cache_gigabytes * 1e9))
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])

    def _choose_members(self, num_sources: int, noise: bool) -> tuple[str, ...]:
        there = self.manifest.members
        if there == ("mix",):
            return there
        if num_sources < 1:
            raise DataError(f"{self.url}: num_sources={num_sources}, but a mixture has at least one source")
        wanted = tuple(f"s{i + 1}" for i in range(num_sources)) + (("noise",) if noise else ())
        absent = [name for name in wanted if name not in there]
        if absent:
            raise DataError(
                f"{self.url}: has no {', '.join(absent)}, its samples have {', '.join(there)}; "
                "change num_sources or noise, or shard the corpus again with them"
            )
        return wanted

    def full(self, number: int, max_seconds: float) -> Batch:
        """Sample `number` of the data set, in the order of the manifest, as a batch of one, cut to `max_seconds`."""
        if not 0 <= number < self.manifest.num_samples:
            raise IndexError(f"{self.url}: no sample {number}, it has {self.manifest.num_samples}")
        which = int(np.searchsorted(self._ends, number, side="right"))
        self.cache.prefetch(range(which, min(which + 2, len(self._ends))))
        shard = self.cache.open(which)
        within = number - (int(self._ends[which - 1]) if which else 0)
        sample = shard.samples[within]
        stop = min(sample.num_samples, int(max_seconds * self.manifest.sample_rate))
        return self.collate([Item(number, sample, self.read(shard, within, 0, stop))], stop)

    def read(self, shard: OpenShard, number: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """The members that matter of sample `number` of a shard, samples `start` to `stop`, float32 [stop - start].

        DataError names shard, key and byte offset.
        """
        if number in shard.damaged:
            raise DataError(shard.damaged[number])
        return read_sample(shard.file, shard.samples[number], self.members, start, stop)

    def collate(self, items: Sequence[Item], length: int) -> Batch:
        """The items as one batch of `length`, shorter ones padded with zeros at the end."""
        waves = np.zeros((len(items), len(self.members), length), dtype=np.float32)
        for row, item in zip(waves, items, strict=True):
            for part, name in zip(row, self.members, strict=True):
                part[: len(item.members[name])] = item.members[name]
        mixture = waves[:, 0].copy()
        for column in range(1, len(self.members)):  # one by one: the same bits whatever the shape of the batch
            mixture += waves[:, column]
        parts = torch.from_numpy(waves)
        return Batch(
            ids=[item.sample.key for item in items],
            positions=torch.tensor([item.position for item in items]),
            mixture=torch.from_numpy(mixture),
            sources=parts[:, : self.num_sources] if self.num_sources else None,
            noise=parts[:, -1] if "noise" in self.members else None,
            lengths=torch.tensor([len(item.members[self.members[0]]) for item in items]),
            speakers=[item.sample.speakers for item in items],
        )


class TrainStream:
    """The crops of one rank, step by step. `seconds_waited` counts the time the consumer had to wait for data."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        crop_seconds: float,
        num_virtual_shards: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_threads: int = 1,
        prefetch_steps: int = 4,
        max_damaged: int = 0,
    ) -> None:
        self.dataset = dataset
        self.order = Order(seed, tuple(shard.num_samples for shard in dataset.manifest.shards))
        self.seed = seed
        self.crop_samples = round(crop_seconds * dataset.manifest.sample_rate)
        if self.crop_samples < 1 or micro_batch < 1:
            raise ValueError(f"crop_seconds={crop_seconds}, micro_batch={micro_batch}: both must be positive")
        self.num_virtual_shards = num_virtual_shards
        self.micro_batch = micro_batch
        self.owned = owned_virtual_shards(num_virtual_shards, rank, world_size)
        self.prefetch_steps = max(0, prefetch_steps)
        self.max_damaged = max_damaged
        self.seconds_waited = 0.0
        self._damaged: set[str] = set()
        self._decoders = Background(max(1, num_threads), "decode")

    @property
    def num_damaged(self) -> int:
        """Different damaged samples that this rank has replaced."""
        return len(self._damaged)

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """For every step from `first_step` on, for ever, one Batch per owned virtual shard; any start costs the same.

        An error of a decoding thread is raised here, at the step that needed the sample.
        """
        global_batch = self.num_virtual_shards * self.micro_batch
        ahead: deque[list[Future[tuple[Batch, list[Damage]]]]] = deque()
        step = first_step
        try:
            while True:
                submitted, end = step + len(ahead), step + self.prefetch_steps + 1
                self.dataset.cache.prefetch(self.order.upcoming(range(step * global_batch, end * global_batch)))
                for later in range(submitted, end):
                    ahead.append([self._decoders.submit(self._batch, later, shard) for shard in self.owned])
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
        self.dataset.cache.close()
        self._decoders.close()

    def _batch(self, step: int, virtual_shard: int) -> tuple[Batch, list[Damage]]:
        damages: list[Damage] = []
        positions = positions_of(step, virtual_shard, self.num_virtual_shards, self.micro_batch)
        items = [self._item(position, damages) for position in positions]
        return self.dataset.collate(items, self.crop_samples), damages

    def _item(self, position: int, damages: list[Damage]) -> Item:
        """The crop at `position`; where its sample is damaged, one of the next position's sample that is not."""
        for candidate in range(position, position + 1 + MAX_REPLACEMENTS):
            shard_number, number = self.order.locate(candidate)
            shard = self.dataset.cache.open(shard_number)
            sample = shard.samples[number]
            start, stop = self._crop(position, sample.num_samples)
            try:
                return Item(position, sample, self.dataset.read(shard, number, start, stop))
            except DataError as error:
                damages.append(Damage(candidate, sample.key, error))
                if self.max_damaged == 0:
                    break
        last = damages[-1]
        raise DataError(
            f"{self.dataset.url}: {last.error} (position {last.position}; {len(damages)} damaged samples in a row, "
            f"data.max_damaged={self.max_damaged} are allowed)"
        ) from last.error

    def _crop(self, position: int, num_samples: int) -> tuple[int, int]:
        """Where the crop at `position` begins and ends in a sample of `num_samples`."""
        spare = num_samples - self.crop_samples
        if spare <= 0:
            return 0, num_samples
        # The raw stream of the bit generator, because that one never changes between versions of NumPy.
        start = int(rng(self.seed, "crop", position).bit_generator.random_raw()) % (spare + 1)
        return start, start + self.crop_samples

    def _count(self, damages: list[Damage]) -> None:
        # In the consumer and not in the threads, so that the run ends at the same step however far they are ahead.
        for damage in damages:
            if damage.key in self._damaged:
                continue
            self._damaged.add(damage.key)
            what = f"{self.dataset.url}: {damage.error} (position {damage.position}"
            if len(self._damaged) > self.max_damaged:
                allowed = f"data.max_damaged={self.max_damaged} are allowed"
                raise DataError(f"{what}; {len(self._damaged)} damaged samples, {allowed})") from damage.error
            logger.warning("%s); replaced by the next position", what)
