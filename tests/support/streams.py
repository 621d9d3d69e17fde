"""Streams of the toy data sets with crops of a few samples, and what they deliver."""

from collections.abc import Iterator

from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset
from sepdist.data.records import Batch
from sepdist.data.stream import TrainStream
from tests.support import toy

CROP = 64  # samples; mixtures have 40 to 119


def open_stream(dataset: Dataset, **changes: object) -> TrainStream:
    options = {"seed": 5, "num_virtual_shards": 4, "micro_batch": 2, "rank": 0, "world_size": 1}
    options |= {"crop_seconds": CROP / toy.RATE, "num_threads": 2, "prefetch_steps": 2} | changes
    crops = Crops(dataset, seed=options["seed"], crop_seconds=options.pop("crop_seconds"))
    return TrainStream({"main": crops}, **options)  # type: ignore[arg-type]


def take(dataset: Dataset, first_step: int, num_steps: int, **changes: object) -> list[list[Batch]]:
    stream = open_stream(dataset, **changes)
    steps = stream.steps(first_step)
    try:
        return [next(steps) for _ in range(num_steps)]
    finally:
        steps.close()
        stream._decoders.close()


def rows(steps: list[list[Batch]]) -> Iterator[tuple[int, str, bytes]]:
    """Yield (position, id, bits of all audio) of every row."""
    for batches in steps:
        for batch in batches:
            assert batch.sources is not None
            for i, position in enumerate(batch.positions.tolist()):
                waves = (batch.mixture[i], batch.sources[i])
                audio = b"".join(wave.numpy().tobytes() for wave in waves)
                yield position, batch.ids[i], audio
