"""Damage of a data set, and disks that fill up while it is written, never go unnoticed."""

import dataclasses
import errno
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sepdist import storage
from sepdist.data import shards
from sepdist.data.shards import DataError
from tests.support.shard_sets import (
    RATE,
    contents,
    flip,
    holding,
    mixture,
    read,
    waves_of,
    write,
    write_shard,
)


def with_shard(raw: dict, **changes: object) -> str:
    """A manifest whose first shard is changed, as a stranger's may be."""
    return json.dumps(raw | {"shards": [raw["shards"][0] | changes, *raw["shards"][1:]]})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: "{", "is not a readable manifest"),
        (lambda raw: "[]", "is not a readable manifest"),
        (lambda raw: json.dumps(raw | {"surprise": 1}), "is not a readable manifest .*surprise"),
        (
            lambda raw: json.dumps({k: v for k, v in raw.items() if k != "hours"}),
            "is not a readable manifest .*hours",
        ),
        (
            lambda raw: json.dumps(raw | {"format_version": 2}),
            "is of format 2, this version of sepdist reads 1",
        ),
        (
            lambda raw: json.dumps(raw | {"num_samples": 5}),
            "was changed, it counts 5 samples and its shards 6",
        ),
        *[
            (partial(with_shard, name=name), "is no shard")
            for name in ("../../evil.tar", "/etc/evil.tar", "a/b.tar", "..tar", "a.sh", 7, "")
        ],
        *[(partial(with_shard, sha256=one), "is no shard") for one in ("/../x", "0" * 63, None)],
    ],
)
def test_a_changed_manifest_is_refused(
    change: Callable[[dict], str], problem: str, tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DataError, match=problem):
        shards.read_manifest(tmp_path)
    assert len(shards.verify(tmp_path)) == 1


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))]
)
@pytest.mark.parametrize("name", ["manifest.json", "index/toy-train-000000.json"])
def test_every_flipped_bit_of_the_manifest_and_of_an_index_is_found(
    name: str, first: int, tmp_path: Path
) -> None:
    write(tmp_path, num_shards=1, per_shard=1)
    path = tmp_path / name
    content = path.read_bytes()
    passed = []
    assert b"e-0" in content or name != "manifest.json"  # 1e-05 and 1E-05 are one number
    for at in range(0, len(content), 1 if name == "manifest.json" else 97):
        flipped = content[at] ^ 1 << (first + at) % 8
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        passed += [] if shards.verify(tmp_path) else [at]
    assert passed == []
    path.write_bytes(content)
    assert shards.verify(tmp_path) == []


