"""The training stream: every position once with the same audio at any world size."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sepdist.data import dataset as dataset_module
from sepdist.data import order as order_module
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset
from sepdist.data.members import DataError
from sepdist.data.order import Blend
from sepdist.data.records import Batch
from sepdist.data.stream import TrainStream
from tests.support import toy
from tests.support.s3server import FaultyProxy
from tests.support.streams import CROP, open_stream, rows, take

SIZES = MappingProxyType(
    {"one shard": (7,), "even": (4, 4, 4), "ragged": (1, 5, 2, 1, 3, 1, 1, 2, 4, 1)}
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    places = {name: str(tmp_path_factory.mktemp("sets") / "set") for name in SIZES}
    for name, sizes in SIZES.items():
        toy.write(places[name], sizes)
    return places


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.sampled_from([1, 2]),
    name=st.sampled_from(sorted(SIZES)),
    num_virtual_shards=st.integers(1, 5),
    micro_batch=st.integers(1, 3),
    legs=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(1, 3), st.integers(0, 3)),
        min_size=1,
        max_size=4,
    ),
)
def test_every_position_comes_once_with_the_same_audio_at_any_world_size_cut_and_thread_count(
    sets: dict[str, str],
    order: int,
    name: str,
    num_virtual_shards: int,
    micro_batch: int,
    legs: list[tuple[int, int, int, int]],
) -> None:
    dataset = Dataset(sets[name])
    shape = {"num_virtual_shards": num_virtual_shards, "micro_batch": micro_batch, "order": order}
    delivered: list[tuple[int, str, bytes]] = []
    step = 0
    for wanted_world, num_steps, num_threads, prefetch_steps in legs:
        world_size = min(wanted_world, num_virtual_shards)
        for rank in range(world_size):
            how = {"num_threads": num_threads, "prefetch_steps": prefetch_steps}
            delivered += rows(
                take(dataset, step, num_steps, rank=rank, world_size=world_size, **how, **shape)
            )
        step += num_steps
    total = step * num_virtual_shards * micro_batch
    assert sorted(position for position, _, _ in delivered) == list(range(total))
    plain, num_steps = {"num_threads": 1, "prefetch_steps": 0}, step
    if order == 1:  # which does not depend on the shape of a step
        shape, num_steps = {"num_virtual_shards": 1, "micro_batch": 1, "order": 1}, total
    assert sorted(delivered) == sorted(rows(take(dataset, 0, num_steps, **plain, **shape)))
    dataset.cache.close()


def test_a_batch_holds_the_crops_that_the_records_define(sets: dict[str, str]) -> None:
    dataset = Dataset(sets["ragged"], noise=True)
    starts: dict[int, set[int]] = {}
    for batches in take(dataset, 0, 60):
        assert len(batches) == 4
        for batch in batches:
            assert batch.sources is not None and batch.noise is not None
            assert batch.mixture.shape == (2, CROP) and batch.sources.shape == (2, 2, CROP)
            assert batch.mixture.dtype == batch.sources.dtype == torch.float32
            assert batch.lengths.dtype == torch.int64
            for i in range(2):
                number, start = toy.identify(float(batch.sources[i, 0, 0]))
                length = min(CROP, toy.num_samples(number))
                expected = {
                    name: toy.as_float(wave[start : start + length])
                    for name, wave in toy.members(number).items()
                }
                assert batch.ids[i] == f"mix-{number}"
                assert batch.speakers[i] == (f"anna{number}", "bertil")
                assert int(batch.lengths[i]) == length
                found = (*batch.sources[i], batch.noise[i])
                for name, wave in zip(("s1", "s2", "noise"), found, strict=True):
                    assert np.array_equal(wave[:length].numpy(), expected[name]), name
                    assert not wave[length:].any()
                assert np.array_equal(batch.mixture[i, :length].numpy(), sum(expected.values()))
                starts.setdefault(number, set()).add(start)
    assert sorted(starts) == list(range(1, 22))
    for number, seen in starts.items():
        spare = max(0, toy.num_samples(number) - CROP)
        assert seen <= set(range(spare + 1))
        assert len(seen) > 5 or spare < 20  # about 23 draws each
    dataset.cache.close()


def test_noise_stays_out_unless_it_is_asked_for(sets: dict[str, str]) -> None:
    dataset = Dataset(sets["even"])
    batch = dataset.full(3, 1.0)
    clean = toy.members(4)["s1"] + toy.members(4)["s2"]
    assert batch.noise is None and np.array_equal(batch.mixture[0].numpy(), toy.as_float(clean))
    one = Dataset(sets["even"], num_sources=1).full(3, 1.0)
    assert one.sources is not None and one.sources.shape[:2] == (1, 1)
    assert np.array_equal(one.mixture[0].numpy(), toy.as_float(toy.members(4)["s1"]))


def test_full_items_come_in_the_order_of_the_manifest_and_are_cut_where_asked(
    sets: dict[str, str],
) -> None:
    dataset = Dataset(sets["ragged"], noise=True)
    batches = [dataset.full(number, 50 / toy.RATE) for number in range(21)]
    assert [batch.ids for batch in batches] == [[f"mix-{number + 1}"] for number in range(21)]
    for number, batch in enumerate(batches):
        length = min(50, toy.num_samples(number + 1))
        assert batch.mixture.shape == (1, length) and batch.lengths.tolist() == [length]
        assert batch.positions.tolist() == [number]
        mixture = sum(wave[:length] for wave in toy.members(number + 1).values())
        assert np.array_equal(batch.mixture[0].numpy(), toy.as_float(mixture))
    assert dataset.full(20, 1e6).mixture.shape == (1, toy.num_samples(21))
    for number in (-1, 21):
        with pytest.raises(IndexError, match=f"no sample {number}, it has 21"):
            dataset.full(number, 1.0)


def test_a_set_of_mixtures_alone_has_no_sources(tmp_path: Path) -> None:
    toy.write(tmp_path, (3, 2), names=("mix",))
    dataset = Dataset(str(tmp_path), num_sources=2, noise=True)
    batch = take(dataset, 0, 1)[0][0]
    assert batch.sources is None and batch.noise is None and batch.mixture.shape == (2, CROP)
    assert toy.identify(float(batch.mixture[0, 0]))[0] == int(batch.ids[0].removeprefix("mix-"))


def test_asking_for_members_that_the_data_set_lacks_says_what_it_has(tmp_path: Path) -> None:
    toy.write(tmp_path, (2,), names=("s1", "s2"))
    message = r"has no s3, noise, its samples have s1, s2; change num_sources or noise"
    with pytest.raises(DataError, match=message):
        Dataset(str(tmp_path), num_sources=3, noise=True)
    with pytest.raises(DataError, match="num_sources=0"):
        Dataset(str(tmp_path), num_sources=0)


@pytest.mark.parametrize(
    "changes", [{"crop_seconds": 0.0}, {"micro_batch": 0}, {"rank": 4, "world_size": 4}]
)
def test_a_stream_that_could_deliver_nothing_is_refused(
    sets: dict[str, str], changes: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=r"must be positive|rank 4 of 4"):
        open_stream(Dataset(sets["even"]), **changes)


# A step of 8 touches one or two epochs of 21, each of one permutation and up to two blocks: of the
# data set, or of each of four lanes.
@pytest.mark.parametrize(("order", "most_draws"), [(1, 6), (2, 18)])
def test_a_start_at_step_a_million_does_what_a_start_at_step_0_does(
    order: int, most_draws: int, sets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, read = order_module.rng, dataset_module.read_sample
    counts = {"rng": 0, "read": 0}

    def count(what: str, function: object) -> object:
        def counted(*arguments: object) -> object:
            counts[what] += 1
            return function(*arguments)  # type: ignore[operator]

        return counted

    monkeypatch.setattr(order_module, "rng", count("rng", draw))
    monkeypatch.setattr(dataset_module, "read_sample", count("read", read))
    seen = []
    for first_step in (0, 10**6):
        counts |= {"rng": 0, "read": 0}
        dataset = Dataset(sets["ragged"])
        take(dataset, first_step, 1, prefetch_steps=0, num_threads=1, order=order)
        seen.append(dict(counts))
        dataset.cache.close()
    assert seen[0]["read"] == seen[1]["read"] == 8  # the samples of one step and no other
    assert max(one["rng"] for one in seen) <= most_draws


def test_resuming_at_a_step_gives_what_the_uninterrupted_stream_gives_there(
    sets: dict[str, str],
) -> None:
    dataset = Dataset(sets["ragged"])
    whole = list(rows(take(dataset, 0, 12)))
    assert list(rows(take(dataset, 7, 5))) == whole[7 * 8 :]


def test_waiting_for_data_is_measured_and_prefetched_data_is_not_waited_for(
    sets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, gate = dataset_module.read_sample, threading.Event()

    def gated(*arguments: object) -> object:
        assert gate.wait(30)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset_module, "read_sample", gated)
    stream = open_stream(Dataset(sets["even"]), prefetch_steps=3)
    assert stream.seconds_waited == 0.0
    steps = stream.steps(0)
    threading.Timer(0.3, gate.set).start()
    next(steps)
    assert 0.2 < stream.seconds_waited < 20
    idle = threading.Event()
    stream._decoders.submit(lambda: None)
    while stream._decoders._jobs.qsize():  # until all that was submitted ahead is decoded
        idle.wait(0.01)
    gate.clear()  # steps 1 to 3 are there, so these need no further reading
    before = stream.seconds_waited
    idle.wait(0.1)
    next(steps)
    assert stream.seconds_waited - before < 0.1
    gate.set()
    stream.close()


def test_an_exception_in_a_thread_reaches_the_consumer_at_the_step_that_needed_it(
    sets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset(sets["even"])
    wanted = take(dataset, 3, 1)[0][2].ids[1]
    read = dataset_module.read_sample

    def failing(file: object, sample: object, *rest: object) -> object:
        if getattr(sample, "key", "") == wanted:
            raise MemoryError("no memory for this one")
        return read(file, sample, *rest)  # type: ignore[arg-type]

    first = next(
        step
        for step, batches in enumerate(take(dataset, 0, 9))
        if any(wanted in batch.ids for batch in batches)
    )
    monkeypatch.setattr(dataset_module, "read_sample", failing)
    stream = open_stream(dataset, prefetch_steps=4)
    steps = stream.steps(0)
    for _ in range(first):
        next(steps)
    with pytest.raises(MemoryError, match="no memory for this one"):
        next(steps)
    stream.close()


@pytest.mark.parametrize("order", [1, 2])
def test_several_data_sets_come_in_batches_of_one_each_with_the_audio_that_each_gives_alone(
    order: int, sets: dict[str, str]
) -> None:
    def feeds() -> dict[str, Crops]:
        """One set as SE reads it and one as separation does, with different seeds."""
        se = Dataset(sets["even"], num_sources=1, noise=True)
        return {
            "main": Crops(Dataset(sets["ragged"]), seed=5, crop_seconds=CROP / toy.RATE),
            "se": Crops(se, seed=6, crop_seconds=CROP / toy.RATE),
        }

    blends: list[Blend] = []

    def run(world_size: int, **changes: object) -> list[Batch]:
        batches = []
        for rank in range(world_size):
            options = {"num_virtual_shards": 4, "micro_batch": 2, "world_size": world_size}
            options |= {"seed": 5, "rank": rank, "num_threads": 2, "order": order, **changes}
            stream = TrainStream(feeds(), **options)  # type: ignore[arg-type]
            blends.append(stream.blend)
            steps = stream.steps(0)
            batches += [batch for _ in range(10) for batch in next(steps)]
            stream.close()
        return sorted(batches, key=lambda batch: int(batch.positions[0]))

    alone, together = run(1), run(3)
    positions = [batch.positions.tolist() for batch in alone]
    assert positions == [[first, first + 1] for first in range(0, 80, 2)]
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids and one.data_set == other.data_set
        assert torch.equal(one.mixture, other.mixture)
    # 21 and 12 samples: 10 and 6 batches in every 16.
    for first in (0, 16):
        assert [batch.data_set for batch in alone[first : first + 16]].count("se") == 6
    for number, (name, crops) in enumerate(feeds().items()):
        crops.arrange(blends[0], number)
        found = [batch for batch in alone if batch.data_set == name]
        expected = [crops.item(position, []) for position in range(2 * len(found))]
        assert [id_ for batch in found for id_ in batch.ids] == [item.id for item in expected]
        for batch in found:
            assert batch.sources is not None
            assert batch.sources.shape[1] == {"main": 2, "se": 1}[name]
            assert (batch.noise is None) == (name == "main")
        audio = [batch.mixture[i, : batch.lengths[i]].numpy() for batch in found for i in range(2)]
        assert all(
            np.array_equal(wave, sum(item.members.values()))
            for wave, item in zip(audio, expected, strict=True)
        )
        crops.close()
    weighted = run(1, weights={"se": 3.0})
    assert [batch.data_set for batch in weighted].count("se") == 30
    evenly = [batch.data_set for batch in run(2, weights={"se": 1.0}, interleave="even")]
    assert evenly == ["main", "se"] * 20, "every step, and every rank of two, has both"


def test_the_digest_of_a_stream_is_that_of_its_set_or_names_all_with_their_shares(
    sets: dict[str, str],
) -> None:
    ragged, even = (
        Crops(Dataset(sets[name]), seed=0, crop_seconds=0.01) for name in ("ragged", "even")
    )
    options = {"seed": 0, "num_virtual_shards": 1, "micro_batch": 2, "rank": 0, "world_size": 1}
    alone = TrainStream({"main": ragged}, **options).digest()  # type: ignore[arg-type]
    both = TrainStream({"main": ragged, "more": even}, **options).digest()  # type: ignore[arg-type]
    assert alone == ragged.dataset.manifest.digest()
    assert both == f"10 main {alone} + 6 more {even.dataset.manifest.digest()}"
    options["interleave"] = "even"
    evenly = TrainStream({"main": ragged, "more": even}, **options)  # type: ignore[arg-type]
    assert evenly.digest() == f"{both}, even"


# Threads.


def own_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("decode", "shard"))]


def test_close_ends_the_threads_and_a_closed_stream_says_so(sets: dict[str, str]) -> None:
    before = own_threads()
    stream = open_stream(Dataset(sets["even"]), num_threads=3, prefetch_steps=8)
    steps = stream.steps(0)
    next(steps)
    assert len(own_threads()) == len(before) + 5
    stream.close()
    stream.close()
    assert own_threads() == before
    with pytest.raises(RuntimeError, match="threads were closed"):
        next(stream.steps(0))


def test_a_forgotten_stream_ends_its_threads_without_close(sets: dict[str, str]) -> None:
    gc.collect()  # threads of earlier tests
    before = own_threads()
    steps = open_stream(Dataset(sets["even"])).steps(0)
    next(steps)
    assert len(own_threads()) > len(before)
    del steps
    deadline = time.monotonic() + 20
    while len(own_threads()) > len(before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert len(own_threads()) <= len(before)


ABANDON = """
import sys
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset
from sepdist.data.stream import TrainStream
crops = Crops(Dataset(sys.argv[1], cache_dir=sys.argv[2]), seed=0, crop_seconds=0.008)
options = dict(num_virtual_shards=2, micro_batch=2, rank=0, world_size=1)
stream = TrainStream({"main": crops}, seed=0, num_threads=2, prefetch_steps=50, **options)
steps = stream.steps(0)
if sys.argv[3] == "read":
    next(steps)
