"""Dynamic mixing: a new mixture of single utterances for every position of training.

Speakers, levels, speeds, crops, rooms and noises are drawn from the seed and the position. Loudness
and the guards against clipping are LibriMix's (corpora/recipes.py).

Shapes: T samples.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np

from sepdist import audio
from sepdist.corpora.recipes import NOISE_LUFS, SPEECH_LUFS, extend_noise, guarded_gains
from sepdist.data.cache import OpenShard
from sepdist.data.crops import MAX_REPLACEMENTS, Damage, beyond_replacing, crop_length
from sepdist.data.dataset import MAX_CROPS, Dataset, Item
from sepdist.data.members import DataError
from sepdist.data.order import Blend, Order
from sepdist.data.rooms import Rooms
from sepdist.data.shards import NUM_READERS, read_index
from sepdist.seeding import derive, rng

MAX_DRAWS = 1000  # of a speaker who is not in the mixture yet


@dataclass(frozen=True)
class _Clip:
    """A sample whose only member is s1; `read` is `Dataset.read_crop` of that sample."""

    key: str
    speaker: str
    num_samples: int
    loudness: float  # LUFS, of the whole clip
    peak: float
    read: Callable[[int, Sequence[int]], dict[str, np.ndarray]]


class _Clips:
    """A data set of clips, with one order of its samples per member of a mixture."""

    def __init__(self, dataset: Dataset, seeds: Sequence[int], by_speaker: bool = False) -> None:
        self.dataset = dataset
        self.seeds = seeds
        self.places = _places(dataset) if by_speaker else []  # by speaker
        self.arrange(None, 0)
        self._measured: dict[tuple[int, int], tuple[float, float]] = {}

    def arrange(self, blend: Blend | None, number: int) -> None:
        kind: Any = partial(_Balanced, self.places) if self.places else Order
        sizes = self.dataset.shard_sizes
        self.orders: list[Order] = [
            kind(seed, sizes, blend=blend, number=number) for seed in self.seeds
        ]

    def find(self, order: Order, position: int, others: set[str], damages: list[Damage]) -> _Clip:
        """Return the first clip from `position` on that can be mixed and is of none of `others`."""
        first = len(damages)
        for place in order.candidates(position):
            shard, number = self.dataset.cache.open(place[0]), place[1]
            sample = shard.samples[number]
            if sample.speakers[0] in others:
                continue
            try:
                loudness, peak = self._measure(place, shard)
            except (DataError, audio.AudioError) as error:  # damaged, too short or too quiet
                damages.append(Damage(self.dataset.url, position, sample.key, error))
                if len(damages) - first > MAX_REPLACEMENTS:
                    break
                continue
            read, speaker = partial(self.dataset.read_crop, shard, number), sample.speakers[0]
            return _Clip(sample.key, speaker, sample.num_samples, loudness, peak, read)
        if len(damages) > first:
            raise beyond_replacing(damages[first:]) from damages[-1].error
        names = ", ".join(sorted(others))
        raise DataError(f"{self.dataset.url}: has no utterance of a speaker other than {names}")

    def _measure(self, place: tuple[int, int], shard: OpenShard) -> tuple[float, float]:
        """Measure loudness and peak of a whole clip, once in a process unless it is damaged."""
        if place not in self._measured:
            sample = shard.samples[place[1]]
            wave = self.dataset.read(shard, place[1], 0, sample.num_samples)["s1"]
            loudness = audio.loudness(wave, self.dataset.manifest.sample_rate, sample.key)
            self._measured[place] = loudness, float(np.max(np.abs(wave)))
        return self._measured[place]

    def prefetch(self, positions: range, lanes: range) -> None:
        by_order = zip_longest(*(order.upcoming(positions, lanes) for order in self.orders))
        numbers = [number for turn in by_order for number in turn if number is not None]
        self.dataset.cache.prefetch(numbers)


class _Balanced(Order):
    """Samples drawn for a position: any speaker as often as another, then any sample of theirs."""

    def __init__(self, places: list[list[tuple[int, int]]], *of_order: Any, **more: Any) -> None:
        super().__init__(*of_order, **more)
        self.places = places  # by speaker
        self._first = lru_cache(maxsize=2**14)(lambda position: next(self.candidates(position)))

    def candidates(self, position: int) -> Iterator[tuple[int, int]]:
        """Yield independent draws of (shard, sample) for a position."""
        bits = rng(self.seed, "balanced", position).bit_generator
        for _ in range(MAX_DRAWS):
            speaker, sample = bits.random_raw(2).tolist()
            own = self.places[speaker % len(self.places)]
            yield own[sample % len(own)]

    def upcoming(self, positions: range, lanes: range = range(1)) -> list[int]:
        """Shards of the positions in `lanes`, by first use."""
        own = (one for one in positions if self.blend.lanes(self.number, one)[0] in lanes)
        return list(dict.fromkeys(self._first(one)[0] for one in own))


def _places(dataset: Dataset) -> list[list[tuple[int, int]]]:
    """List (shard, sample) of every speaker's samples; reads all indices."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        indices = pool.map(partial(read_index, dataset.url), dataset.manifest.shards)
        for shard, samples in enumerate(indices):
            for number, sample in enumerate(samples):
                found[sample.speakers[0]].append((shard, number))
    return [found[name] for name in sorted(found)]


