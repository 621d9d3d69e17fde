"""Utterances that are tones, each of its own pitch and length, noises, and mixings of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from sepdist.data import shards
from sepdist.data.dataset import Dataset, Item
from sepdist.data.dynamic import DynamicMixing
from sepdist.data.records import Batch, Utterance
from sepdist.data.stream import TrainStream
from tests.support.shard_sets import write_shard

RATE = 8000
CROP_SECONDS = 0.5
CROP = 4000
NUM_UTTERANCES, NUM_SPEAKERS = 14, 5


def pitch(number: int) -> float:
    return 400.0 + 60.0 * number


def num_samples(number: int) -> int:
    """0.45 to 1.1 s: the first few are shorter than a crop."""
    return 3600 + 400 * number


def tone(number: int) -> np.ndarray:
    seconds = np.arange(num_samples(number)) / RATE
    return (0.3 * np.sin(2 * np.pi * pitch(number) * seconds)).astype(np.float32)


def write(
    url: Path,
    sizes: tuple[int, ...] = (4, 1, 6, 3),
    speaker: Callable[[int], str] = lambda number: f"speaker{number % NUM_SPEAKERS}",
    wave: Callable[[int], np.ndarray] = tone,
) -> str:
    infos, first = [], 0
    for i, size in enumerate(sizes):
        records = [
            Utterance(f"u{n}", speaker(n), RATE, partial(wave, n))
            for n in range(first, first + size)
        ]
        infos.append(write_shard(records, url, shards.shard_name("toy", "train", i)))
        first += size
    shards.write_manifest(url, "toy", "train", RATE, infos)
    return str(url)


def hiss(number: int) -> np.ndarray:
    """Noises of 0.4 and 0.9 s, one shorter than a crop and one longer."""
    wave = 0.05 * np.random.default_rng(number).standard_normal((3300, 7200)[number % 2])
    return wave.clip(-1, 1).astype(np.float32)


def mixing(url: str, num_sources: int = 2, seed: int = 3, **options: object) -> DynamicMixing:
    dataset = Dataset(url, num_sources=1)
    return DynamicMixing(
        dataset, seed=seed, num_sources=num_sources, crop_seconds=CROP_SECONDS, **options
    )  # type: ignore[arg-type]


def utterances(item: Item) -> list[int]:
    """Parse the numbers of the utterances from the id, which ends with the position."""
    return [int(key.removeprefix("u")) for key in item.id.partition("@")[0].split("_")]


def found_pitch(wave: np.ndarray) -> float:
    """Estimate by the highest bin of a spectrum zero-padded 16 times."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(wave.size), 16 * wave.size))
    return float(spectrum.argmax()) * RATE / (16 * wave.size)


def rows(
    made: DynamicMixing, rank: int, world_size: int, first_step: int, num_steps: int, threads: int
) -> list[tuple]:
    options = {"num_virtual_shards": 4, "micro_batch": 2, "rank": rank, "world_size": world_size}
    options |= {"seed": 3, "num_threads": threads, "max_damaged": 2}
    stream = TrainStream({"main": made}, **options)  # type: ignore[arg-type]
    steps = stream.steps(first_step)
    batches: list[Batch] = [batch for _ in range(num_steps) for batch in next(steps)]
    stream.close()
    found = []
    for batch in batches:
        for position, id_, *waves in zip(
            batch.positions.tolist(), batch.ids, batch.mixture, batch.sources, strict=True
        ):
            found.append((position, id_, *(wave.numpy().tobytes() for wave in waves)))
    return found
