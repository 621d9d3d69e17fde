"""Speed perturbation of stored mixtures: each source at a speed of its own, drawn by position."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sepdist.config import ConfigError, ExtraConfig, TrainConfig
from sepdist.data import shards
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset, collate
from sepdist.data.members import DataError
from sepdist.data.records import Mixture
from sepdist.data.stream import TrainStream
from sepdist.training.datasets import open_datasets
from tests.support.shard_sets import write_shard

RATE = 8000
SPEEDS = (0.95, 1.0, 1.05)
PITCHES = {"s1": 500.0, "s2": 900.0, "noise": 1300.0}


def waves(number: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Tones of 1.25 s, or of 0.5 s in sample 0, so that their pitch tells their speed."""
    seconds = np.arange(10_000 if number else 4000) / RATE
    tones = {name: np.sin(2 * np.pi * PITCHES[name] * seconds) for name in PITCHES}
    tones["e1"], tones["e2"] = tones["s1"], tones["s2"]
    tones["mix"] = sum(tones[name] for name in PITCHES)
    return {name: (0.3 * tones[name]).astype(np.float32) for name in names}


def write(url: Path, names: tuple[str, ...] = ("s1", "s2", "noise")) -> str:
    speakers = tuple(name for name in names if name[0] == "s")
    records = [Mixture(f"u{i}", speakers, RATE, partial(waves, i, names)) for i in range(4)]
    info = write_shard(records, url, shards.shard_name("toy", "train", 0))
    shards.write_manifest(url, "toy", "train", RATE, [info])
    return str(url)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("speeds") / "set")


def crops(url: str, speeds: tuple[float, ...] = SPEEDS, crop_seconds: float = 0.75) -> Crops:
    return Crops(Dataset(url, noise=True), seed=5, crop_seconds=crop_seconds, speeds=speeds)


def found_pitch(wave: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(wave.size), 8 * wave.size))
    return float(spectrum.argmax()) * RATE / (8 * wave.size)


def test_each_source_is_played_at_one_of_the_speeds_and_the_noise_at_its_own(stored: str) -> None:
    feed, drawn = crops(stored), Counter[tuple[float, float]]()
    for position in range(90):
        item = feed.item(position, [])
        sizes = {wave.size for wave in item.members.values()}
        pitches = {name: found_pitch(wave) for name, wave in item.members.items()}
        assert pitches["noise"] == pytest.approx(1300, abs=2)
        found = [pitches[name] / PITCHES[name] for name in ("s1", "s2")]
        near = [min(SPEEDS, key=lambda one, ratio=ratio: abs(one - ratio)) for ratio in found]
        assert found == pytest.approx(near, abs=3e-3)
        drawn[near[0], near[1]] += 1
        # 4000 samples last 4000 / speed; SpeechBrain cuts to the shortest. The others fill a crop.
        short = min(4000, *(round(4000 / speed) for speed in near))
        assert sizes == ({short} if item.id == "u0" else {6000})
        mixture = collate([item], range(1)).mixture[0].numpy()
        np.testing.assert_array_equal(mixture, sum(item.members.values()))
    assert len(drawn) == 9, "all pairs of speeds occur"


def test_a_source_at_speed_1_is_the_stored_audio_at_the_place_of_the_crop(stored: str) -> None:
    feed, plain, as_stored = crops(stored), crops(stored, ()), waves(1, ("noise",))["noise"]
    for position in range(12):
        item = feed.item(position, [])
        start = 0
        if item.id != "u0":
            noise = item.members["noise"] * 2**15
            whole = np.rint(as_stored.astype(np.float64) * 2**15)
            start = next(
                i for i in range(4001) if np.array_equal(whole[i : i + noise.size], np.rint(noise))
            )
        for name, rate in feed._rates(position).items():
            if rate == RATE:
                kept = waves(int(item.id[1:]), (name,))[name][start:][: item.members[name].size]
                np.testing.assert_allclose(item.members[name], kept, atol=2**-15)
    for position in range(6):
        one, other = crops(stored, (1.0,)).item(position, []), plain.item(position, [])
        assert one.id == other.id
        for name in other.members:
            np.testing.assert_array_equal(one.members[name], other.members[name])


def test_speeds_are_the_same_in_any_world_and_after_a_restart(stored: str) -> None:
    def found(rank: int, world_size: int, first: int, count: int) -> list[tuple[int, bytes]]:
        stream = TrainStream(
            {"main": crops(stored)},
            seed=5,
            num_virtual_shards=3,
            micro_batch=2,
            rank=rank,
            world_size=world_size,
            num_threads=2,
        )
        steps = stream.steps(first)
        batches = [batch for _ in range(count) for batch in next(steps)]
        stream.close()
        pairs = ((batch.positions.tolist(), batch.sources) for batch in batches)
        return [
            (position, row.numpy().tobytes())
            for positions, sources in pairs
            for position, row in zip(positions, sources, strict=True)
        ]

    whole = found(0, 1, 0, 4)
    assert sorted(row for rank in range(3) for row in found(rank, 3, 0, 4)) == whole
    assert found(0, 1, 2, 2) == whole[12:]


def test_what_is_no_sum_has_no_speeds(stored: str, tmp_path: Path) -> None:
    for names in (("mix",), ("s1", "s2", "noise", "mix"), ("s1", "s2", "noise", "e1", "e2")):
        url = write(tmp_path / "-".join(names), names)
        with pytest.raises(DataError, match="only a sum of sources can be made anew"):
            crops(url)
    for speeds in ((0.0,), (0.4, 1.0), (1.0, 3.0)):
        with pytest.raises(ValueError, match=r"give one or more from 0\.5 to 2"):
            crops(stored, speeds)


def test_data_train_and_every_extra_set_have_speeds_of_their_own(
    stored: str, tmp_path: Path
) -> None:
    cfg = TrainConfig(sample_rate=RATE)
    cfg.data.train = cfg.data.validation = stored
    cfg.data.noise = True
    extra = [ExtraConfig(name, stored, speeds=speeds) for name, speeds in (("a", [1.1]), ("b", []))]
    cfg.data.speeds, cfg.data.extra = [0.95, 1.05], extra
    feeds, _ = open_datasets(cfg)
    given = {name: [*feed.speeds] for name, feed in feeds.items()}  # type: ignore[attr-defined]
    assert given == {"main": [0.95, 1.05], "a": [1.1], "b": []}
    cfg.data.mixing = {"_target_": "sepdist.data.dynamic.DynamicMixing"}
    cfg.data.noise = False
    with pytest.raises(ConfigError, match=r"data\.speeds are of stored mixtures; with mixing, set"):
        open_datasets(cfg)
