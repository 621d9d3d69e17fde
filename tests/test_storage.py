"""storage.py on a local disk and a real S3 server: contents, atomicity, and every fault."""

import errno
import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import sepdist
from sepdist import storage
from sepdist.storage import StorageError
from tests.support.s3server import ADMIN, READ_ONLY, FaultyProxy, S3Server, free_ports


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of either kind: a test that takes it runs on both."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"s3://{request.getfixturevalue('bucket')}/root"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.05)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPDIST_STORAGE_PATIENCE_SECONDS", "0.02")
    monkeypatch.setenv("SEPDIST_STORAGE_TIMEOUT_SECONDS", "1")


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


def test_what_is_put_is_read_back_whole(root: str) -> None:
    url, data = storage.join(root, "a", "b.bin"), noise(5000)
    storage.put_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert storage.size(url) == 5000
    storage.put_bytes(url, b"")
    assert storage.read_bytes(url) == b"" and storage.size(url) == 0


def test_a_put_replaces_and_a_create_only_put_does_not(root: str) -> None:
    url = storage.join(root, "COMMIT")
    storage.put_bytes(url, b"first", create_only=True)
    with pytest.raises(FileExistsError, match=re.escape(url)):
        storage.put_bytes(url, b"second", create_only=True)
    with pytest.raises(FileExistsError, match=re.escape(url)):  # even for the same bytes
        storage.put_bytes(url, b"first", create_only=True)
    assert storage.read_bytes(url) == b"first"
    storage.put_bytes(url, b"third")
    assert storage.read_bytes(url) == b"third"
    assert storage.list_names(root) == ["COMMIT"]


def test_of_many_create_only_puts_at_once_exactly_one_wins(root: str) -> None:
    url = storage.join(root, "COMMIT")
    won: list[int] = []

    def attempt(number: int) -> None:
        with suppress(FileExistsError):
            storage.put_bytes(url, str(number).encode(), create_only=True)
            won.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, range(8)))
    assert [str(number).encode() for number in won] == [storage.read_bytes(url)]


def test_a_folder_with_the_marker_of_a_console_is_there_once_something_is_in_it(
    s3_env: S3Server, bucket: str
) -> None:
    client, url = s3_env.client(), f"s3://{bucket}/folder"
    client.put_object(Bucket=bucket, Key="folder/")
    assert not storage.exists(url)
    storage.put_bytes(f"{url}/a", b"")
    assert storage.exists(url)


