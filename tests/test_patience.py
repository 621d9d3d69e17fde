"""Storage waits for faults that pass: for how long, for which, and who decides."""

import errno
import functools
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import botocore.session
import pytest

from sepdist import storage
from sepdist.storage import StorageError
from tests.support.s3server import FaultyProxy, S3Server, free_ports

LOADER = functools.cache(botocore.session.create_loader)  # parses its files once: 0.1 s each time


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(botocore.session, "create_loader", LOADER)
    monkeypatch.delenv("SEPDIST_STORAGE_PATIENCE_SECONDS", raising=False)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """Let the next flushes to disk fail with these errors; returns the calls that are to come."""
    flush = os.fsync

    def start(*numbers: int) -> list[int]:
        left = list(numbers)

        def fail(handle: int) -> None:
            if left:
                raise OSError(number := left.pop(0), os.strerror(number))
            flush(handle)

        monkeypatch.setattr(os, "fsync", fail)
        return left

    yield start


def num_attempts(function: Callable[[], object]) -> int:
    """Count the tries of a call that fails each time."""
    with pytest.raises(StorageError) as caught:
        function()
    found = re.search(r"after (\d+) attempts", str(caught.value))
    return int(found[1]) if found else 1


@pytest.fixture
def refused(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the tries of a read from an endpoint that refuses connections."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    return lambda: num_attempts(lambda: storage.read_bytes("s3://bucket/x"))


def test_patience_is_of_the_thread_then_of_the_variable_then_of_the_process(
    refused: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(refused).result()

    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.3)
    assert refused() > 2 and elsewhere() > 2
    with storage.patient(0):
        assert refused() == 1 and elsewhere() > 2
    with storage.patient(0, whole_process=True):
        assert refused() == 1 and elsewhere() == 1
        with storage.patient(0.3):
            assert refused() > 2 and elsewhere() == 1
        monkeypatch.setenv("SEPDIST_STORAGE_PATIENCE_SECONDS", "0.3")
        assert refused() > 2 and elsewhere() > 2
        with storage.patient(0):
            assert refused() == 1
    monkeypatch.setenv("SEPDIST_STORAGE_PATIENCE_SECONDS", "0")
    assert refused() == 1 and elsewhere() == 1
    with suppress(KeyError), storage.patient(0.3), storage.patient(0.3, whole_process=True):
        raise KeyError
    assert refused() == 1 and elsewhere() == 1


@pytest.mark.parametrize("given", ["five minutes", "-1", "1e3", "nan"])
def test_seconds_that_are_no_number_are_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPDIST_STORAGE_PATIENCE_SECONDS", given)
    wanted = f"SEPDIST_STORAGE_PATIENCE_SECONDS={given}: give a number of seconds"
    with pytest.raises(ValueError, match=wanted):
        storage.exists("s3://bucket/x")


def test_a_service_that_is_away_is_waited_for_and_said_once_a_minute(
    bucket: str,
    s3_env: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    port, back, tries = free_ports(1)[0], threading.Event(), [0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    sleep = storage.time.sleep

    def sleeping(seconds: float) -> None:
        tries[0] += 1
        if tries[0] == 4:  # refused four times
            back.set()
            assert listening.wait(60)
        sleep(min(seconds, 0.01))

    listening = threading.Event()
    proxies = []

    def come_back() -> None:
        assert back.wait(60)
        proxies.append(FaultyProxy(s3_env.ports["s3"], lambda *_: "", port))
        listening.set()

    monkeypatch.setattr(storage.time, "sleep", sleeping)
    thread = threading.Thread(target=come_back)
    thread.start()
    with caplog.at_level(logging.WARNING):
        storage.put_bytes(f"s3://{bucket}/x", b"late")
    thread.join()
    assert storage.read_bytes(f"s3://{bucket}/x") == b"late"
    proxies[0].close()
    (said,) = [one for one in caplog.messages if "trying again" in one]
    assert f"127.0.0.1:{port} cannot be reached" in said and "for 60 s" in said


def test_a_host_without_an_address_may_get_one(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:8333")

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with storage.patient(0.1):
        assert num_attempts(lambda: storage.read_bytes("s3://bucket/x")) > 1


def test_an_upload_that_has_failed_is_not_waited_for_again_to_be_aborted(
    bucket: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 1000)
    proxy = FaultyProxy(
        s3_env.ports["s3"],
        lambda _, line: "503" if "partNumber=2" in line or line.startswith("DELETE") else "",
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    with storage.patient(0.1), pytest.raises(StorageError, match=r"answered 503 .* attempts"):
        storage.put_bytes(f"s3://{bucket}/x", bytes(3000))
    proxy.close()
    assert len([one for one in proxy.requests if "partNumber=2" in one]) > 1
    assert len([one for one in proxy.requests if one.startswith("DELETE")]) == 1


# Disks.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_disk_is_waited_for_if_a_caller_is_patient(
    number: int, failing: Callable[..., list[int]], tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "x"
    source.write_bytes(b"new")
    for put in (
        lambda: storage.put_bytes(target, b"new"),
        lambda: storage.put_file(source, target),
        lambda: storage.fetch_file(source, target),
        lambda: storage.put_bytes(target, b"new", create_only=True),
    ):
        target.write_bytes(b"old")
        failing(number)
        with pytest.raises(StorageError, match=re.escape(f"{target}: {os.strerror(number)}")):
            put()
        assert target.read_bytes() == b"old"
        target.unlink()
        for whole_process in (False, True):
            left = failing(number, number)
            with storage.patient(60, whole_process=whole_process):
                put()
            assert not left and target.read_bytes() == b"new"
            target.unlink()
    assert os.listdir(tmp_path) == ["source"]


def test_a_create_only_put_whose_folder_cannot_be_flushed_is_not_taken_for_anothers(
    failing: Callable[..., list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, calls = storage._flush, [0]

    def second_fails(path: Path) -> None:
        calls[0] += 1
        if calls[0] == 2:  # the content is flushed, and the name is given
            raise OSError(errno.EIO, "Input/output error")
        flush(path)

    monkeypatch.setattr(storage, "_flush", second_fails)
    with storage.patient(60):
        storage.put_bytes(tmp_path / "COMMIT", b"mine", create_only=True)
    assert (tmp_path / "COMMIT").read_bytes() == b"mine" and calls == [4]
    with storage.patient(60), pytest.raises(FileExistsError):
        storage.put_bytes(tmp_path / "COMMIT", b"mine", create_only=True)


def test_what_does_not_pass_is_not_waited_for(
    failing: Callable[..., list[int]], tmp_path: Path
) -> None:
    for number in (errno.EACCES, errno.EROFS, errno.EFBIG):
        failing(number)
        with storage.patient(60), pytest.raises(StorageError, match=os.strerror(number)):
            storage.put_bytes(tmp_path / "x", b"")


def test_a_full_disk_is_waited_for_until_there_is_room_also_while_fetching(
    bucket: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballast, sleep = small_disk / "ballast", storage.time.sleep
    data = bytes(100_000)
    storage.put_bytes(f"s3://{bucket}/x", data)
    for put in (
        lambda: storage.put_bytes(small_disk / "x", data),
        lambda: storage.fetch_file(f"s3://{bucket}/x", small_disk / "x"),
    ):
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

        def make_room(seconds: float) -> None:
            assert os.listdir(small_disk) == ["ballast"]  # nothing that keeps it full
            ballast.unlink()
            sleep(0.01)

        monkeypatch.setattr(storage.time, "sleep", make_room)
        with storage.patient(60):
            put()
        assert (small_disk / "x").read_bytes() == data and not ballast.exists()
        (small_disk / "x").unlink()


# Places.


def test_one_place_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in ("s3://b/x", "s3://b/x/", "s3://b//x", "s3://b///x//"):
        assert storage.absolute(one) == "s3://b/x"
    assert storage.absolute("s3://b/") == storage.absolute("s3://b//") == "s3://b"
    for other in ("s3://b/x/y", "s3://b/X", "s3://c/x", "b/x", "/b/x"):
        assert storage.absolute(other) != "s3://b/x"
    (tmp_path / "real" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for one in ("real/run", "link/run/", "real/./run", "link/../real/run", "~/real//run"):
        assert storage.absolute(one) == storage.absolute(tmp_path / "real" / "run")
    assert storage.absolute("link/absent") == storage.absolute("real/absent")


# Pipes.


def test_neither_a_pipe_nor_a_device_is_waited_for_or_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "file").write_bytes(b".")
    for name in ("pipe", "null"):
        place = tmp_path / name
        assert storage.exists(place) and storage.size(place) == 0
        for function in (
            lambda place: storage.read_bytes(place),
            lambda place: storage.put_file(place, tmp_path / "copy"),
            lambda place: storage.fetch_file(place, tmp_path / "copy"),
            lambda place: storage.put_file(place, "s3://bucket/x"),
            lambda place: storage.put_bytes(place, b""),
            lambda place: storage.fetch_file(tmp_path / "file", place),
        ):
            with pytest.raises(StorageError, match=f"{name}: a pipe or device"):
                function(place)
    assert sorted(os.listdir(tmp_path)) == ["file", "null", "pipe"]
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "null").is_char_device()


def test_a_key_that_is_refused_may_be_renewed_while_a_run_waits_and_nowhere_else(
    bucket: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, url = os.environ["AWS_SECRET_ACCESS_KEY"], f"s3://{bucket}/x"
    storage.put_bytes(url, b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
    with pytest.raises(StorageError, match="rejected the key"), storage.patient(30):
        storage.read_bytes(url)
    waited: list[int] = []

    def renew() -> None:
        waited.append(1)
        if len(waited) == 3:
            os.environ["AWS_SECRET_ACCESS_KEY"] = secret

    with storage.patient(30, whole_process=True, waiting=renew):
        assert storage.read_bytes(url) == b"x"
    assert len(waited) == 3
