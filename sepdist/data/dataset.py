"""A finished data set: its samples one by one, and `collate`, which makes a batch of several.

Shapes: B batch, S sources, T samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sepdist.audio import SILENCE
from sepdist.data.cache import OpenShard, ShardCache
from sepdist.data.members import DataError, split_members
from sepdist.data.records import MAIN, Batch
from sepdist.data.shards import read_manifest, read_metadata, read_sample

MAX_CROPS = 100  # places tried for one crop, until no source is silent in it


@dataclass(frozen=True)
class Item:
    """One row of a batch: the members of a mixture, float32 [T] of one length."""

    id: str
    speakers: tuple[str, ...]
    members: Mapping[str, np.ndarray]


class Dataset:
    """A data set whose mixtures have `num_sources` sources and, with `noise`, the noise.

    `members` are read instead, if given.
    """

    def __init__(
        self,
        url: str,
        *,
        num_sources: int = 2,
        noise: bool = False,
        members: Sequence[str] = (),
        cache_dir: str = "~/.cache/sepdist",
        cache_gigabytes: float = 50.0,
    ) -> None:
        self.url = url
        self.manifest = read_manifest(url)
        self.members = tuple(members) or self._choose_members(num_sources, noise)
        self.cache = ShardCache(url, self.manifest, cache_dir, int(cache_gigabytes * 1e9))
        self.shard_sizes = tuple(shard.num_samples for shard in self.manifest.shards)
        self._ends = np.cumsum(self.shard_sizes)

    def _choose_members(self, num_sources: int, noise: bool) -> tuple[str, ...]:
        found = self.manifest.members
        if found == ("mix",):
            return found
        if num_sources < 1:
            raise DataError(f"{self.url}: num_sources={num_sources}: it must be positive")
        numbers = range(1, num_sources + 1)
        wanted = [f"s{i}" for i in numbers] + ["noise"] * noise
        sources, estimates, rest = split_members(found)
        if "mix" in rest:
            has = len(sources), "noise" in rest
            if has != (num_sources, noise):
                raise DataError(
                    f"{self.url}: its mixtures are stored (mix), so nothing can be left out of "
                    f"them or added: set num_sources={has[0]} and noise={str(has[1]).lower()}"
                )
            wanted.append("mix")
        if estimates:
            wanted += [f"e{i}" for i in numbers]
            if "noise" in found and not noise:
                raise DataError(
                    f"{self.url}: its estimates were made of mixtures with noise; set noise=true, "
                    "or make the data set again with corpus.noise=false"
                )
        absent = [name for name in wanted if name not in found]
        if absent:
            raise DataError(
                f"{self.url}: has no {', '.join(absent)}, its samples have {', '.join(found)}; "
                "change num_sources or noise, or shard the corpus again with them"
            )
        return tuple(wanted)

    def full(self, number: int, max_seconds: float) -> Batch:
        """Return sample `number`, in manifest order, as a batch of one cut to `max_seconds`."""
        return collate([self.item(number, max_seconds)], range(number, number + 1))

    def item(self, number: int, max_seconds: float) -> Item:
        """Return sample `number`, in manifest order, cut to `max_seconds`."""
        shard, within = self._find(number)
        sample = shard.samples[within]
        stop = min(sample.num_samples, int(max_seconds * self.manifest.sample_rate))
        return Item(sample.key, sample.speakers, self.read(shard, within, 0, stop))

    def metadata(self, number: int) -> dict[str, Any]:
        """Return the JSON metadata of sample `number`."""
        shard, within = self._find(number)
        return read_metadata(shard.file, shard.samples[within])

    def _find(self, number: int) -> tuple[OpenShard, int]:
        """Return the shard of sample `number`, and the sample's number within it."""
        if not 0 <= number < self.manifest.num_samples:
            raise IndexError(f"{self.url}: no sample {number}, it has {self.manifest.num_samples}")
        which = int(np.searchsorted(self._ends, number, side="right"))
        self.cache.prefetch(range(which, min(which + 2, len(self._ends))))
        return self.cache.open(which), number - (int(self._ends[which - 1]) if which else 0)

    def read(self, shard: OpenShard, number: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Read samples [start, stop) of `self.members` by `read_sample`; DataError if damaged."""
        if number in shard.damaged:
            raise DataError(shard.damaged[number])
        return read_sample(shard.file, shard.samples[number], self.members, start, stop)

    def read_crop(
        self, shard: OpenShard, number: int, length: int, starts: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Read the crop at the first of `starts` where no source is silent, or the fewest are."""
        size = shard.samples[number].num_samples
        members = self.read(shard, number, starts[0], min(starts[0] + length, size))
        if size <= length or not num_silent(members):
            return members
        whole = self.read(shard, number, 0, size)  # as fast as two or three crops
        crops = [{name: w[start : start + length] for name, w in whole.items()} for start in starts]
        audible = (crop for crop in crops if not num_silent(crop))
        return next(audible, None) or min(crops, key=num_silent)


def num_silent(members: Mapping[str, np.ndarray]) -> int:
    """Count the silent sources (see `metrics.si_snr`), or mixtures where these are unknown."""
    sources, _, rest = split_members(list(members))
    return sum(float(np.ptp(members[name])) < 2 * SILENCE for name in sources or rest)


def collate(
    items: Sequence[Item], positions: range, length: int = 0, data_set: str = MAIN
) -> Batch:
    """Make a batch of `length`, or of the first item's; shorter ones are padded with zeros."""
    sources, estimates, rest = split_members(list(items[0].members))
    names = [*sources, *rest, *estimates]
    length = length or len(items[0].members[names[0]])
    waves = np.zeros((len(items), len(names), length), dtype=np.float32)
    for row, item in zip(waves, items, strict=True):
        for padded, name in zip(row, names, strict=True):
            padded[: len(item.members[name])] = item.members[name]
    first = names.index("mix") if "mix" in names else 0
    mixture = waves[:, first].copy()
    # One by one, so that the bits do not depend on the shape of the batch.
    for column in () if "mix" in names else range(1, len(sources) + len(rest)):
        mixture += waves[:, column]
    members = torch.from_numpy(waves)
    return Batch(
        ids=[item.id for item in items],
        positions=torch.tensor(positions),
        mixture=torch.from_numpy(mixture),
        sources=members[:, : len(sources)] if sources else None,
        noise=members[:, names.index("noise")] if "noise" in names else None,
        estimates=members[:, -len(estimates) :] if estimates else None,
        lengths=torch.tensor([len(item.members[names[0]]) for item in items]),
        speakers=[item.speakers for item in items],
        data_set=data_set,
        num_silent=sum(num_silent(item.members) for item in items),
    )
