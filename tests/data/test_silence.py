"""Silent sources: drawn again where another crop has a sound, counted, and storable if declared.

Oracles read whole samples and compare windows by hand; places come from the raw draws.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sepdist.corpora.stored import Stored
from sepdist.data import shards
from sepdist.data.crops import Crops, Damage
from sepdist.data.dataset import Dataset, Item, num_silent
from sepdist.data.dynamic import DynamicMixing
from sepdist.data.members import DataError
from sepdist.data.records import Mixture, Utterance
from sepdist.data.stream import TrainStream
from sepdist.metrics.si_snr import silent_sources
from sepdist.seeding import rng
from tests.support.shard_sets import write_shard

RATE = 8000
CROP = 800  # 0.1 s
NUM = 12


def speech(number: int, num_samples: int, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Noise in [first, stop), zeros elsewhere, in whole 16-bit steps."""
    wave = np.zeros(num_samples, np.float32)
    stop = num_samples if stop is None else stop
    steps = np.random.default_rng(number).integers(-3000, 3000, stop - first)
    wave[first:stop] = steps.astype(np.float32) / 2**15
    return wave


def max_mode(number: int) -> dict[str, np.ndarray]:
    """The second speaker ends after the first quarter."""
    return {"s1": speech(number, 8000), "s2": speech(number + 100, 8000, 0, 2000)}


def pause_at_an_offset(number: int) -> dict[str, np.ndarray]:
    """The first speaker pauses in the middle, where the recorder's offset remains."""
    wave = speech(number, 8000)
    wave[1500:6500] = 0.25
    return {"s1": wave, "s2": speech(number + 100, 8000)}


def three_in_turn(number: int) -> dict[str, np.ndarray]:
    """Three speakers who overlap in [3500, 4500) alone; a lively noise does not help."""
    ends = ((0, 4500), (3500, 8000), (2000, 6000))
    waves = {f"s{i + 1}": speech(number + i, 8000, *end) for i, end in enumerate(ends)}
    return waves | {"noise": speech(number + 9, 8000)}


def unknown_sources(number: int) -> dict[str, np.ndarray]:
    """A mixture alone, of which two thirds are silent."""
    return {"mix": speech(number, 9000, 0, 3000)}


