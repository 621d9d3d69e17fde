"""The shard cache: fetched once for all processes, verified, bounded, and safe for open readers."""

import contextlib
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sepdist import storage
from sepdist.data.cache import ShardCache, _locked
from sepdist.data.members import DataError
from sepdist.data.shards import Manifest, read_index, read_manifest, read_sample
from tests.support import toy
from tests.support.s3server import FaultyProxy, S3Server
from tests.support.shard_sets import write_shard

SIZES = (3, 3, 3, 3)
Opener = Callable[..., ShardCache]


@pytest.fixture
def remote(bucket: str) -> str:
    url = f"s3://{bucket}/toy"
    toy.write(url, SIZES)
    return url


@pytest.fixture
def cache_of(tmp_path: Path) -> Iterator[Opener]:
    with contextlib.ExitStack() as stack:

        def opened(url: str, max_bytes: int = 10**9) -> ShardCache:
            cache = ShardCache(url, read_manifest(url), str(tmp_path / "cache"), max_bytes)
            stack.callback(cache.close)
            return cache

        yield opened


def copies(tmp_path: Path) -> list[str]:
    found = (tmp_path / "cache").glob("*.tar")
    return sorted(path.name[: len("toy-train-000000")] for path in found)


def check_readable(cache: ShardCache, shard: int) -> None:
    opened = cache.open(shard)
    for i, sample in enumerate(opened.samples):
        wave = read_sample(opened.file, sample, ["s1"])["s1"]
        assert np.array_equal(wave, toy.as_float(toy.members(3 * shard + i + 1)["s1"]))


def tar_requests(proxy: FaultyProxy) -> list[str]:
    return [line for line in proxy.requests if line.startswith("GET") and ".tar" in line]


@pytest.fixture
def proxy(
    s3_server: S3Server, remote: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.ports["s3"], lambda _, first_line: "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


def test_a_local_data_set_is_read_in_place_and_hashed_once(
    tmp_path: Path, cache_of: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.write(tmp_path / "set", SIZES)
    monkeypatch.setattr("sepdist.data.cache.SPARE_OPEN", 1)
    hashed: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        "sepdist.data.cache.hashlib.file_digest",
        lambda file, name: hashed.append(file.name) or digest(file, name),
    )
    cache = cache_of(str(tmp_path / "set"))
    for _ in range(3):
        for shard in range(4):
            check_readable(cache, shard)
    assert sorted(hashed) == [str(tmp_path / "set" / shard.name) for shard in cache.manifest.shards]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("most_files", [-1, 12])
def test_open_shards_are_those_announced_and_a_few_or_the_first_of_them_a_quarter_of_the_limit(
    most_files: int, tmp_path: Path, cache_of: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.write(tmp_path / "set", (1,) * 9)
    monkeypatch.setattr("sepdist.data.cache.SPARE_OPEN", 1)
    monkeypatch.setattr("resource.getrlimit", lambda _: (most_files, most_files))
    cache, wanted = cache_of(str(tmp_path / "set")), [5, 3, 8, 0, 6]

    def announce(numbers: list[int]) -> set[int]:
        cache.prefetch(numbers)
        for future in list(cache._pending.values()):
            future.result(60)
        return set(cache._open)

    assert announce(wanted) == set(wanted if most_files < 0 else [5, 3, 8])
    for number in wanted:
        cache.open(number)
    if most_files < 0:
        kept = [cache.open(number) for number in wanted]
        cache.open(1)
        assert set(cache._open) == {*wanted, 1}
        cache.open(2)
        assert set(cache._open) == {*wanted, 2}, "what was not announced goes first"
        assert all(cache.open(n) is one for n, one in zip(wanted, kept, strict=True))
    assert announce([8, 4]) >= {8, 4} and len(cache._open) == 3


def test_a_local_shard_that_changes_is_hashed_again(
    tmp_path: Path, cache_of: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = toy.write(tmp_path / "set", SIZES)
    monkeypatch.setattr("sepdist.data.cache.SPARE_OPEN", 1)
    cache = cache_of(str(tmp_path / "set"))
    check_readable(cache, 0)
    check_readable(cache, 1)  # closes 0
    toy.damage(tmp_path / "set" / manifest.shards[0].name, cache.open(0).samples[1], "noise")
    check_readable(cache, 1)
    assert list(cache.open(0).damaged) == [1]


def test_two_processes_of_a_machine_fetch_a_shard_once(
    tmp_path: Path, remote: str, proxy: FaultyProxy
) -> None:
    program = (
        "import sys\nfrom sepdist.data.cache import ShardCache\n"
        "from sepdist.data.shards import read_manifest\n"
        "cache = ShardCache(sys.argv[1], read_manifest(sys.argv[1]), sys.argv[2], 10**9)\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "for shard in range(4): print(len(cache.open(shard).samples))\n"
    )
    command = [sys.executable, "-c", program, remote, str(tmp_path / "cache")]
    with contextlib.ExitStack() as stack:
        pair = [
            stack.enter_context(
                subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)
            )
            for _ in range(2)
        ]
        for process in pair:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda one: one.communicate("go\n", timeout=120), pair))
    assert results == [("3\n" * 4, "")] * 2
    assert len(tar_requests(proxy)) == 4
    assert copies(tmp_path) == [f"toy-train-{i:06d}" for i in range(4)]


