"""A checkpoint with any damaged file is passed over, an unfinished one loads through no door."""

import errno
import io
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sepdist
from sepdist import slots, storage
from sepdist.config import InitConfig
from sepdist.inference.export import load_estimator, load_export, load_separator
from sepdist.training import checkpoint
from sepdist.training.checkpoint import (
    CheckpointError,
    collect_orphans,
    find_committed,
    load_newest,
    load_snapshot,
)
from sepdist.training.handoff import inherit
from tests.support.checkpoints import NODE, assert_equal, save, snapshot

FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "model.yaml",
    "lineage.json",
    "COMMIT",
)


def refuse(monkeypatch: pytest.MonkeyPatch, victim: Path, number: int) -> None:
    """Make the operating system answer that `victim` cannot be read, nor listed."""
    plain_open, plain_listdir = io.open, os.listdir

    def opening(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == str(victim):
            raise OSError(number, os.strerror(number), str(path))
        return plain_open(path, *arguments, **options)

    def listing(path: Any = ".") -> list[str]:
        if str(path) == str(victim):
            raise OSError(number, os.strerror(number), str(path))
        return plain_listdir(path)

    monkeypatch.setattr(io, "open", opening)
    monkeypatch.setattr("builtins.open", opening)
    monkeypatch.setattr(os, "listdir", listing)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def in_its_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"?"),
    "missing": Path.unlink,
    "a folder": in_its_place(Path.mkdir),
    "a link to itself": in_its_place(lambda path: path.symlink_to(path)),
    "a link to nothing": in_its_place(lambda path: path.symlink_to(path.parent / "gone")),
}
NUMBERS = {"EIO": errno.EIO, "EACCES": errno.EACCES, "EISDIR": errno.EISDIR}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3."""
    run_dir = tmp_path_factory.mktemp("whole")
    save(run_dir, *map(snapshot, (1, 2, 3)), keep_last=3)
    return run_dir


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def folder_of(run_dir: Path, step: int) -> Path:
    (found,) = (run_dir / "checkpoints").glob(f"step-{step:09d}-*")
    return found


@pytest.mark.parametrize("damage", [*DAMAGES, "another's", *NUMBERS])
@pytest.mark.parametrize("name", FILES)
def test_whichever_file_is_damaged_the_checkpoint_before_is_used_and_a_warning_names_it(
    name: str,
    damage: str,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    victim = folder_of(run_dir, 3) / name
    if damage in NUMBERS:
        refuse(monkeypatch, victim, NUMBERS[damage])
    elif damage == "another's":
        shutil.copyfile(folder_of(run_dir, 1) / name, victim)
    else:
        DAMAGES[damage](victim)
    same = (damage, name) == ("another's", "model.yaml")  # one run has one model
    assert_equal(load_newest(str(run_dir)), snapshot(3 if same else 2))
    # Without COMMIT, or with one that cannot be found, it was never finished.
    unfinished = name == "COMMIT" and damage in ("missing", "a link to nothing")
    warned = victim.parent.name in caplog.text and f"{name} " in caplog.text.replace(":", " ")
    assert warned or same or unfinished


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_checkpoint_whose_folder_cannot_be_listed_is_passed_over_too(
    number: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, folder_of(run_dir, 3), number)
    assert_equal(load_newest(str(run_dir)), snapshot(2))
    assert checkpoint.collect_orphans(str(run_dir)) == []


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("damage", ["missing", "a folder", "EIO"])
def test_a_run_without_a_whole_checkpoint_never_starts_afresh_and_loses_no_file(
    damage: str, name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        victim = folder_of(run_dir, step) / name
        if damage == "EIO":
            refuse(monkeypatch, victim, errno.EIO)
        else:
            DAMAGES[damage](victim)
    with pytest.raises(CheckpointError, match=rf"no checkpoint is whole: .*{name}") as caught:
        load_newest(str(run_dir))
    assert "another run_dir" in str(caught.value) and "remove" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.ETIMEDOUT, "Connection timed out"),
        OSError(errno.EMFILE, "Too many open files"),
        storage.StorageError("cannot read s3://b/x: http://s3 gave no answer within 60 s"),
    ],
    ids=["stale", "timeout", "descriptors", "no answer"],
)
def test_storage_that_is_away_for_a_moment_costs_no_checkpoint(
    error: OSError, name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, victim = storage.read_bytes, folder_of(run_dir, 3) / name

    def away(url: str) -> bytes:
        if url != str(victim):
            return read(url)
        if isinstance(error, storage.StorageError):
            raise error
        with storage._local(url, "read"):
            raise error

    monkeypatch.setattr(storage, "read_bytes", away)
    with pytest.raises(storage.StorageError):
        load_newest(str(run_dir))
    monkeypatch.undo()
    assert_equal(load_newest(str(run_dir)), snapshot(3))


def handed_over(url: str) -> None:
    inherit(slots.build("model", NODE), InitConfig(url))


DOORS: dict[str, Callable[[str], object]] = {
    "init.weights": handed_over,
    "evaluate and recognise": load_export,
    "separate": load_separator,
    "an estimator": load_estimator,
    "sepdist.load": sepdist.load,
    "a resume": load_snapshot,
}


def uncommitted(folder: Path) -> Path:
    (folder / "COMMIT").unlink()
    return folder


def being_removed(folder: Path) -> Path:
    """COMMIT goes first, then the other files in any order."""
    for name in ("COMMIT", "state.json", "optimizer.safetensors"):
        (folder / name).unlink()
    return folder


def being_collected(folder: Path) -> Path:
    (folder / "COMMIT").write_bytes(checkpoint.COLLECTED)
    return folder


def copied_elsewhere(folder: Path) -> Path:
    names = shutil.ignore_patterns("COMMIT")
    return Path(shutil.copytree(folder, folder.parents[2] / "copy", ignore=names))


def linked(folder: Path) -> Path:
    link = folder.parents[2] / "best"
    link.symlink_to(being_removed(folder))
    return link


@pytest.mark.parametrize(
    "state", [uncommitted, being_removed, being_collected, copied_elsewhere, linked]
)
@pytest.mark.parametrize("door", DOORS)
def test_a_checkpoint_without_its_commit_loads_through_no_door(
    door: str, state: Callable[[Path], Path], run_dir: Path
) -> None:
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"COMMIT|commit|finished"):
        DOORS[door](str(state(folder_of(run_dir, 3))))


@pytest.mark.parametrize("place", ["exports/step-000000003-mine", "checkpoints/mine", "plain"])
@pytest.mark.parametrize("door", [door for door in DOORS if door != "a resume"])
def test_weights_that_someone_copied_out_of_a_run_still_load(
    door: str, place: str, run_dir: Path, tmp_path: Path
) -> None:
    only = shutil.ignore_patterns("COMMIT", "state.json", "optimizer.safetensors")
    DOORS[door](str(shutil.copytree(folder_of(run_dir, 3), tmp_path / place, ignore=only)))


def test_a_committed_checkpoint_that_lacks_its_lineage_is_damaged_and_not_without_one(
    run_dir: Path,
) -> None:
    (folder_of(run_dir, 3) / "lineage.json").unlink()
    with pytest.raises(CheckpointError, match=r"lineage\.json is missing"):
        load_export(str(folder_of(run_dir, 3)))


def test_damage_is_left_for_its_owner_to_look_at(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder_of(run_dir, 3) / "lineage.json").unlink()
    flip(folder_of(run_dir, 2) / "COMMIT")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.collect_orphans(str(run_dir)) == []
    assert len(list(folder_of(run_dir, 3).iterdir())) == 5
    save(run_dir, snapshot(4), keep_last=1)
    assert folder_of(run_dir, 3).exists() and folder_of(run_dir, 2).exists()


def test_a_copied_run_goes_on_in_its_new_place_and_never_touches_the_original(
    run_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "elsewhere" / "copy"))
    before = {path: path.stat().st_mtime_ns for path in [run_dir, *run_dir.rglob("*")]}
    loaded = load_newest(str(copy))
    assert loaded is not None and loaded.url.startswith(str(copy))
    save(copy, snapshot(4))
    assert before == {path: path.stat().st_mtime_ns for path in [run_dir, *run_dir.rglob("*")]}
    shutil.rmtree(run_dir)
    assert_equal(load_newest(str(copy)), snapshot(4))
    state = json.loads((folder_of(copy, 4) / "state.json").read_text())
    assert not state["ledger"]["name"].startswith("/")
    assert torch.equal(
        load_export(str(copy)).model.state_dict()[k := next(iter(loaded.weights))],
        snapshot(4).weights[k],
    )


@pytest.mark.slow
def test_damage_in_object_storage_is_passed_over_and_an_outage_is_not(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = f"s3://{bucket}/run"
    save(run_dir, *map(snapshot, (1, 2, 3)), keep_last=3)
    newest = checkpoint.find_committed(f"{run_dir}/checkpoints")[-1].url
    for name in FILES:
        url = f"{newest}/{name}"
        sound = storage.read_bytes(url)
        for damaged in (b"", sound[:-1], sound[:9] + b"?" + sound[10:]):
            storage.put_bytes(url, damaged)
            assert_equal(load_newest(run_dir), snapshot(2))
        storage.remove(url)
        assert_equal(load_newest(run_dir), snapshot(2))
        storage.put_bytes(f"{url}/x", b"a folder in its place")
        assert_equal(load_newest(run_dir), snapshot(2))
        storage.remove(url)
        storage.put_bytes(url, sound)
    assert_equal(load_newest(run_dir), snapshot(3))
    monkeypatch.setenv("SEPDIST_STORAGE_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(storage.StorageError):
        load_newest(run_dir)
    with pytest.raises(storage.StorageError):
        load_export(newest)


def test_a_commit_that_is_damaged_in_any_byte_is_ignored_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, snapshot(3), snapshot(4))
    commit = Path(find_committed(str(tmp_path / "checkpoints"))[-1].url) / "COMMIT"
    sound, dice = commit.read_bytes(), random.Random(0)
    for position in range(len(sound)):
        flipped = bytearray(sound)
        flipped[position] ^= dice.randrange(1, 256)
        for damaged in (bytes(flipped), sound[:position]):
            caplog.clear()
            commit.write_bytes(damaged)
            assert [one.step for one in find_committed(str(tmp_path / "checkpoints"))] == [3]
            assert f"{commit} is damaged" in caplog.text and "ignored" in caplog.text
    assert_equal(load_newest(str(tmp_path)), snapshot(3))
    assert collect_orphans(str(tmp_path)) == []  # it was committed once: not ours to remove
    commit.write_bytes(sound)
    assert_equal(load_newest(str(tmp_path)), snapshot(4))


def test_a_commit_of_a_later_format_is_ignored_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, snapshot(3), snapshot(4))
    path = Path(find_committed(str(tmp_path / "checkpoints"))[-1].url) / "COMMIT"
    commit = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "sha256"}
    later = commit | {"format": 3}
    path.write_text(json.dumps(later | {"sha256": checkpoint._digest(later)}))
    assert_equal(load_newest(str(tmp_path)), snapshot(3))
    assert "is of format 3" in caplog.text