def write(
    url: Path,
    members: Callable[[int], dict[str, np.ndarray]],
    count: int = NUM,
    **options: bool,
) -> str:
    def record(number: int) -> Mixture:
        num_speakers = len([name for name in members(number) if name[0] == "s"])
        speakers = tuple(f"v{number}-{i}" for i in range(num_speakers))
        return Mixture(f"m{number}", speakers, RATE, partial(members, number), **options)

    sizes = (count // 2, count - count // 2)
    groups = [range(sizes[0]), range(sizes[0], count)]
    infos = [
        write_shard([record(n) for n in group], url, shards.shard_name("toy", "train", i))
        for i, group in enumerate(groups)
    ]
    shards.write_manifest(url, "toy", "train", RATE, infos)
    return str(url)


def references(item: Item) -> list[np.ndarray]:
    return [wave for name, wave in item.members.items() if name != "noise"]


def flat(wave: np.ndarray) -> bool:
    return bool((wave == wave[0]).all())


def the_other_way_round(number: int) -> dict[str, np.ndarray]:
    s1, s2 = max_mode(number).values()
    return {"s1": s2, "s2": s1}


KINDS = {
    "max mode": (max_mode, {}),
    "an offset": (pause_at_an_offset, {}),
    "three in turn": (three_in_turn, {"num_sources": 3, "noise": True}),
    "one of two": (the_other_way_round, {"num_sources": 1}),
    "no sources": (unknown_sources, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_starts_at_the_first_drawn_place_where_every_source_sounds(
    kind: str, tmp_path: Path
) -> None:
    members, options = KINDS[kind]
    dataset = Dataset(write(tmp_path, members), **options)  # type: ignore[arg-type]
    crops, num_again = Crops(dataset, seed=4, crop_seconds=CROP / RATE), 0
    names = dataset.members
    for position in range(2 * NUM):
        item = crops.item(position, [])
        whole = {name: members(int(item.id[1:]))[name] for name in names}
        spare = len(next(iter(whole.values()))) - CROP
        raw = [int(one) for one in rng(4, "crop", position).bit_generator.random_raw(100)]
        starts = [one % (spare + 1) for one in raw]
        sounding = [
            start
            for start in starts
            if not any(
                flat(wave[start : start + CROP]) for name, wave in whole.items() if name != "noise"
            )
        ]
        num_again += sounding[0] != starts[0]
        for name, wave in item.members.items():
            np.testing.assert_array_equal(wave, whole[name][sounding[0] :][:CROP])
        assert not any(flat(wave) for wave in references(item))
    assert num_again >= NUM // 2, "without another draw, a quarter of all crops or more"


def test_a_crop_without_silence_is_read_once_at_the_first_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = Crops(Dataset(write(tmp_path, max_mode)), seed=4, crop_seconds=CROP / RATE)
    read, calls = Dataset.read, []

    def counted(self: Dataset, *where: object) -> dict[str, np.ndarray]:
        calls.append(where[2:])
        return read(self, *where)  # type: ignore[arg-type]

    monkeypatch.setattr(Dataset, "read", counted)
    for position in range(NUM):
        calls.clear()
        crops.item(position, [])
        start = int(rng(4, "crop", position).bit_generator.random_raw()) % (8000 - CROP + 1)
        assert calls[0] == (start, start + CROP)
        assert calls[1:] == ([] if start < 2000 - 1 else [(0, 8000)]), "and once whole at most"


def rows(url: str, world_size: int, num_steps: int, **options: int) -> tuple[list[tuple], int]:
    """Position, id and bits of the sources of some steps, and the silent sources of all ranks."""
    found, count = [], 0
    for rank in range(world_size):
        feed = Crops(Dataset(url, **options), seed=2, crop_seconds=CROP / RATE)
        how = {"num_virtual_shards": 4, "micro_batch": 2, "num_threads": 2, "prefetch_steps": 3}
        stream = TrainStream({"main": feed}, seed=2, rank=rank, world_size=world_size, **how)
        steps = stream.steps(0)
        for batch in (batch for _ in range(num_steps) for batch in next(steps)):
            for row, position in enumerate(batch.positions.tolist()):
                found.append((position, batch.ids[row], batch.sources[row].numpy().tobytes()))
        count += stream.num_silent
        stream.close()
    return sorted(found), count


def test_what_stays_silent_is_the_first_crop_and_counted_the_same_in_any_world(
    tmp_path: Path,
) -> None:
    """Of five mixtures two have a source without any sound, and one is shorter than a crop."""

    def members(number: int) -> dict[str, np.ndarray]:
        size = 500 if number == 4 else 4000
        second = speech(number + 100, size) * (number not in (1, 3))
        return {"s1": speech(number, size), "s2": second}

    url = write(tmp_path, members, 5, may_be_silent=True)
    whole, count = rows(url, 1, 5)  # 40 positions: 8 epochs of 5
    assert len(whole) == 40 and count == 16
    for world_size in (2, 3):
        assert rows(url, world_size, 5) == (whole, count)
    for position, id_, bits in whole:
        if id_ in ("m1", "m3"):
            start = int(rng(2, "crop", position).bit_generator.random_raw()) % (4000 - CROP + 1)
            expected = speech(int(id_[1:]), 4000)[start : start + CROP]
            np.testing.assert_array_equal(np.frombuffer(bits, np.float32)[:CROP], expected)
    dataset = Dataset(url)
    batches = [dataset.full(number, 30.0) for number in range(5)]
    assert [batch.num_silent for batch in batches] == [0, 1, 0, 1, 0]
    for batch in batches:
        assert int(silent_sources(batch.sources).sum()) == batch.num_silent


def test_of_silent_crops_that_with_the_fewest_silent_sources_is_taken(tmp_path: Path) -> None:
    def in_turn(number: int) -> dict[str, np.ndarray]:
        """Two speakers who never overlap, and a pause of both."""
        return {"s1": speech(number, 8000, 0, 1500), "s2": speech(number + 100, 8000, 5000, 8000)}

    crops = Crops(Dataset(write(tmp_path, in_turn)), seed=4, crop_seconds=CROP / RATE)
    for position in range(2 * NUM):
        assert sum(map(flat, references(crops.item(position, [])))) == 1


# Dynamic mixing.


def utterances(
    url: Path, wave: Callable[[int], np.ndarray], count: int = 10, speaker: str = "v{}"
) -> str:
    records = [
        Utterance(f"u{n}", speaker.format(n % 5), RATE, partial(wave, n)) for n in range(count)
    ]
    info = write_shard(records, url, shards.shard_name("toy", "train", 0))
    shards.write_manifest(url, "toy", "train", RATE, [info])
    return str(url)


def mixing(url: str, **options: object) -> DynamicMixing:
    how: dict = {"seed": 3, "num_sources": 2, "crop_seconds": 0.5} | options
    return DynamicMixing(Dataset(url, num_sources=1), **how)


def seldom(number: int) -> np.ndarray:
    """A second of speech, at the beginning, in the middle or at the end of eight."""
    first = (0, 28000, 56000)[number % 3]
    return speech(number, 64000, first, first + RATE)


@pytest.mark.parametrize("speeds", [[1.0], [0.95, 1.0, 1.05]])
def test_dynamic_mixing_finds_the_sound_in_long_silence(
    speeds: list[float], tmp_path: Path
) -> None:
    made = mixing(utterances(tmp_path / "voices", seldom), speeds=speeds, num_sources=3)
    items = [made.item(position, []) for position in range(30)]
    assert not any(flat(wave) for item in items for wave in item.members.values())
    again = mixing(str(tmp_path / "voices"), speeds=speeds, num_sources=3)
    for position in (17, 4):  # by the position alone
        for name, wave in again.item(position, []).members.items():
            np.testing.assert_array_equal(wave, items[position].members[name])


def test_dynamic_mixing_draws_as_before_where_the_first_crop_sounds(tmp_path: Path) -> None:
    """Speed, place and level of each voice are the first draws, in turn."""
    made = mixing(utterances(tmp_path, partial(speech, num_samples=16000)), speeds=[1.0])
    for position in range(10):
        item = made.item(position, [])
        raw = rng(3, "dynamic mixing", position).bit_generator.random_raw(8)
        for number, (key, wave) in enumerate(
            zip(item.id.partition("@")[0].split("_"), item.members.values(), strict=True)
        ):
            place = (int(raw[3 * number + 1]) >> 11) * 2.0**-53
            source = speech(int(key[1:]), 16000)[int(place * 12001) :][:4000]
            gain = float(wave @ source) / float(source @ source)
            np.testing.assert_allclose(wave, gain * source, atol=1e-6)


def short(number: int) -> np.ndarray:
    return speech(number, 2400 if number == 6 else 8000)  # 0.3 s


def faint(number: int) -> np.ndarray:
    """One that is below the loudness gate though it has a sound: one sample of one step."""
    wave = np.zeros(8000, np.float32)
    wave[4000] = 2.0**-15
    return wave if number == 6 else speech(number, 8000)


@pytest.mark.parametrize(("wave", "reason"), [(short, r"0\.30 s, shorter"), (faint, "gate")])
def test_a_voice_without_a_loudness_gives_way_and_counts_as_a_damaged_sample(
    wave: Callable[[int], np.ndarray], reason: str, tmp_path: Path
) -> None:
    made = mixing(utterances(tmp_path, wave))
    options = {"num_virtual_shards": 1, "micro_batch": 10, "rank": 0, "world_size": 1}
    stream = TrainStream({"main": made}, seed=3, max_damaged=1, **options)
    steps = stream.steps(0)
    ids = [id_ for _ in range(3) for batch in next(steps) for id_ in batch.ids]
    assert len(ids) == 30 and not any("u6" in id_.partition("@")[0].split("_") for id_ in ids)
    assert stream.num_damaged == 1
    stream.close()
    strict = TrainStream({"main": mixing(str(tmp_path))}, seed=3, **options)
    with pytest.raises(DataError, match=rf"u6: .*{reason}.*data\.max_damaged=0 are allowed"):
        next(strict.steps(0))
    strict.close()


def test_a_noise_without_a_loudness_gives_way_and_a_silent_crop_of_noise_is_kept(
    tmp_path: Path,
) -> None:
    def noise(number: int) -> np.ndarray:
        return short(number) if number > 5 else seldom(number)

    url = utterances(tmp_path / "noise", noise, speaker="noise{}")
    voices = utterances(tmp_path / "voices", partial(speech, num_samples=16000))
    made, damages = mixing(voices, noise=url), list[Damage]()
    items = [made.item(position, damages) for position in range(20)]
    assert {damage.key for damage in damages} == {"u6"}
    assert not any("u6" in item.id.partition("@")[0].split("_")[2:] for item in items)
    assert sum(flat(item.members["noise"]) for item in items) > 5


# Storing.


@pytest.mark.parametrize("silent", [("s2",), ("s1", "s3"), ("noise",)])
def test_silent_members_are_stored_where_the_record_says_that_they_may_be_silent(
    silent: tuple[str, ...], tmp_path: Path
) -> None:
    def members(number: int) -> dict[str, np.ndarray]:
        waves = {name: speech(number, 900) for name in ("s1", "s2", "s3", "noise")}
        return waves | {name: 0 * waves[name] for name in silent if number == 1}

    with pytest.raises(DataError, match=rf"record 'm1', {silent[0]}: silent"):
        write(tmp_path / "undeclared", members, 4)
    url = write(tmp_path / "declared", members, 4, may_be_silent=True)
    assert shards.verify(url) == []
    dataset = Dataset(url, num_sources=3, noise=True)
    for number in range(4):
        batch = dataset.full(number, 30.0)
        found = [*batch.sources[0], batch.noise[0]]
        expected = members(number).values()
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        marked = dataset.metadata(number).get("silent", [])
        assert marked == (list(silent) if number == 1 else [])
    copied = [*Stored(url).records("train")]  # a data set made of it keeps them
    info = write_shard(copied, tmp_path / "copied", "x.tar")
    shards.write_manifest(tmp_path / "copied", "toy", "train", RATE, [info])
    assert shards.verify(tmp_path / "copied") == []
    assert Dataset(str(tmp_path / "copied"), num_sources=3).metadata(1)["silent"] == list(silent)


@pytest.mark.parametrize(
    ("waves", "reason"),
    [
        ({"s1": np.zeros(900), "s2": np.zeros(900)}, "all its sources are silent"),
        ({"s1": np.zeros(900), "s2": np.zeros(900), "noise": speech(1, 900)}, "all its sources"),
        ({"mix": np.zeros(900)}, "all its sources are silent"),
        ({"s1": speech(1, 900), "s2": np.full(900, np.nan)}, "s2: NaN"),
    ],
)
def test_a_mixture_of_silence_alone_is_never_stored(
    waves: dict[str, np.ndarray], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"record 'm0'.*{reason}"):
        write(tmp_path, lambda number: waves, 2, may_be_silent=True)


def test_a_silent_utterance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="record 'u0', s1: silent"):
        utterances(tmp_path, lambda number: np.zeros(900, np.float32), 1)


def test_torch_and_numpy_agree_on_what_is_silent() -> None:
    step = 2.0**-15
    waves = [0, 0.25, -0.7]
    loud = [np.full(90, one, np.float32) for one in waves]
    for first, second in ((0, step), (0.5, 0.5 + step), (-step, step), (0, 3 * step)):
        loud.append(np.array([first] * 89 + [second], np.float32))
    counts = [num_silent({"s1": wave}) for wave in loud]
    assert counts == [1, 1, 1, 1, 1, 0, 0]
    assert silent_sources(torch.from_numpy(np.stack(loud))).int().tolist() == counts
