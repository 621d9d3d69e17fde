"""From a finished data set to batches: positions in, decoded crops in the canonical order out.

`Dataset` reads single full-length items (validation, test); `TrainStream` yields, for every step, one Batch for each
virtual shard this rank owns, decoded ahead by threads. Everything random derives from the position.

Shapes: B batch, S sources, T samples.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from sepdist.data.cache import ShardCache
from sepdist.data.members import DataError
from sepdist.data.order import Order, owned_virtual_shards, positions_of
from sepdist.data.records import Batch
from sepdist.data.shards import Sample, read_index, read_manifest, read_sample
from sepdist.seeding import rng

MAX_REPLACEMENTS = 100  # positions tried in a row for one damaged sample


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
        self.index = lru_cache(maxsize=None)(self._index)
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])

    def _choose_members(self, num_sources: int, noise: bool) -> tuple[str, ...]:
        there = self.manifest.members
        if there == ("mix",):
            return there
        wanted = tuple(f"s{i + 1}" for i in range(num_sources)) + (("noise",) if noise else ())
        absent = [name for name in wanted if name not in there]
        if absent:
            raise DataError(
                f"{self.url}: has no {', '.join(absent)}, its samples have {', '.join(there)}; "
                "change num_sources or noise, or shard the corpus again with them"
            )
        return wanted

    def _index(self, shard: int) -> list[Sample]:
        return read_index(self.url, self.manifest.shards[shard])

    def full(self, number: int, max_seconds: float) -> Batch:
        """Sample `number` of the data set, in the order of the manifest, as a batch of one, cut to `max_seconds`."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        within = number - (int(self._ends[shard - 1]) if shard else 0)
        sample = self.index(shard)[within]
        stop = min(sample.num_samples, int(max_seconds * self.manifest.sample_rate))
        return self.collate([(number, sample, self.read(shard, sample, 0, stop))], stop)

    def read(self, shard: int, sample: Sample, start: int, stop: int) -> dict[str, np.ndarray]:
        """The members that matter, samples `start` to `stop`; DataError names shard, key and byte offset."""
        return read_sample(self.cache.open(shard), sample, self.members, start, stop)

    def collate(self, items: list[tuple[int, Sample, dict[str, np.ndarray]]], length: int) -> Batch:
        """Items (position, sample, members) as one batch of `length`, shorter ones padded with zeros at the end."""
        waves = np.zeros((len(items), len(self.members), length), dtype=np.float32)
        for row, (_, _, members) in enumerate(items):
            for column, name in enumerate(self.members):
                waves[row, column, : len(members[name])] = members[name]
        parts = torch.from_numpy(waves)
        return Batch(
            ids=[sample.key for _, sample, _ in items],
            positions=torch.tensor([position for position, _, _ in items]),
            mixture=parts.sum(1),
            sources=parts[:, : self.num_sources] if self.num_sources else None,
            noise=parts[:, -1] if "noise" in self.members else None,
            lengths=torch.tensor([len(members[self.members[0]]) for _, _, members in items]),
            speakers=[sample.speakers for _, sample, _ in items],
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
        self.num_virtual_shards = num_virtual_shards
        self.micro_batch = micro_batch
        self.owned = owned_virtual_shards(num_virtual_shards, rank, world_size)
        self.prefetch_steps = max(1, prefetch_steps)
        self.max_damaged = max_damaged
        self.seconds_waited = 0.0
        self._damaged: set[str] = set()
        self._pool = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="decode")

    @property
    def num_damaged(self) -> int:
        """Different damaged samples that this rank has replaced."""
        return len(self._damaged)

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """For every step from `first_step` on, for ever, one Batch per owned virtual shard; any start costs the same.

        An error of a decoding thread is raised here, at the step that needed the sample.
        """
        ahead: deque[list[Future[Batch]]] = deque()
        step = first_step
        while True:
            while len(ahead) < self.prefetch_steps:
                ahead.append([self._pool.submit(self._batch, step, shard) for shard in self.owned])
                step += 1
            began = time.monotonic()
            batches = [future.result() for future in ahead.popleft()]
            self.seconds_waited += time.monotonic() - began
            yield batches

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
        self.dataset.cache.close()

    def _batch(self, step: int, virtual_shard: int) -> Batch:
        positions = positions_of(step, virtual_shard, self.num_virtual_shards, self.micro_batch)
        self.dataset.cache.prefetch(self.order.shards_near(positions.start))
        return self.dataset.collate([self._item(position) for position in positions], self.crop_samples)

    def _item(self, position: int) -> tuple[int, Sample, dict[str, np.ndarray]]:
        """The crop at `position`; in place of a damaged sample, where that is allowed, the next position's."""
        for candidate in range(position, position + MAX_REPLACEMENTS):
            shard, number = self.order.locate(candidate)
            sample = self.dataset.index(shard)[number]
            spare = sample.num_samples - self.crop_samples
            start = int(rng(self.seed, "crop", candidate).integers(spare + 1)) if spare > 0 else 0
            stop = min(start + self.crop_samples, sample.num_samples)
            try:
                return position, sample, self.dataset.read(shard, sample, start, stop)
            except DataError as error:
                self._damaged.add(sample.key)
                if len(self._damaged) > self.max_damaged:
                    raise DataError(
                        f"{self.dataset.url}: {error} (position {candidate}; {len(self._damaged)} damaged samples, "
                        f"data.max_damaged={self.max_damaged} are allowed)"
                    ) from error
        raise DataError(f"{self.dataset.url}: {MAX_REPLACEMENTS} damaged samples in a row from position {position}")