def test_many_threads_wait_for_one_download(
    remote: str, proxy: FaultyProxy, cache_of: Opener
) -> None:
    cache = cache_of(remote)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check_readable, [cache] * 8, [2] * 8))
    assert len(tar_requests(proxy)) == 1


def test_prefetched_shards_are_there_before_they_are_opened(
    tmp_path: Path, remote: str, proxy: FaultyProxy, cache_of: Opener
) -> None:
    cache = cache_of(remote)
    cache.prefetch([2, 0])
    cache.prefetch([2, 0])
    for future in list(cache._pending.values()):
        future.result(60)
    assert copies(tmp_path) == ["toy-train-000000", "toy-train-000002"]
    assert len(tar_requests(proxy)) == 2
    check_readable(cache, 0)
    check_readable(cache, 2)
    assert len(tar_requests(proxy)) == 2


def test_a_prefetch_that_fails_is_not_repeated_and_open_tries_again(
    remote: str, proxy: FaultyProxy, cache_of: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPDIST_STORAGE_PATIENCE_SECONDS", "0")
    cache = cache_of(remote)
    proxy.fault = lambda _, first_line: "503" if ".tar" in first_line else ""
    for _ in range(5):
        cache.prefetch([1])
        for future in list(cache._pending.values()):
            assert isinstance(future.exception(60), storage.StorageError)
    assert len(tar_requests(proxy)) == 1
    proxy.fault = lambda _, first_line: ""
    check_readable(cache, 1)


def test_the_least_recently_used_copies_go_and_readers_keep_their_files(
    tmp_path: Path, remote: str, cache_of: Opener
) -> None:
    manifest = read_manifest(remote)
    cache = cache_of(remote, max_bytes=sum(shard.bytes for shard in manifest.shards[:2]) + 100)
    kept = cache.open(0)
    check_readable(cache, 1)
    again = cache_of(remote, max_bytes=cache.max_bytes)  # as another process would
    check_readable(again, 0)  # now 1 is the oldest
    check_readable(cache, 2)
    assert copies(tmp_path) == ["toy-train-000000", "toy-train-000002"]
    check_readable(cache, 3)
    assert copies(tmp_path) == ["toy-train-000002", "toy-train-000003"]
    wave = read_sample(kept.file, kept.samples[0], ["s1"])["s1"]
    assert np.array_equal(wave, toy.as_float(toy.members(1)["s1"]))
    check_readable(cache, 0)
    assert len(copies(tmp_path)) == 2 and len(list((tmp_path / "cache").glob("*.lock"))) == 2


def test_a_disk_smaller_than_the_cache_may_be_holds_the_last_copies(
    bucket: str, small_disk: Path
) -> None:
    url = f"s3://{bucket}/toy"
    toy.write(url, (3,) * 15)  # of 20 KiB
    cache = ShardCache(url, read_manifest(url), str(small_disk), 10**9)
    try:
        for number in range(15):
            check_readable(cache, number)
    finally:
        cache.close()
        cache._open.clear()  # else the disk is in use


def test_a_copy_that_another_process_evicts_at_once_is_read_all_the_same(
    remote: str, cache_of: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = cache_of(remote), cache_of(remote, max_bytes=1)
    fetch = storage.fetch_file

    def evicted(url: str, path: Path) -> None:
        fetch(url, path)
        other._make_room(0)

    monkeypatch.setattr(storage, "fetch_file", evicted)
    for shard in range(4):
        check_readable(cache, shard)


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"

    def waits() -> bool:
        with _locked(path):
            return path.exists()  # so that a third one waits for this one

    with ThreadPoolExecutor() as pool:
        with _locked(path):
            waiting = pool.submit(waits)
            with pytest.raises(TimeoutError):
                waiting.result(0.3)
            path.unlink()
        assert waiting.result(60)


def test_a_cache_in_a_folder_of_other_tars_leaves_them_alone(
    tmp_path: Path, remote: str, cache_of: Opener
) -> None:
    corpus = tmp_path / "cache" / "corpus-2026.tar"
    corpus.parent.mkdir()
    corpus.write_bytes(bytes(100))
    check_readable(cache_of(remote, max_bytes=1), 0)
    assert corpus.exists()


def test_what_is_wanted_now_is_not_evicted_even_if_it_is_too_much(
    tmp_path: Path,
    remote: str,
    proxy: FaultyProxy,
    cache_of: Opener,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = cache_of(remote, max_bytes=1)
    with caplog.at_level(logging.WARNING):
        cache.prefetch([0, 1, 2])
        for _ in range(2):
            for shard in range(3):
                check_readable(cache, shard)
    assert len(copies(tmp_path)) == len(tar_requests(proxy)) == 3
    assert "more than the 0.00 GB that cache_gigabytes allows" in caplog.text
    cache.prefetch([3])
    check_readable(cache, 3)
    assert copies(tmp_path) == ["toy-train-000003"]


def test_a_damaged_copy_is_fetched_again(
    tmp_path: Path,
    remote: str,
    proxy: FaultyProxy,
    cache_of: Opener,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_readable(cache_of(remote), 0)
    (copy,) = (tmp_path / "cache").glob("*.tar")
    content = copy.read_bytes()
    for damaged in (content[:-512], b"x" + content[1:], b""):
        copy.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            check_readable(cache_of(remote), 0)
        assert copy.read_bytes() == content
    assert len(tar_requests(proxy)) == 4
    assert caplog.text.count("fetching the shard again") >= 3


def test_equal_shard_names_of_two_data_sets_do_not_meet(bucket: str, cache_of: Opener) -> None:
    toy.write(f"s3://{bucket}/one", (3,))
    toy.write(f"s3://{bucket}/two", (3,), names=("s1", "s2"))
    first, second = cache_of(f"s3://{bucket}/one"), cache_of(f"s3://{bucket}/two")
    assert "noise" in first.open(0).samples[0].members
    assert "noise" not in second.open(0).samples[0].members
    check_readable(first, 0)
    check_readable(second, 0)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_damage_at_the_source_is_pinned_to_its_samples(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, offset, url = damaged_at_the_source(kind, tmp_path, request)
    cache = ShardCache(url, manifest, str(tmp_path / "cache"), 10**9)
    with caplog.at_level(logging.WARNING):
        opened = cache.open(1)
    assert list(opened.damaged) == [2]
    assert opened.damaged[2].startswith("toy-train-000001")
    assert f"mix-6.s1 at byte {offset}: damaged" in opened.damaged[2]
    assert "1 of 3 samples damaged" in caplog.text
    assert "its sha256 is not the manifest's" in caplog.text
    assert cache.open(0).damaged == {}
    if kind == "s3":
        assert copies(tmp_path) == ["toy-train-000000"]  # no other process finds the damaged copy
    cache.close()


def damaged_at_the_source(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[Manifest, int, str]:
    here = tmp_path / "set"
    manifest = toy.write(here, SIZES)
    sample = read_index(here, manifest.shards[1])[2]
    offset = toy.damage(here / manifest.shards[1].name, sample, "s1")
    url = str(here)
    if kind == "s3":
        url = f"s3://{request.getfixturevalue('bucket')}/toy"
        toy.write(url, SIZES)
        storage.put_file(here / manifest.shards[1].name, f"{url}/{manifest.shards[1].name}")
    return manifest, offset, url


def test_a_truncated_shard_loses_the_samples_behind_the_cut(
    tmp_path: Path, cache_of: Opener
) -> None:
    manifest = toy.write(tmp_path / "set", SIZES)
    path = tmp_path / "set" / manifest.shards[0].name
    samples = read_index(tmp_path / "set", manifest.shards[0])
    os.truncate(path, samples[1].members["s2"][0] + 5)
    opened = cache_of(str(tmp_path / "set")).open(0)
    assert list(opened.damaged) == [1, 2]
    assert "toy-train-000000.tar, mix-2.s2 at byte" in opened.damaged[1]
    assert "truncated" in opened.damaged[1]


def test_damage_that_no_sample_explains_is_an_error(tmp_path: Path, cache_of: Opener) -> None:
    manifest = toy.write(tmp_path / "set", SIZES)
    path = tmp_path / "set" / manifest.shards[0].name
    content = bytearray(path.read_bytes())
    content[0] ^= 1  # of the tar's first header
    path.write_bytes(content)
    message = r"toy-train-000000\.tar: damaged, its sha256 .* yet every sample decodes"
    with pytest.raises(DataError, match=message):
        cache_of(str(tmp_path / "set")).open(0)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_missing_shard_is_named(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, cache_of: Opener
) -> None:
    url = str(tmp_path / "set")
    if kind == "s3":
        url = f"s3://{request.getfixturevalue('bucket')}/toy"
    manifest = toy.write(url, SIZES)
    storage.remove(storage.join(url, manifest.shards[2].name))
    message = r"toy-train-000002\.tar: the shard is missing; write the data set again"
    with pytest.raises(DataError, match=message):
        cache_of(url).open(2)


def rewrite(path: Path, content: bytes) -> None:
    """Overwrite a file in place, as `cp` and `rsync --inplace` do; never within one clock tick."""
    inode, before = path.stat().st_ino, path.stat().st_mtime_ns
    path.write_bytes(content)
    assert path.stat().st_ino == inode
    if path.stat().st_mtime_ns == before:
        os.utime(path, ns=(before, before + 1))


def other_gains(folder: Path, manifest: Manifest) -> bytes:
    """Shard 0 of the same samples at half the level, so that only its audio differs."""
    records = []
    for number in range(1, 4):
        waves = {name: toy.as_float(x) / 2 for name, x in toy.members(number).items()}
        records.append(replace(toy.record(number, ("s1", "s2", "noise")), load=lambda w=waves: w))
    return (folder / write_shard(records, folder, "other.tar").name).read_bytes()


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_shard_overwritten_in_place_while_it_is_open_gives_no_other_audio(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, cache_of: Opener
) -> None:
    here = tmp_path / "set"
    manifest = toy.write(here, SIZES)
    path, url = here / manifest.shards[0].name, str(here)
    if kind == "s3":
        url = f"s3://{request.getfixturevalue('bucket')}/toy"
        toy.write(url, SIZES)
    cache = cache_of(url)
    check_readable(cache, 0)
    if kind == "s3":
        (path,) = (tmp_path / "cache").glob("toy-train-000000-*.tar")
    intact = path.read_bytes()
    rewrite(path, (here / manifest.shards[3].name).read_bytes())  # of other samples
    if kind == "s3":
        check_readable(cache, 0)  # a copy is fetched again
        return
    assert set(cache.open(0).damaged) == {0, 1, 2}
    rewrite(path, intact)
    check_readable(cache, 0)
    rewrite(path, other_gains(tmp_path / "softer", manifest))
    assert set(cache.open(0).damaged) == {0, 1, 2}
    rewrite(path, intact)
    check_readable(cache, 0)


def test_the_same_bytes_written_again_and_a_shard_replaced_by_name_are_no_damage(
    tmp_path: Path, cache_of: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = toy.write(tmp_path, SIZES)
    path, cache = tmp_path / manifest.shards[0].name, cache_of(str(tmp_path))
    check_readable(cache, 0)
    rewrite(path, path.read_bytes())
    check_readable(cache, 0)
    assert caplog.text.count("changed while it was open") == 1
    os.replace(tmp_path / manifest.shards[1].name, path)  # the open file stays what it was
    check_readable(cache, 0)


def test_samples_of_another_shard_in_their_places_are_damage(
    tmp_path: Path, cache_of: Opener
) -> None:
    manifest = toy.write(tmp_path / "a", (3, 3), names=("s1", "s2"))
    first, second = (tmp_path / "a" / shard.name for shard in manifest.shards)
    data, index = bytearray(first.read_bytes()), read_index(tmp_path / "a", manifest.shards[0])
    offset, size = index[0].members["json"]
    json_of = data[offset : offset + size]
    data[offset : offset + size] = json_of.replace(b"mix-1", b"mix-9")
    first.write_bytes(data)
    opened = cache_of(str(tmp_path / "a")).open(0)
    assert list(opened.damaged) == [0] and "another sample" in opened.damaged[0]
    assert second.exists()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_in_place_of_a_shard_is_an_error(
    kind: str, tmp_path: Path, cache_of: Opener
) -> None:
    manifest = toy.write(tmp_path, SIZES)
    path = tmp_path / manifest.shards[0].name
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"toy-train-000000\.tar: a pipe, device or folder"):
        cache_of(str(tmp_path)).open(0)
