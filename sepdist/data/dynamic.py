"""Dynamic mixing: positions of a data set of utterances in, mixtures that never come again out.

A feed for `TrainStream`, like `stream.Crops`: pairs, levels, speeds, crops and noises are drawn anew for every position
and are pure functions of it. Loudness and the guards against clipping are LibriMix's (mixing.py).

Shapes: T samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from sepdist import audio
from sepdist.corpora.recipes import NOISE_LUFS, SPEECH_LUFS, extend_noise, guarded_gains
from sepdist.data.cache import OpenShard
from sepdist.data.dataset import Dataset, Item
from sepdist.data.members import DataError
from sepdist.data.order import Order
from sepdist.data.shards import Sample
from sepdist.data.stream import MAX_REPLACEMENTS, Damage, beyond_replacing, crop_length
from sepdist.seeding import derive, rng


@dataclass(frozen=True)
class _Clip:
    """The member s1 of a sample, its loudness in LUFS and its peak."""

    dataset: Dataset
    shard: OpenShard
    number: int
    loudness: float
    peak: float

    @property
    def sample(self) -> Sample:
        return self.shard.samples[self.number]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.dataset.read(self.shard, self.number, start, stop)["s1"]


class _Clips:
    """One data set, and an order of its samples for each part of a mixture that is drawn from it."""

    def __init__(self, dataset: Dataset, seeds: Sequence[int]) -> None:
        self.dataset = dataset
        sizes = tuple(shard.num_samples for shard in dataset.manifest.shards)
        self.orders = [Order(seed, sizes) for seed in seeds]
        self._measured: dict[tuple[int, int], tuple[float, float]] = {}

    def find(self, part: int, position: int, others: Sequence[str], damages: list[Damage]) -> _Clip:
        """The first clip from `position` on in the order of `part` that is sound and of no speaker in `others`."""
        order, met = self.orders[part], list[Damage]()
        for candidate in range(
            position, position + 2 * order.num_samples
        ):  # there is a whole epoch in it
            place = order.locate(candidate)
            shard, number = self.dataset.cache.open(place[0]), place[1]
            sample = shard.samples[number]
            if sample.speakers[0] in others:
                continue
            try:
                loudness, peak = self._measure(place, shard)
            except DataError as error:
                met.append(Damage(self.dataset.url, candidate, sample.key, error))
                if len(met) > MAX_REPLACEMENTS:
                    break
                continue
            damages += met
            return _Clip(self.dataset, shard, number, loudness, peak)
        if met:
            raise beyond_replacing(met) from met[-1].error
        raise DataError(
            f"{self.dataset.url}: has no utterance of another speaker than {', '.join(others)}"
        )

    def _measure(self, place: tuple[int, int], shard: OpenShard) -> tuple[float, float]:
        """Loudness and peak of a whole clip, measured once in a process; DataError, each time, of a damaged one."""
        if place not in self._measured:
            sample = shard.samples[place[1]]
            wave = self.dataset.read(shard, place[1], 0, sample.num_samples)["s1"]
            what = f"{self.dataset.url}, {sample.key}"
            loudness = audio.loudness(wave, self.dataset.manifest.sample_rate, what)
            self._measured[place] = loudness, float(np.max(np.abs(wave)))
        return self._measured[place]

    def prefetch(self, positions: range) -> None:
        by_part = zip_longest(*(order.upcoming(positions) for order in self.orders))
        self.dataset.cache.prefetch(
            [number for turn in by_part for number in turn if number is not None]
        )


class DynamicMixing:
    """New mixtures of the first sources of a data set's samples, each of which is one person.

    The first source goes through the data set once an epoch. The others, and the noise, have orders of their own; a
    sample of a speaker who is in the mixture already gives way to the next. `speeds`: each source is played at one of
    them, by resampling, so that its pitch moves too. `levels`, `noise_levels`: ranges of loudness in LUFS, which is
    that of the whole utterance as it is stored, not of the crop. `noise`: a data set of noises (corpus wham). Sources
    are cropped each for itself, and padded with zeros where one is shorter than the others.
    """

    path_arguments = ("noise",)

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        num_sources: int,
        crop_seconds: float,
        speeds: Sequence[float] = (0.95, 1.0, 1.05),
        levels: tuple[float, float] = SPEECH_LUFS,
        noise: str | None = None,
        noise_levels: tuple[float, float] = NOISE_LUFS,
    ) -> None:
        manifest = dataset.manifest
        if not speeds or min(speeds) <= 0:
            raise ValueError(
                f"speeds={list(speeds)}: give at least one, all above 0; 1 leaves the speed as it is"
            )
        if "s1" not in manifest.members or manifest.num_speakers < num_sources:
            raise DataError(
                f"{dataset.url}: has {manifest.num_speakers} speakers and the members {', '.join(manifest.members)}; "
                f"mixing needs s1 of {num_sources} different speakers"
            )
        self.url, self.num_samples, self.rate = (
            dataset.url,
            manifest.num_samples,
            manifest.sample_rate,
        )
        self.crop_samples = crop_length(crop_seconds, self.rate)
        self.seed, self.speeds, self.levels, self.noise_levels = seed, speeds, levels, noise_levels
        self.voices = _Clips(
            dataset, [derive(seed, "mixing order", f"s{i + 1}") for i in range(num_sources)]
        )
        self.noises: _Clips | None = None
        if noise is not None:
            cache = dataset.cache
            found = Dataset(
                noise,
                num_sources=1,
                cache_dir=str(cache.folder),
                cache_gigabytes=cache.max_bytes / 1e9,
            )
            if found.manifest.members != ("s1",) or found.manifest.sample_rate != self.rate:
                raise DataError(
                    f"{noise}: has the members {', '.join(found.manifest.members)} at {found.manifest.sample_rate} Hz; "
                    f"the noise of a mixing is a data set of s1 alone (corpus=wham) at {self.rate} Hz"
                )
            self.noises = _Clips(found, [derive(seed, "mixing order", "noise")])

    def item(self, position: int, damages: list[Damage]) -> Item:
        """The mixture of `position`; its id names the utterances and the position, because it never comes again."""
        # The raw stream of the bit generator, because that one never changes between versions of NumPy.
        raw = rng(self.seed, "dynamic mixing", position).bit_generator.random_raw(
            3 * len(self.voices.orders) + 2
        )
        draws = iter(((raw >> np.uint64(11)) * 2.0**-53).tolist())  # in [0, 1)
        clips: list[_Clip] = []
        waves: list[np.ndarray] = []
        targets: list[float] = []
        for part in range(len(self.voices.orders)):
            clip = self.voices.find(
                part, position, [other.sample.speakers[0] for other in clips], damages
            )
            speed = self.speeds[int(next(draws) * len(self.speeds))]
            waves.append(self._crop(clip, speed, next(draws)))
            targets.append(_between(self.levels, next(draws)))
            clips.append(clip)
        names, length = [f"s{i + 1}" for i in range(len(clips))], max(wave.size for wave in waves)
        who, key = (
            tuple(clip.sample.speakers[0] for clip in clips),
            "_".join(clip.sample.key for clip in clips),
        )
        if self.noises is not None:
            clip = self.noises.find(0, position, (), damages)
            spare = clip.sample.num_samples - length
            start = int(next(draws) * (max(0, spare) + 1))
            stop = min(start + length, clip.sample.num_samples)
            waves.append(extend_noise(clip.read(start, stop), self.rate, length))
            targets.append(_between(self.noise_levels, next(draws)))
            clips.append(clip)
            names.append("noise")
        waves = [audio.fit(wave, length) for wave in waves]
        gains = guarded_gains(
            targets, [clip.loudness for clip in clips], [clip.peak for clip in clips], lambda: waves
        )
        scaled = [wave * np.float32(gain) for wave, gain in zip(waves, gains, strict=True)]
        return Item(f"{key}@{position}", who, dict(zip(names, scaled, strict=True)))

    def _crop(self, clip: _Clip, speed: float, place: float) -> np.ndarray:
        """float32 [T] of a clip played at `speed`, where `place` of [0, 1) says, of the length of a crop or shorter."""
        as_rate = round(self.rate * speed)
        wanted = -(-self.crop_samples * as_rate // self.rate)
        start = int(place * (max(0, clip.sample.num_samples - wanted) + 1))
        wave = clip.read(start, min(start + wanted, clip.sample.num_samples))
        return audio.resample(wave, as_rate, self.rate)[: self.crop_samples]

    def prefetch(self, positions: range) -> None:
        """Get the shards of `positions` and of the blocks after them in the background."""
        for clips in filter(None, (self.voices, self.noises)):
            clips.prefetch(positions)

    def digest(self) -> str:
        """The sha256 of the data sets."""
        return " with ".join(
            clips.dataset.manifest.digest() for clips in (self.voices, self.noises) if clips
        )

    def close(self) -> None:
        """End the threads."""
        for clips in filter(None, (self.voices, self.noises)):
            clips.dataset.cache.close()


def _between(range_: tuple[float, float], share: float) -> float:
    return range_[0] + (range_[1] - range_[0]) * share