def test_a_manifest_without_a_digest_is_read_and_has_the_same_digest(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    path = tmp_path / "manifest.json"
    raw = json.loads(path.read_text())
    assert raw.pop("digest") == manifest.digest()
    path.write_text(json.dumps(raw, indent=1, ensure_ascii=False))
    assert shards.read_manifest(tmp_path).digest() == manifest.digest()
    assert shards.verify(tmp_path) == []
    path.write_text(json.dumps(raw | {"digest": "0" * 64}))
    with pytest.raises(DataError, match="was changed or damaged, its digest is not 000"):
        shards.read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["manifest.json", "index/toy-train-000000.json", "toy-train-000000.tar"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_an_error_where_one_is_wanted(
    kind: str, name: str, tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    try:
        problems = shards.verify(tmp_path)
    except OSError as error:
        problems = [str(error)]
    assert problems and all(name.removesuffix(".json") in problem for problem in problems)


def test_any_change_of_the_data_set_changes_the_digest(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    first = manifest.shards[0]
    changed = [
        dataclasses.replace(manifest, split="dev"),
        dataclasses.replace(manifest, shards=manifest.shards[::-1]),
        dataclasses.replace(
            manifest, shards=(dataclasses.replace(first, sha256="0" * 64), *manifest.shards[1:])
        ),
    ]
    assert len({manifest.digest(), *(one.digest() for one in changed)}) == 4


def test_a_flipped_bit_of_the_audio_is_found_and_placed(tmp_path: Path) -> None:
    manifest = write(tmp_path, num_shards=1)
    shard = manifest.shards[0]
    path = tmp_path / shard.name
    intact, sample = path.read_bytes(), shards.read_index(tmp_path, shard)[1]
    offset, size = sample.members["s2"]
    places = np.random.default_rng(0).integers(offset + size // 4, offset + size, 8).tolist()
    for at in [offset, *places, offset + size - 1]:
        flip(path, at)
        with pytest.raises(DataError, match=rf"{shard.name}, utt-1.s2 at byte {offset}: damaged"):
            read(path, sample, ["s1", "s2"])
        whole, placed = shards.verify(tmp_path)  # and nothing else
        assert whole == f"{shard.name}: its sha256 is not the manifest's; it was damaged or changed"
        assert placed.startswith(f"{shard.name}, utt-1.s2 at byte {offset}: damaged")
        path.write_bytes(intact)
    assert shards.verify(tmp_path) == []


def test_a_truncated_shard_names_the_first_sample_that_is_cut(tmp_path: Path) -> None:
    manifest = write(tmp_path, num_shards=1)
    shard = manifest.shards[0]
    path, samples = tmp_path / shard.name, shards.read_index(tmp_path, shard)
    offset, size = samples[2].members["s1"]
    path.write_bytes(path.read_bytes()[: offset + size - 5])
    assert read(path, samples[1], ["s1"])["s1"].size == 440
    message = rf"utt-2.s1 at byte {offset}: truncated, .* {size - 5} of {size} bytes"
    with pytest.raises(DataError, match=message):
        read(path, samples[2], ["s1"])
    problems, cut = shards.verify(tmp_path), offset + size - 5
    assert problems[0] == f"{shard.name}: has {cut} bytes, the manifest says {shard.bytes}"
    assert any(f"utt-2.s1 at byte {offset}: truncated" in problem for problem in problems)


def test_missing_and_changed_files_of_a_data_set_are_named(url: str) -> None:
    manifest = write(url)
    index = storage.join(url, "index", "toy-train-000000.json")
    changed = storage.read_bytes(index).replace(b"anna0", b"bodil")
    storage.put_bytes(index, changed)
    storage.remove(storage.join(url, "toy-train-000001.tar"))
    with pytest.raises(DataError, match=r"toy-train-000000.tar: its index .* was changed"):
        shards.read_index(url, manifest.shards[0])
    assert len(shards.verify(url)) == 2
    assert "toy-train-000001.tar: the shard is missing" in shards.verify(url)
    storage.remove(index)
    with pytest.raises(DataError, match=r"toy-train-000000.tar: its index .* is missing"):
        shards.read_index(url, manifest.shards[0])


@pytest.mark.parametrize(
    "change",
    [
        b"null",
        b"[" * 100_000,
        {"samples": []},
        {"samples": [None]},
        {"num_samples": 4000.0},
        {"num_samples": 2**40},
        {"members": None},
        {"members": {"s1": [-1, 5]}},
        {"members": {"s1": [0, 2**40]}},
        {"members": {"s1": "ab"}},
        {"members": {"s1": [1]}},
        {"speakers": None},
        {"more": 1},
    ],
)
def test_an_index_of_other_values_is_damage(change: Any, tmp_path: Path) -> None:
    shard = write(tmp_path).shards[0]
    path = tmp_path / "index" / "toy-train-000000.json"
    index = json.loads(path.read_text())
    if isinstance(change, dict):
        (index if "samples" in change else index["samples"][0]).update(change)
    data = change if isinstance(change, bytes) else json.dumps(index).encode()
    path.write_bytes(data)
    shard = dataclasses.replace(shard, index_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(DataError, match=r"toy-train-000000\.tar: its index"):
        shards.read_index(tmp_path, shard)


def test_verify_finds_audio_that_should_never_have_been_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepdist.audio.SILENCE", 0.0)  # a writer that lets silence pass
    quiet = waves_of(1) | {"s1": waves_of(1)["s1"] * np.float32(2.0**-20)}
    info = write_shard([holding(quiet)], tmp_path, "x.tar")
    shards.write_manifest(tmp_path, "toy", "train", RATE, [info])
    monkeypatch.undo()
    offset = shards.read_index(tmp_path, info)[0].members["s1"][0]
    [problem] = shards.verify(tmp_path)
    assert problem.startswith(f"x.tar, broken-7.s1 at byte {offset}: silent")


def test_a_sample_is_asked_for_what_it_has(tmp_path: Path) -> None:
    info = write_shard([mixture(0)], tmp_path, "x.tar")
    sample = shards.read_index(tmp_path, info)[0]
    with pytest.raises(DataError, match="utt-0: has no s3; it has json, noise, s1, s2"):
        read(tmp_path / "x.tar", sample, ["s1", "s3"])
    for start, stop in [(0, 401), (5, 5), (-1, 3), (400, None)]:
        with pytest.raises(ValueError, match=r"utt-0: cannot read"):
            read(tmp_path / "x.tar", sample, ["s1"], start, stop)


# Full disks.


def test_a_disk_that_fills_up_while_writing_keeps_the_finished_shards(small_disk: Path) -> None:
    info = write_shard([mixture(0)], small_disk, "a.tar")
    before = contents(small_disk)
    message = r"b.tar: No space left on device; free some space"
    with pytest.raises(storage.StorageError, match=message):
        write_shard([mixture(i) for i in range(1, 60)], small_disk, "b.tar")
    assert contents(small_disk) == before and sorted(os.listdir(small_disk)) == ["a.tar", "index"]
    assert write_shard([mixture(0)], small_disk, "a.tar") == info


def test_a_full_folder_for_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    message = r"x.tar \(TMPDIR chooses the folder\): No space left on device"
    with pytest.raises(storage.StorageError, match=message):
        write_shard([mixture(0)], tmp_path, "x.tar")
    assert not list(tmp_path.iterdir())