@dataclass(eq=False)
class DynamicMixing:
    """Mixtures of the first sources of a data set's samples, each of one person: a feed.

    Every sample is the first source once an epoch. The other sources, and the noise, have orders of
    their own; a sample of a speaker already in the mixture is passed over. With `balance` "speaker"
    each source is drawn instead: a speaker, then one of their samples. Levels are in LUFS. `rooms`
    are arguments of `Rooms`; with its dry targets, an item has a `mix` that is not their sum.
    """

    path_arguments: ClassVar = ("noise",)
    dataset: Dataset  # utterances, or mixtures of which s1 is used
    _: KW_ONLY
    seed: int  # of all draws
    num_sources: int  # speakers per mixture
    crop_seconds: float  # a crop is drawn for each source; shorter ones are zero-padded
    speeds: Sequence[float] = (0.95, 1.0, 1.05)  # each source gets one, which moves its pitch too
    levels: tuple[float, float] = SPEECH_LUFS  # of the whole stored utterance rather than the crop
    noise: str | None = None  # a data set of noises (corpus wham)
    noise_levels: tuple[float, float] = NOISE_LUFS
    balance: str | None = None
    rooms: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        manifest, cache = self.dataset.manifest, self.dataset.cache
        if self.balance not in (None, "speaker"):
            raise ValueError(f"balance={self.balance}: give speaker, or null for none")
        self.acoustics = None if self.rooms is None else Rooms(**self.rooms)
        if "s1" not in manifest.members or manifest.num_speakers < self.num_sources:
            found = f"{manifest.num_speakers} speakers, the members {', '.join(manifest.members)}"
            needed = f"mixing needs s1 of {self.num_sources} different speakers"
            raise DataError(f"{self.dataset.url}: has {found}; {needed}")
        self.num_samples, self.rate = manifest.num_samples, manifest.sample_rate
        self.crop_samples = crop_length(self.crop_seconds, self.rate, self.speeds)
        names = [f"s{i + 1}" for i in range(self.num_sources)]
        seeds = [derive(self.seed, "mixing order", one) for one in names]
        self.voices = _Clips(self.dataset, seeds, by_speaker=self.balance == "speaker")
        self.noises: _Clips | None = None
        if self.noise is not None:
            folder, gigabytes = str(cache.folder), cache.max_bytes / 1e9
            hiss = Dataset(self.noise, num_sources=1, cache_dir=folder, cache_gigabytes=gigabytes)
            rate, members = hiss.manifest.sample_rate, hiss.manifest.members
            if members != ("s1",) or rate != self.rate:
                raise DataError(
                    f"{self.noise}: has the members {', '.join(members)} at {rate} Hz; the noise "
                    f"of a mixing is a data set of s1 alone (corpus=wham) at {self.rate} Hz"
                )
            self.noises = _Clips(hiss, [derive(self.seed, "mixing order", "noise")])
        self._used = [clips for clips in (self.voices, self.noises) if clips]

    def item(self, position: int, damages: list[Damage]) -> Item:
        """Mix `position`; the id names the utterances and the position, so it occurs once."""
        num_draws = 3 * len(self.voices.orders) + 2
        # The raw stream, because NumPy keeps no other the same across versions.
        bits = rng(self.seed, "dynamic mixing", position).bit_generator
        raw = bits.random_raw(num_draws + MAX_CROPS)
        shares = ((raw >> np.uint64(11)) * 2.0**-53).tolist()  # in [0, 1)
        draws, more_places = iter(shares[:num_draws]), shares[num_draws:]
        clips: list[_Clip] = []
        waves: list[np.ndarray] = []
        targets: list[float] = []
        for order in self.voices.orders:
            clip = self.voices.find(order, position, {one.speaker for one in clips}, damages)
            speed = self.speeds[int(next(draws) * len(self.speeds))]
            waves.append(self._crop(clip, speed, [next(draws), *more_places]))
            targets.append(_between(self.levels, next(draws)))
            clips.append(clip)
        names, length = [f"s{i + 1}" for i in range(len(clips))], max(wave.size for wave in waves)
        speakers, key = tuple(clip.speaker for clip in clips), "_".join(clip.key for clip in clips)
        if self.noises is not None:
            clip = self.noises.find(self.noises.orders[0], position, set(), damages)
            start = int(next(draws) * (max(0, clip.num_samples - length) + 1))
            noise = clip.read(length, [start])["s1"]
            waves.append(extend_noise(noise, self.rate, length))
            targets.append(_between(self.noise_levels, next(draws)))
            clips.append(clip)
            names.append("noise")
        waves = [audio.fit(wave, length) for wave in waves]
        loudnesses, peaks = [clip.loudness for clip in clips], [clip.peak for clip in clips]
        heard = waves
        if self.acoustics is not None:
            own, rest = waves[: self.num_sources], waves[self.num_sources :]
            played, direct = self.acoustics.play(own, self.seed, position, self.rate)
            heard = [*played, *rest]
            waves = heard if self.acoustics.target == "wet" else [*direct, *rest]
            peaks = [*map(max, peaks, (float(np.abs(wave).max()) for wave in heard))]
        gains = [*map(np.float32, guarded_gains(targets, loudnesses, peaks, lambda: heard))]
        members = {n: wave * gain for n, wave, gain in zip(names, waves, gains, strict=True)}
        if heard is not waves:
            scaled = [wave * gain for wave, gain in zip(heard, gains, strict=True)]
            members["mix"] = np.sum(scaled, axis=0, dtype=np.float32)
        return Item(f"{key}@{position}", speakers, members)

    def _crop(self, clip: _Clip, speed: float, places: Sequence[float]) -> np.ndarray:
        """Play a clip at `speed` from the first of `places` with a sound: crop_samples or fewer."""
        as_rate = round(self.rate * speed)
        wanted = -(-self.crop_samples * as_rate // self.rate)
        num_starts = max(0, clip.num_samples - wanted) + 1
        wave = clip.read(wanted, [int(place * num_starts) for place in places])["s1"]
        return audio.resample(wave, as_rate, self.rate)[: self.crop_samples]

    def arrange(self, blend: Blend, number: int) -> None:
        """Follow the lanes of data set `number` of `blend`, in the order of every member."""
        for clips in self._used:
            clips.arrange(blend, number)

    def prefetch(self, positions: range, lanes: range) -> None:
        """Get the shards of `positions` and of the next blocks in the background."""
        for clips in self._used:
            clips.prefetch(positions, lanes)

    def digest(self) -> str:
        """The sha256 of the data sets."""
        return " with ".join(clips.dataset.manifest.digest() for clips in self._used)

    def close(self) -> None:
        """End the background threads."""
        for clips in self._used:
            clips.dataset.cache.close()


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
