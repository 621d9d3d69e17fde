"""Crops of stored samples, each at a place drawn for its position in the data order."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from sepdist import audio
from sepdist.data.dataset import MAX_CROPS, Dataset, Item
from sepdist.data.members import DataError
from sepdist.data.order import Blend, Order
from sepdist.seeding import rng

MAX_REPLACEMENTS = 100  # positions tried in a row for one damaged sample


@dataclass(frozen=True)
class Damage:
    """A damaged sample, and the position (of its data set) that it should have filled."""

    url: str
    position: int
    key: str
    error: ValueError


def crop_length(crop_seconds: float, sample_rate: int, speeds: Sequence[float]) -> int:
    """Convert the length of a crop to samples; ValueError for that, or `speeds`, out of range."""
    if not speeds or not 0.5 <= min(speeds) <= max(speeds) <= 2:
        raise ValueError(f"speeds={list(speeds)}: give one or more from 0.5 to 2; 1 is no change")
    if round(crop_seconds * sample_rate) < 1:
        raise ValueError(f"crop_seconds={crop_seconds} at {sample_rate} Hz: it must be positive")
    return round(crop_seconds * sample_rate)


def beyond_replacing(damages: Sequence[Damage]) -> DataError:
    """Build the error of a position for which no intact sample was found."""
    last, tried = damages[-1], f"{len(damages)} damaged samples in a row"
    return DataError(f"{last.url}: {last.error} (position {last.position}; {tried})")


class Crops:
    """The stored samples of a data set, each cut to `crop_seconds`: a feed of `TrainStream`.

    Each source of a crop is played at one of `speeds`, as in SpeechBrain's SepFormer; noise is not.
    """

    def __init__(
        self, dataset: Dataset, *, seed: int, crop_seconds: float, speeds: Sequence[float] = ()
    ) -> None:
        self.dataset = dataset
        self.url = dataset.url
        self.num_samples = dataset.manifest.num_samples
        self.seed = seed
        self.arrange(None, 0)
        self.rate, self.speeds = dataset.manifest.sample_rate, speeds
        self.crop_samples = crop_length(crop_seconds, self.rate, speeds or [1])
        if speeds and {"mix", "e1"}.intersection(dataset.members):
            has = f"{self.url}: speeds={list(speeds)}: it has {', '.join(dataset.members)}"
            raise DataError(f"{has}; only a sum of sources can be made anew, so set speeds=[]")

    def arrange(self, blend: Blend | None, number: int) -> None:
        """Follow the lanes of data set `number` of `blend`; None: one lane."""
        self.order = Order(self.seed, self.dataset.shard_sizes, blend=blend, number=number)

    def item(self, position: int, damages: list[Damage]) -> Item:
        """Return the crop at `position`; a damaged sample gives way to the next of its lane."""
        first = len(damages)
        for shard_number, number in islice(self.order.candidates(position), MAX_REPLACEMENTS):
            shard = self.dataset.cache.open(shard_number)
            sample = shard.samples[number]
            rates = self._rates(position)
            length = -(-self.crop_samples * max(rates.values()) // self.rate)
            starts = self._starts(position, sample.num_samples, length)
            try:
                members = self.dataset.read_crop(shard, number, length, starts)
            except DataError as error:
                damages.append(Damage(self.url, position, sample.key, error))
            else:
                for name, rate in rates.items() if self.speeds else ():
                    members[name] = audio.resample(members[name], rate, self.rate)
                length = min(self.crop_samples, *map(len, members.values()))
                members = {name: wave[:length] for name, wave in members.items()}
                return Item(sample.key, sample.speakers, members)
        raise beyond_replacing(damages[first:]) from damages[-1].error

    def _rates(self, position: int) -> dict[str, int]:
        """Draw each source's speed; returns the rates in Hz at which the members are played."""
        rates = dict.fromkeys(self.dataset.members, self.rate)
        if self.speeds:
            names = [name for name in rates if name != "noise"]
            raw = rng(self.seed, "speeds", position).bit_generator.random_raw(len(names))
            for name, number in zip(names, raw.tolist(), strict=True):
                rates[name] = round(self.rate * self.speeds[number % len(self.speeds)])
        return rates

    def _starts(self, position: int, num_samples: int, length: int) -> list[int]:
        """Draw where the crop at `position` of a sample may start, in the order to be tried."""
        # The raw stream, because NumPy keeps no other the same across versions.
        raw = rng(self.seed, "crop", position).bit_generator.random_raw(MAX_CROPS)
        return (raw % np.uint64(max(0, num_samples - length) + 1)).tolist()

    def prefetch(self, positions: range, lanes: range) -> None:
        """Get the shards of `positions` and of the next blocks in the background."""
        self.dataset.cache.prefetch(self.order.upcoming(positions, lanes))

    def digest(self) -> str:
        """The sha256 of the data set."""
        return self.dataset.manifest.digest()

    def close(self) -> None:
        """End the background threads."""
        self.dataset.cache.close()