def test_missing_things_are_named(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "nothing")
    for function in (
        storage.size,
        storage.read_bytes,
        lambda u: storage.fetch_file(u, tmp_path / "fetched"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(url)):
            function(url)
    assert not storage.exists(url) and storage.list_names(url) == []
    storage.remove(url)
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.put_file(tmp_path / "absent", url)
    assert not storage.exists(url) and not (tmp_path / "fetched").exists()
    storage.put_bytes(url, b"a file")
    assert storage.list_names(url) == []
    with pytest.raises(FileNotFoundError, match="below"):
        storage.read_bytes(storage.join(url, "below"))


def test_names_are_the_sorted_children_and_folders_have_no_slash(root: str) -> None:
    for name in ("b", "a/x", "a/y/z", "c d+e%20", "a.json"):
        storage.put_bytes(storage.join(root, *name.split("/")), b".")
    assert storage.list_names(root) == ["a", "a.json", "b", "c d+e%20"]
    assert storage.list_names(root + "/") == ["a", "a.json", "b", "c d+e%20"]
    assert storage.list_names(storage.join(root, "a")) == ["x", "y"]
    assert storage.exists(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a.js"))
    assert storage.read_bytes(storage.join(root, "c d+e%20")) == b"."


def test_a_listing_of_more_than_one_page_is_complete(bucket: str, s3_env: S3Server) -> None:
    client, names = s3_env.client(), [f"{number:04d}" for number in range(1010)]
    for name in names:
        client.put_object(Bucket=bucket, Key=f"many/{name}", Body=b"")
    assert storage.list_names(f"s3://{bucket}/many") == names
    assert storage.list_names(f"s3://{bucket}") == ["many"]
    storage.remove(f"s3://{bucket}/many")
    assert storage.list_names(f"s3://{bucket}") == []


def test_remove_takes_the_folder_and_not_its_namesakes(root: str) -> None:
    for name in ("run/a", "run/b/c", "run-2", "run.json"):
        storage.put_bytes(storage.join(root, *name.split("/")), b".")
    storage.remove(storage.join(root, "run"))
    assert storage.list_names(root) == ["run-2", "run.json"]
    storage.remove(storage.join(root, "run.json"))
    assert storage.list_names(root) == ["run-2"]


def test_files_travel_whole_also_in_parts(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    url, data = storage.join(root, "big.bin"), noise(13 * 2**20 + 1)
    (tmp_path / "big").write_bytes(data)
    storage.put_file(tmp_path / "big", url)
    with pytest.raises(FileExistsError, match=re.escape(url)):
        storage.put_bytes(url, data[::-1], create_only=True)
    storage.fetch_file(url, tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == data
    assert storage.list_names(tmp_path / "deep") == ["copy"]
    storage.put_bytes(url, data[::-1])
    assert storage.read_bytes(url) == data[::-1]


def test_large_uploads_really_go_in_parts(
    bucket: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    storage.put_bytes(f"s3://{bucket}/x", noise(11 * 2**20))
    assert s3_env.client().head_object(Bucket=bucket, Key="x")["ETag"].endswith('-3"')


def test_a_failed_upload_of_parts_leaves_nothing_behind(
    bucket: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    monkeypatch.setenv("SEPDIST_STORAGE_PATIENCE_SECONDS", "0")
    proxy = FaultyProxy(
        s3_env.ports["s3"], lambda number, line: "reset" if "partNumber=2" in line else ""
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    storage.put_bytes(f"s3://{bucket}/x", b"old")
    with pytest.raises(StorageError, match="broke off"):
        storage.put_bytes(f"s3://{bucket}/x", noise(11 * 2**20))
    proxy.close()
    client = s3_env.client()
    assert client.get_object(Bucket=bucket, Key="x")["Body"].read() == b"old"
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_join_builds_urls_of_both_kinds() -> None:
    assert storage.join("s3://bucket/prefix/", "a", "b.json") == "s3://bucket/prefix/a/b.json"
    assert storage.join("s3://bucket", "a/") == "s3://bucket/a"
    assert storage.join("/", "a") == "/a"
    assert storage.join("runs/x") == "runs/x"
    assert storage.join(Path("/tmp/x"), "/a") == "/tmp/x/a"
    assert storage.is_remote("s3://b/k")
    assert not storage.is_remote("b/k") and not storage.is_remote(Path("/b"))


@pytest.mark.parametrize("url", ["gs://bucket/x", "https://host/x", "file:///x"])
def test_other_schemes_are_refused_instead_of_becoming_folders(url: str) -> None:
    with pytest.raises(ValueError, match="not supported; give a local path or s3://bucket/prefix"):
        storage.put_bytes(url, b"")


@pytest.mark.parametrize("url", [Path("s3://bucket/x"), "s3:/bucket/x"])
def test_an_address_that_has_lost_a_slash_is_no_local_folder(url: Path | str) -> None:
    with pytest.raises(ValueError, match=r"s3:/bucket/x: write s3:// .* not as a Path"):
        storage.put_bytes(url, b"")
    with pytest.raises(ValueError, match=r"pretrained:/x: write pretrained:// "):
        sepdist.load(Path("pretrained://x"))


@pytest.mark.parametrize("url", ["s3://", "s3://bucket", "s3://bucket/", "s3:///key"])
def test_a_whole_bucket_is_never_written_or_removed(url: str) -> None:
    for function in (storage.remove, lambda u: storage.put_bytes(u, b"")):
        with pytest.raises(ValueError, match="give s3://bucket/prefix"):
            function(url)


# Faults of the disk.


def test_a_full_disk_is_an_error_that_says_so_and_the_old_content_is_whole(
    small_disk: Path,
) -> None:
    storage.put_bytes(small_disk / "x", b"old")
    large = small_disk.with_name("large")
    large.write_bytes(bytes(2**20))
    for attempt in (
        lambda: storage.put_bytes(small_disk / "x", bytes(2**20)),
        lambda: storage.put_file(large, small_disk / "x"),
        lambda: storage.fetch_file(large, small_disk / "x"),
    ):
        with pytest.raises(StorageError, match=r"x: No space left on device; free some space"):
            attempt()
    assert os.listdir(small_disk) == ["x"] and storage.read_bytes(small_disk / "x") == b"old"


def test_a_disk_that_fills_up_while_fetching_from_s3_says_so(bucket: str, small_disk: Path) -> None:
    storage.put_bytes(f"s3://{bucket}/x", bytes(2**20))
    with pytest.raises(StorageError, match=r"small/x: No space left on device; free some space"):
        storage.fetch_file(f"s3://{bucket}/x", small_disk / "x")
    assert os.listdir(small_disk) == []


def test_a_disk_that_fills_up_at_the_flush_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put_bytes(tmp_path / "x", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        storage.put_bytes(tmp_path / "x", b"new")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    storage.put_bytes(tmp_path / "x", b".")
    here = re.escape(str(tmp_path))
    with pytest.raises(StorageError, match=f"{here}/x/y.*; one of its folders is a file"):
        storage.put_bytes(tmp_path / "x" / "y", b"")
    with pytest.raises(StorageError, match=f"{here}: .*; a file is wanted"):
        storage.read_bytes(tmp_path)


def test_a_killed_writer_leaves_the_old_content_and_the_next_put_clears_its_rest(
    tmp_path: Path,
) -> None:
    target = tmp_path / "x"
    storage.put_bytes(target, b"old")
    hangs = "import os, time; os.fsync = lambda handle: time.sleep(600)"  # its content is written
    code = f"{hangs}; from sepdist import storage; storage.put_bytes({str(target)!r}, b'lost')"
    writer = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not any(one.stat().st_size for one in tmp_path.glob(f"*{storage.TEMP_SUFFIX}")):
            time.sleep(0.01)
        storage.put_bytes(target, b"other")  # must not remove the file of a living writer
        assert [name for name in os.listdir(tmp_path) if name.endswith(storage.TEMP_SUFFIX)]
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert storage.list_names(tmp_path) == ["x"] and target.read_bytes() == b"other"
    storage.put_bytes(tmp_path / "y", b"new")  # of any name in that folder
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


# Faults of the network and the service.


def test_a_refusing_endpoint_is_named_with_what_was_tried(
    s3_env: S3Server, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_ports(1)[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for function in (
        storage.read_bytes,
        storage.exists,
        storage.list_names,
        lambda u: storage.put_bytes(u, b"."),
    ):
        with pytest.raises(StorageError) as caught:
            function("s3://somewhere/x")
        assert "s3://somewhere/x: " in str(caught.value)
        assert f"http://127.0.0.1:{port} cannot be reached after 2 attempts" in str(caught.value)
        assert "check AWS_ENDPOINT_URL" in str(caught.value)


def test_an_endpoint_that_never_answers_ends_in_an_error_within_the_budget(
    s3_env: S3Server, impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for function in (
            lambda u: storage.fetch_file(u, tmp_path / "x"),
            lambda u: storage.put_bytes(u, b"."),
        ):
            began = time.monotonic()
            with pytest.raises(StorageError, match=r"no answer within 1 s after 2 attempts"):
                function("s3://somewhere/x")
            assert time.monotonic() - began < 8
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fault", ["reset", "503", "lose", "cut"])
def test_a_fault_that_passes_is_survived_and_logged(
    bucket: str,
    s3_env: S3Server,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = noise(300_000)
    storage.put_bytes(f"s3://{bucket}/x", data)
    faults = iter([fault] * 3)
    proxy = FaultyProxy(
        s3_env.ports["s3"], lambda number, line: next(faults, "") if line.startswith("GET") else ""
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    with caplog.at_level(logging.WARNING):
        assert storage.read_bytes(f"s3://{bucket}/x") == data
    proxy.close()
    assert next(faults, None) is None
    assert f"s3://{bucket}/x" in caplog.text and "trying again for 60 s" in caplog.text


def test_a_service_that_stays_busy_ends_in_an_error(
    bucket: str, s3_env: S3Server, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultyProxy(s3_env.ports["s3"], lambda number, line: "503")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    message = "answered 503 SlowDown after 2 attempts in 0 s; the service is busy"
    with pytest.raises(StorageError, match=message):
        storage.put_bytes(f"s3://{bucket}/x", b".")
    proxy.close()
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("num_bytes", [10, 11 * 2**20])
def test_a_create_only_put_whose_answer_is_lost_knows_its_own_work(
    bucket: str, s3_env: S3Server, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    lost = iter(["lose"])
    ends = ("POST /" if num_bytes > 100 else "PUT /", "uploadId" if num_bytes > 100 else "")
    proxy = FaultyProxy(
        s3_env.ports["s3"],
        lambda n, line: next(lost, "") if line.startswith(ends[0]) and ends[1] in line else "",
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    data = noise(num_bytes)
    storage.put_bytes(f"s3://{bucket}/COMMIT", data, create_only=True)
    assert sum("lose" in request for request in proxy.requests) == 1
    assert storage.read_bytes(f"s3://{bucket}/COMMIT") == data
    with pytest.raises(FileExistsError):
        storage.put_bytes(f"s3://{bucket}/COMMIT", data, create_only=True)
    proxy.close()


def test_a_wrong_secret_is_reported_without_any_key(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(b".")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecret-42")
    with caplog.at_level(logging.INFO):
        for function in (
            storage.read_bytes,
            storage.exists,
            storage.list_names,
            storage.remove,
            lambda u: storage.put_bytes(u, b"."),
            lambda u: storage.put_file(tmp_path / "x", u),
            lambda u: storage.fetch_file(u, tmp_path / "y"),
        ):
            wanted = r"rejected the key .*check AWS_ACCESS_KEY_ID"
            with pytest.raises(StorageError, match=wanted) as caught:
                function(f"s3://{bucket}/x")
            message = f"{caught.value!s} {caught.value!r} {caplog.text}"
            assert f"s3://{bucket}/x" in message
            assert ADMIN[0] not in message and "wrongsecret-42" not in message
            pickled = pickle.dumps(caught.value)  # as Ray carries it to the driver
            assert str(pickle.loads(pickled)) == str(caught.value)


def test_a_key_that_may_only_read_cannot_write_or_remove(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put_bytes(f"s3://{bucket}/x/y", b"kept")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READ_ONLY[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READ_ONLY[1])
    for function in (lambda u: storage.put_bytes(u, b"."), storage.remove):
        with pytest.raises(StorageError, match="what this key may do in this bucket"):
            function(f"s3://{bucket}/x/y")
    assert storage.read_bytes(f"s3://{bucket}/x/y") == b"kept"


def test_no_key_at_all_says_which_variables_to_set(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="needs a key; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://somewhere/x")


def test_a_missing_bucket_is_named(s3_env: S3Server) -> None:
    for function in (storage.list_names, storage.exists, lambda u: storage.put_bytes(u, b".")):
        message = r"s3://no-such-bucket/x: .* has no such bucket; create it"
        with pytest.raises(StorageError, match=message):
            function("s3://no-such-bucket/x")


def _read_in_child(url: str, queue: "multiprocessing.Queue[bytes]") -> None:
    queue.put(storage.read_bytes(url))


def test_a_forked_child_reads_from_s3_too(bucket: str) -> None:
    storage.put_bytes(f"s3://{bucket}/x", b"seen")  # the parent is connected now
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[bytes] = context.Queue()
    child = context.Process(target=_read_in_child, args=(f"s3://{bucket}/x", queue))
    child.start()
    assert queue.get(timeout=30) == b"seen"
    child.join()
    assert storage.read_bytes(f"s3://{bucket}/x") == b"seen"
