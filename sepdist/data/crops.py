"""Crops of stored samples, each at a place drawn for its position in the data order.

Shapes: T samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from sepdist import audio
from sepdist.data.dataset import MAX_CROPS, Dataset, Item
from sepdist.data.members import DataError, split_members
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


def crop_length(crop_seconds: float, sample_rate: int) -> int:
    """Convert the length of a crop to samples."""
    if round(crop_seconds * sample_rate) < 1:
        raise ValueError(f"crop_seconds={crop_seconds} at {sample_rate} Hz: it must be positive")
    return round(crop_seconds * sample_rate)


def beyond_replacing(damages: Sequence[Damage]) -> DataError:
    """Build the error of a position for which no intact sample was found."""
    last, tried = damages[-1], f"{len(damages)} damaged samples in a row"
    return DataError(f"{last.url}: {last.error} (position {last.position}; {tried})")


def require_speeds(speeds: Sequence[float]) -> None:
    """Raise ValueError unless there are speeds between half and twice."""
    if not speeds or not 0.5 <= min(speeds) <= max(speeds) <= 2:
        raise ValueError(f"speeds={list(speeds)}: give one or more from 0.5 to 2; 1 is no change")


def samples_at(speed: float, num_samples: int, rate: int) -> int:
    """The least number of samples that last `num_samples` when played at `speed`."""
    return -(-num_samples * round(rate * speed) // rate)


class Crops:
    """The stored samples of a data set, each cut to `crop_seconds`: a feed of `TrainStream`.

    With `speeds`, each source of a crop is played from the same place on at a speed drawn for it,
    as SpeechBrain's SepFormer does (0.95, 1 and 1.05); noise keeps its own. The sources are cut to
    the shortest.
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
        self.crop_samples = crop_length(crop_seconds, self.rate)
        if speeds:
            require_speeds(speeds)
            self.sources, estimates, rest = split_members(dataset.members)
            if estimates or "mix" in rest:
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
            speeds = self._draw_speeds(position)
            length = samples_at(max(speeds.values(), default=1), self.crop_samples, self.rate)
            starts = self._starts(position, sample.num_samples, length)
            try:
                members = self.dataset.read_crop(shard, number, length, starts)
            except DataError as error:
                damages.append(Damage(self.url, position, sample.key, error))
            else:
                return Item(sample.key, sample.speakers, self._play(members, speeds))
        raise beyond_replacing(damages[first:]) from damages[-1].error

    def _draw_speeds(self, position: int) -> dict[str, float]:
        """Draw the speed of every source; {} where they are as stored."""
        if not self.speeds:
            return {}
        raw = rng(self.seed, "speeds", position).bit_generator.random_raw(len(self.sources))
        drawn = (self.speeds[number % len(self.speeds)] for number in raw.tolist())
        return dict(zip(self.sources, drawn, strict=True))

    def _play(
        self, members: Mapping[str, np.ndarray], speeds: Mapping[str, float]
    ) -> Mapping[str, np.ndarray]:
        if not speeds:
            return members
        played = {
            name: audio.resample(wave_T, round(self.rate * speeds.get(name, 1)), self.rate)
            for name, wave_T in members.items()
        }
        length = min(self.crop_samples, *(wave_T.size for wave_T in played.values()))
        return {name: wave_T[:length] for name, wave_T in played.items()}

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
