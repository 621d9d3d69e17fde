"""Runs and loaders survive slow, busy, resetting or restarting storage, with the same bits.

After a bounded wait they end with one error that names the endpoint and what to do.
"""

import hashlib
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sepdist import storage
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset
from sepdist.data.stream import TrainStream
from sepdist.storage import StorageError
from sepdist.training import checkpoint
from sepdist.training.checkpoint import Checkpointer, collect_orphans, find_committed, load_newest
from sepdist.training.ledger import APPLIED, read_history
from tests.support import toy
from tests.support.checkpoints import assert_equal, checkpointer, snapshot
from tests.support.s3server import FaultyProxy, S3Server, free_ports

NUM_STEPS = 12
SIZES = (1,) * 24


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.05)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPDIST_STORAGE_PATIENCE_SECONDS", "0.02")
    monkeypatch.setenv("SEPDIST_STORAGE_TIMEOUT_SECONDS", "2")


class Dice:
    """Spoil one request in five, chosen by a hash, at most three times in a row."""

    def __init__(self, seed: int, faults: tuple[str, ...]) -> None:
        self.seed = seed
        self.faults = faults
        self.tries: Counter[str] = Counter()
        self.in_a_row: Counter[str] = Counter()

    def __call__(self, number: int, line: str) -> str:
        # The same requests have the same faults in every run of the test.
        line = re.sub(r"-[0-9a-f]{8}|test-\d+", "", line)
        self.tries[line] += 1
        thrown = hashlib.sha256(f"{self.seed} {line} {self.tries[line]}".encode()).digest()
        if thrown[0] % 5 or self.in_a_row[line] == 3:
            self.in_a_row[line] = 0
            return ""
        self.in_a_row[line] += 1
        return self.faults[thrown[1] % len(self.faults)]


@pytest.fixture
def through(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., FaultyProxy]]:
    """Send the following requests through a proxy with these faults."""
    proxies = []

    def start(fault: Callable[[int, str], str]) -> FaultyProxy:
        proxies.append(FaultyProxy(s3_env.ports["s3"], fault))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].endpoint)
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


def num_faults(proxy: FaultyProxy) -> int:
    return sum(not line.endswith("HTTP/1.1") for line in proxy.requests)


class Outage:
    """Kill the server before request `number` of a kind; restart it when a client has noticed."""

    def __init__(self, server: S3Server, number: int, method: str) -> None:
        self.server, self.number, self.method = server, number, method
        self.seen = 0
        self.reached, self.killed, self.met = (threading.Event() for _ in range(3))

    def __call__(self, number: int, line: str) -> str:
        self.seen += line.startswith(self.method)
        if self.seen > self.number and not self.reached.is_set():
            self.reached.set()
            assert self.killed.wait(60)
            return ""  # forwarded into the void
        if self.killed.is_set():
            self.met.set()
        return ""

    def happen(self) -> None:
        """Wait for the request, then restart the server, which must be this thread's child."""
        assert self.reached.wait(60)
        self.server.kill()
        try:
            self.killed.set()
            assert self.met.wait(60)  # the first try after the failed one
        finally:
            self.server.start()


def write_run(run_dir: str) -> Checkpointer:
    """A start, three checkpoints with removals, and an end."""
    load_newest(run_dir)
    collect_orphans(run_dir)
    writer = checkpointer(run_dir, keep_last=1)
    for step in (1, 2, 3):
        writer.save(snapshot(step))
    writer.close()
    return writer


@pytest.mark.parametrize("fault", ["delay:0.05", "503", "reset", "lose", "cut", "all"])
def test_a_run_writes_and_reads_its_checkpoints_through_any_fault_that_passes(
    fault: str, bucket: str, through: Callable[..., FaultyProxy]
) -> None:
    faults = ("delay:0.05", "503", "reset", "lose", "cut") if fault == "all" else (fault,)
    proxy, run_dir = through(Dice(0, faults)), f"s3://{bucket}/run"
    writer = write_run(run_dir)
    assert_equal(load_newest(run_dir), snapshot(3))
    assert writer.num_failed == 0 and num_faults(proxy) > 5
    folder = f"{run_dir}/checkpoints"
    (only,), (name,) = find_committed(folder), storage.list_names(folder)
    assert only.step == 3 and only.url == f"{folder}/{name}"