else:
    import threading
    threading.Thread(target=next, args=(steps,), daemon=True).start()
    sys.stdin.readline()  # the test says when the threads hang in a download
print("leaving", flush=True)
raise SystemExit(3)
"""


@pytest.mark.parametrize("url", ["local", "stalled S3"])
def test_a_process_that_abandons_its_stream_ends_at_once(
    url: str,
    sets: dict[str, str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, how, stalled = sets["even"], "read", threading.Event()
    if url != "local":
        bucket = request.getfixturevalue("bucket")
        place, how = f"s3://{bucket}/toy", "hang"
        toy.write(place, (4, 4))
        released = threading.Event()
        request.addfinalizer(released.set)

        def stall(_: int, first_line: str) -> str:
            if ".tar" in first_line and first_line.startswith("GET"):
                stalled.set()
                released.wait(120)
            return ""

        proxy = FaultyProxy(request.getfixturevalue("s3_server").ports["s3"], stall)
        request.addfinalizer(proxy.close)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    command = [sys.executable, "-c", ABANDON, place, str(tmp_path / "cache"), how]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        if how == "hang":
            assert stalled.wait(90)
        began = time.monotonic()
        output, errors = process.communicate("go\n", timeout=90)
        assert (process.returncode, output) == (3, "leaving\n"), errors
        assert "Traceback" not in errors, errors
        assert how == "read" or time.monotonic() - began < 30  # not the minutes of all retries


def test_a_stream_from_object_storage_delivers_what_one_from_disk_does(
    sets: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    remote = f"s3://{bucket}/sets/ragged"
    toy.write(remote, SIZES["ragged"])
    there, here = Dataset(remote, cache_dir=str(tmp_path)), Dataset(sets["ragged"])
    assert there.manifest.digest() == here.manifest.digest()
    assert list(rows(take(there, 0, 6))) == list(rows(take(here, 0, 6)))
    for dataset in (there, here):
        dataset.cache.close()