def test_a_server_that_restarts_in_the_middle_of_a_save_costs_nothing(
    bucket: str,
    s3_env: S3Server,
    through: Callable[..., FaultyProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.5)
    outage = Outage(s3_env, 2, "PUT")
    through(outage)
    writer = checkpointer(f"s3://{bucket}/run")
    writer.save(snapshot(1))
    outage.happen()
    writer.close()
    assert writer.num_failed == 0
    assert_equal(load_newest(f"s3://{bucket}/run"), snapshot(1))


def test_a_checkpoint_that_cannot_be_written_is_counted_and_the_run_goes_on(
    bucket: str,
    impatient: None,
    through: Callable[..., FaultyProxy],
    caplog: pytest.LogCaptureFixture,
) -> None:
    busy, run_dir = threading.Event(), f"s3://{bucket}/run"

    def fault(number: int, line: str) -> str:
        return "503" if busy.is_set() and line.startswith("PUT") and "optimizer" in line else ""

    through(fault)
    writer = checkpointer(run_dir)
    writer.save(snapshot(1))
    writer.wait()
    busy.set()
    for step in (2, 3):
        writer.save(snapshot(step))
    with pytest.raises(StorageError):
        writer.wait()
    assert_equal(load_newest(run_dir), snapshot(1))
    busy.clear()
    writer.save(snapshot(4))
    writer.close()
    assert writer.num_failed == 2
    assert "(checkpoint not written; the run goes on" in caplog.text
    assert_equal(load_newest(run_dir), snapshot(4))
    assert [name[:14] for name in storage.list_names(f"{run_dir}/checkpoints")] == [
        "step-000000001",
        "step-000000004",
    ]


def test_checkpoints_that_fail_for_too_long_end_the_run_with_endpoint_and_advice(
    bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    writer = checkpointer(f"s3://{bucket}/run")
    for step in (1, 2):
        writer.save(snapshot(step))
        writer.settle(also_failing=True)
    writer._patience.seconds = 0.0  # ten minutes later
    writer.save(snapshot(3))
    with pytest.raises(StorageError) as caught:
        writer.settle(also_failing=True)
    message = str(caught.value)
    assert f"{endpoint} cannot be reached" in message and "check AWS_ENDPOINT_URL" in message
    assert "training.storage_patience_seconds=0 are over, the run ends" in message
    for call in (lambda: writer.save(snapshot(4)), writer.close):
        with pytest.raises(StorageError, match="the run ends"):
            call()


def test_while_storage_is_away_checkpoints_wait_in_the_background_and_only_the_newest(
    bucket: str,
    s3_env: S3Server,
    through: Callable[..., FaultyProxy],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = threading.Event()
    away.set()
    monkeypatch.setattr(storage, "FAILING_SECONDS", 0.1)
    through(lambda number, line: "reset" if away.is_set() else "")
    writer, snapshots = checkpointer(f"s3://{bucket}/run"), [snapshot(n) for n in range(1, 6)]
    for one in snapshots:
        one.ledger = [[[[one.step, 1, 1, APPLIED, [[one.step, one.step + 1]]]]]]
    with storage.patient(60, whole_process=True):
        writer.save(snapshots[0])
        deadline = time.monotonic() + 30
        while not storage.failing():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for one in snapshots[1:]:  # none of these waits for the storage
            writer.save(one)
        away.clear()
        writer.close()
    assert [one.step for one in find_committed(writer.folder)] == [1, 5]
    assert writer.num_failed == 3 and "step 4 gives way to a newer one" in caplog.text
    consumed = [step for step, *_ in read_history(f"s3://{bucket}/run", writer.previous)]
    assert sorted(consumed) == [1, 2, 3, 4, 5], "what the others had consumed is in the ledger"


def test_the_last_checkpoint_of_a_run_is_never_given_up_in_silence(
    bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpointer(f"s3://{bucket}/run")
    writer.save(snapshot(1))
    writer.wait()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    writer.save(snapshot(2))
    with pytest.raises(StorageError, match="check AWS_ENDPOINT_URL"):
        writer.close()


@pytest.mark.parametrize("name", ["model.safetensors", "model.yaml", "COMMIT"])
def test_the_last_checkpoint_of_a_run_is_read_back(name: str, tmp_path: Path) -> None:
    writer = checkpointer(tmp_path)
    writer.save(snapshot(1))
    writer.wait()
    victim = next((tmp_path / "checkpoints").iterdir()) / name
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} is damaged"):
        writer.close()


def test_a_disk_that_fills_up_is_survived_as_soon_as_there_is_room(small_disk: Path) -> None:
    writer = checkpointer(small_disk, keep_last=1)
    writer.save(snapshot(1))
    writer.wait()
    ballast = small_disk / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    writer.save(snapshot(2))
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        writer.wait()
    # What there was of it does not keep the disk full.
    assert len(storage.list_names(small_disk / "checkpoints")) == 1
    ballast.unlink()
    writer.save(snapshot(3))
    writer.close()
    assert writer.num_failed == 1
    assert_equal(load_newest(str(small_disk)), snapshot(3))


# The loader.


def batches(
    url: str, cache_dir: Path, during: Callable[[], None] = lambda: None
) -> list[list[torch.Tensor]]:
    """Read all tensors of some steps in a thread, from an empty cache, while `during` runs here."""

    def read() -> list[list[torch.Tensor]]:
        dataset = Dataset(url, noise=True, cache_dir=str(cache_dir), cache_gigabytes=1e-6)
        feeds = {"main": Crops(dataset, seed=5, crop_seconds=64 / toy.RATE)}
        options = {"num_virtual_shards": 2, "micro_batch": 2, "rank": 0, "world_size": 1}
        options |= {"seed": 5, "num_threads": 2, "prefetch_steps": 1}
        stream = TrainStream(feeds, **options)  # type: ignore[arg-type]
        steps, found = stream.steps(0), []
        try:
            for one in (batch for _ in range(NUM_STEPS) for batch in next(steps)):
                assert one.sources is not None and one.noise is not None
                found.append([one.positions, one.lengths, one.mixture, one.sources, one.noise])
        finally:
            steps.close()
            stream.close()
        return found

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        during()
        return reading.result()


@pytest.fixture
def data_set(bucket: str, tmp_path: Path) -> tuple[str, list[list[torch.Tensor]]]:
    """A data set on S3, and the undisturbed batches of the same one on disk."""
    toy.write(f"s3://{bucket}/toy", SIZES)
    toy.write(tmp_path / "toy", SIZES)
    return f"s3://{bucket}/toy", batches(str(tmp_path / "toy"), tmp_path / "unused")


def assert_same_bits(found: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> None:
    assert len(found) == len(wanted) == 2 * NUM_STEPS
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loader_gives_the_same_bits_through_any_fault_that_passes(
    seed: int,
    data_set: tuple[str, list[list[torch.Tensor]]],
    through: Callable[..., FaultyProxy],
    tmp_path: Path,
) -> None:
    url, wanted = data_set
    proxy = through(Dice(seed, ("delay:0.05", "503", "reset", "lose", "cut")))
    assert_same_bits(batches(url, tmp_path / "cache"), wanted)
    assert num_faults(proxy) > 5


def test_the_loader_goes_on_through_a_restart_of_the_server(
    data_set: tuple[str, list[list[torch.Tensor]]],
    s3_env: S3Server,
    through: Callable[..., FaultyProxy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.5)
    url, wanted = data_set
    outage = Outage(s3_env, 8, "GET")
    through(outage)
    assert_same_bits(batches(url, tmp_path / "cache", outage.happen), wanted)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "answered 503 SlowDown after 2 attempts in 0 s; the service is busy"),
        ("reset", "check the network"),
        ("delay:9", "no answer within 2 s"),
    ],
)
def test_a_loader_without_storage_ends_with_endpoint_and_advice(
    fault: str,
    message: str,
    data_set: tuple[str, list[list[torch.Tensor]]],
    impatient: None,
    through: Callable[..., FaultyProxy],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    proxy = through(lambda number, line: fault if ".tar" in line and number > 6 else "")
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError) as caught:
        batches(data_set[0], tmp_path / "cache")
    assert all(text in str(caught.value) for text in (data_set[0], proxy.endpoint, message))
