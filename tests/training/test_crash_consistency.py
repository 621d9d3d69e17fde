"""Kill the writer of checkpoints at every operation: commits stay loadable, nothing torn ever is.

An audit hook of Python counts the operations, in a forked child, so that none is missed whatever
storage.py uses; on S3 they are the requests that pass a proxy.
"""

import builtins
import functools
import io
import itertools
import logging
import os
import shutil
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import safetensors.torch
import torch

from sepdist import object_storage, storage
from sepdist.training import checkpoint
from sepdist.training.checkpoint import (
    Checkpointer,
    Snapshot,
    collect_orphans,
    find_committed,
    load_newest,
)
from tests.support.checkpoints import assert_equal, checkpointer, save, snapshot
from tests.support.s3server import FaultyProxy, S3Server

CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.remove",
    "os.rmdir",
    "os.truncate",
}  # audit events
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NEXT = 99  # the step that a new attempt writes to show that the run goes on
SCORES = {1: 1.0, 2: 9.0, 3: None, 4: 2.0, 9: None, NEXT: None}
SNAPSHOTS = {step: snapshot(step, score) for step, score in SCORES.items()}


def in_child(
    body: Callable[[Callable[[bytes], object]], None], started: Callable[[int], object] = id
) -> Any:
    """Run `body(send)` in a forked child; returns its wait status and the bytes that it sent.

    `started` gets its pid before it begins.
    """
    (receiving, sending), (gate, opening) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(120)  # a child that hangs fails its test and not the suite
            os.close(opening)
            os.read(gate, 1)
            body(lambda data: os.write(sending, data))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    started(pid)
    for handle in (sending, gate, opening):  # the last one opens the gate
        os.close(handle)
    with open(receiving, "rb") as pipe:
        data = pipe.read()
    return os.waitpid(pid, 0)[1], data


def was_killed(status: int) -> bool:
    assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), status
    return status != 0


class TwoHalves:
    """A file whose every write is two, with an operation before each."""

    def __init__(self, file: Any, reached: Callable[[], None]) -> None:
        self.file = file
        self.reached = reached

    def write(self, data: bytes) -> None:
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self.reached()
            self.file.write(half)
            self.file.flush()

    def __enter__(self) -> "TwoHalves":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def before_every_operation(reached: Callable[[], None]) -> None:
    """Call `reached` before each change of the disk, for the rest of this (child) process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & WRITING):
            reached()

    fsync, plain_open = os.fsync, io.open

    def traced_fsync(handle: int) -> None:
        reached()
        fsync(handle)

    def traced_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = plain_open(file, mode, *arguments, **options)
        return TwoHalves(opened, reached) if set(mode) & set("wxa+") else opened

    os.fsync, builtins.open = traced_fsync, traced_open  # type: ignore[assignment]
    sys.addaudithook(hook)


def assert_sound(
    run_dir: str, at_least: int, at_most: int, snapshots: Mapping[int, Snapshot] = SNAPSHOTS
) -> None:
    """A start finds a whole checkpoint between the two steps (0: none), and removes torn ones."""
    loaded = load_newest(run_dir)
    step = 0 if loaded is None else loaded.step
    assert at_least <= step <= at_most
    if loaded is not None:
        assert_equal(loaded, snapshots[step])
    collect_orphans(run_dir)
    folder = storage.join(run_dir, "checkpoints")
    committed = find_committed(folder)
    assert storage.list_names(folder) == sorted(one.url.rpartition("/")[2] for one in committed)
    for one in committed:
        wanted = {
            "model": snapshots[one.step].weights,
            "optimizer": snapshots[one.step].optimizer.tensors,
        }
        for name, tensors in wanted.items():
            found = safetensors.torch.load(
                storage.read_bytes(storage.join(one.url, f"{name}.safetensors"))
            )
            assert found.keys() == tensors.keys() and all(
                torch.equal(found[key], tensors[key]) for key in found
            )


def assert_goes_on(run_dir: str) -> None:
    save(run_dir, SNAPSHOTS[NEXT])
    assert_equal(load_newest(run_dir), SNAPSHOTS[NEXT])


@pytest.mark.parametrize(
    ("earlier", "later"), [((), (1,)), ((1, 2), (3, 4))], ids=["first", "later, with removals"]
)
def test_a_kill_at_any_operation_on_disk_never_costs_a_commit_nor_leaves_a_torn_checkpoint(
    earlier: Sequence[int], later: Sequence[int], tmp_path: Path
) -> None:
    save(tmp_path / "start", *[SNAPSHOTS[step] for step in earlier])
    if earlier:  # and what a worker left that was killed before them
        orphan = tmp_path / "start" / "checkpoints" / "step-000000009-0000beef"
        shutil.copytree(find_committed(str(orphan.parent))[0].url, orphan)
        (orphan / "COMMIT").unlink()
    for number in itertools.count():
        run_dir = tmp_path / str(number)
        if earlier:
            shutil.copytree(tmp_path / "start", run_dir)

        def body(
            send: Callable[[bytes], object], number: int = number, run_dir: Path = run_dir
        ) -> None:
            operations = itertools.count()
            before_every_operation(
                lambda: next(operations) == number and os.kill(os.getpid(), signal.SIGKILL)
            )
            collect_orphans(str(run_dir))
            writer = checkpointer(run_dir)
            for step in later:
                writer.save(SNAPSHOTS[step])
                writer.wait()
                send(bytes([step]))
            writer.close()

        status, returned = in_child(body)
        last = max([0, *earlier, *returned])
        assert_sound(str(run_dir), at_least=last, at_most=min(last + 1, later[-1]))
        assert_goes_on(str(run_dir))
        shutil.rmtree(run_dir)
        if not was_killed(status):
            break
    assert list(returned) == list(later)
    assert number > 45 * len(later)  # 6 files of at least 7 operations: else the hook saw nothing


def fault_at(
    kind: str, pids: list[int], counter: Iterator[int], number: int, n: int, line: str
) -> str:
    """The fault of a proxied request: `kind`, to the child, at the `number`-th write."""
    is_write = line.startswith(("PUT", "POST"))
    return f"{kind}:{pids[0]}" if is_write and next(counter) == number else ""


@pytest.fixture
def shared_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children inherit botocore's parsed service files: a start takes 0.05 s and not 0.5 s."""
    monkeypatch.setattr(
        botocore.session, "create_loader", functools.cache(botocore.session.create_loader)
    )
    object_storage._connect.cache_clear()


@pytest.mark.parametrize("kind", ["kill", "kill-half", "kill-after"])
def test_a_kill_at_any_request_to_s3_never_costs_a_commit_nor_leaves_a_torn_checkpoint(
    kind: str, bucket: str, s3_env: S3Server, shared_loader: None
) -> None:
    """Before, in the middle of, and after each request that changes something, the answer lost.

    A kill at one that only reads leaves the same objects as a kill before the next change.
    """
    run_dir, snapshots = f"s3://{bucket}/run", dict(SNAPSHOTS)
    save(run_dir, SNAPSHOTS[1], keep_last=1)
    for number in itertools.count():  # the run lives on, from kill to kill
        last, step = 2 * number + 1, 2 * number + 2
        snapshots |= {one: snapshot(one) for one in (step, step + 1)}
        pids: list[int] = []
        counter = itertools.count()
        proxy = FaultyProxy(
            s3_env.ports["s3"],
            functools.partial(fault_at, kind, pids, counter, number),
        )

        def body(
            send: Callable[[bytes], object], step: int = step, endpoint: str = proxy.endpoint
        ) -> None:
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            writer = checkpointer(run_dir, keep_last=1)
            writer.save(snapshots[step])  # noqa: B023 - forked and ended in this round
            writer.wait()
            send(bytes([step]))
            writer.close()

        status, returned = in_child(body, pids.append)
        proxy.close()
        assert_sound(run_dir, max([last, *returned]), step, snapshots)
        save(
            run_dir, snapshots[step + 1], keep_last=1
        )  # it goes on, and catches up with its removals
        assert_sound(run_dir, step + 1, step + 1, snapshots)
        if not was_killed(status):
            break
    assert number >= 6 + 5  # the puts, and what removes the checkpoint before


def test_a_loss_of_power_leaves_what_was_committed_and_nothing_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each flush, check two possible disks: one with the flushed names, one with all names.

    Both have the flushed contents only.
    """
    run_dir = tmp_path / "run"
    names: dict[int, list[os.DirEntry[str]]] = {}
    contents: dict[int, bytes] = {}
    returned, handles, fsync, numbers = [0], [], os.fsync, itertools.count()

    def rebuild(folder: Path, entries: list[os.DirEntry[str]], flushed_names: bool) -> None:
        folder.mkdir()
        for one in entries:
            if not one.is_dir():
                (folder / one.name).write_bytes(contents.get(one.inode(), b""))
            else:
                below = names.get(one.inode(), []) if flushed_names else list(os.scandir(one.path))
                rebuild(folder / one.name, below, flushed_names)

    def check() -> None:
        for flushed_names in (True, False):
            found = tmp_path / f"found-{next(numbers)}"
            top = (
                names.get(tmp_path.stat().st_ino, [])
                if flushed_names
                else list(os.scandir(tmp_path))
            )
            rebuild(found, [one for one in top if one.name == "run"], flushed_names)
            loaded = load_newest(str(found / "run"))
            assert returned[-1] <= (0 if loaded is None else loaded.step)
            if loaded is not None:
                assert_equal(loaded, SNAPSHOTS[loaded.step])
            shutil.rmtree(found)

    def noting(handle: int) -> None:
        fsync(handle)
        handles.append(os.dup(handle))  # else its inode number would be used again
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            names[status.st_ino] = list(os.scandir(os.readlink(f"/proc/self/fd/{handle}")))
            for one in names[status.st_ino]:
                one.is_dir(), one.inode()  # both are kept in the entry
        else:
            contents[status.st_ino] = os.pread(handle, status.st_size, 0)
        check()

    monkeypatch.setattr(os, "fsync", noting)
    writer = checkpointer(run_dir, keep_last=1)
    for step in (1, 2, 3):
        writer.save(SNAPSHOTS[step])
        writer.wait()
        returned.append(step)
        check()
    writer.close()
    for handle in handles:
        os.close(handle)


def new_attempt(run_dir: str) -> None:
    """What another worker does that took the one before for dead."""
    load_newest(run_dir)
    collect_orphans(run_dir)
    save(run_dir, SNAPSHOTS[2], SNAPSHOTS[3], keep_last=1, keep_best=False)


def finish(writer: Checkpointer, step: int) -> None:
    """End the save of a worker that was thought dead; it may fail, as its files were removed."""
    writer.save(SNAPSHOTS[step])
    try:
        writer.close()
    except (OSError, checkpoint.CheckpointError) as error:
        logging.getLogger(__name__).info("%s", error)


@pytest.mark.parametrize("step", [2, 9])
def test_a_worker_that_writes_on_while_a_new_attempt_collects_never_makes_a_torn_checkpoint_on_disk(
    step: int, tmp_path: Path
) -> None:
    save(tmp_path / "start", SNAPSHOTS[1])
    for number in itertools.count():
        run_dir = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", run_dir)

        def body(
            send: Callable[[bytes], object], number: int = number, run_dir: Path = run_dir
        ) -> None:
            operations = itertools.count()
            interrupted = False

            def reached() -> None:
                nonlocal interrupted
                if not interrupted and next(operations) == number:
                    interrupted = True
                    new_attempt(str(run_dir))

            before_every_operation(reached)
            finish(checkpointer(run_dir, keep_last=1, keep_best=False), step)
            send(b"interrupted" if interrupted else b"")

        status, interrupted = in_child(body)
        assert status == 0
        if not interrupted:
            break
        assert_sound(str(run_dir), at_least=3, at_most=9)
        shutil.rmtree(run_dir)
    assert number > 50


def test_a_worker_that_commits_while_a_new_attempt_collects_never_costs_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    """The other way round: the collector is held up before each of its operations."""
    save(tmp_path / "start", SNAPSHOTS[1])
    for number in itertools.count():
        run_dir = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", run_dir)
        old = checkpointer(run_dir, keep_last=1, keep_best=False)

        def body(
            send: Callable[[bytes], object],
            number: int = number,
            run_dir: Path = run_dir,
            old: Any = old,
        ) -> None:
            operations, put, held_up = itertools.count(), storage.put_bytes, False

            def reached() -> None:
                nonlocal held_up
                if (
                    threading.current_thread() is threading.main_thread()
                    and next(operations) == number
                ):
                    held_up = True
                    collecting.set()  # the old worker goes on with its COMMIT, to its end
                    ended.wait()

            def waiting_before_commit(url: str, data: bytes, *, create_only: bool = False) -> None:
                if create_only and data != checkpoint.COLLECTED:
                    at_commit.set()
                    collecting.wait()
                put(url, data, create_only=create_only)

            def finish_old() -> None:
                finish(old, 9)
                ended.set()

            at_commit, collecting, ended = threading.Event(), threading.Event(), threading.Event()
            storage.put_bytes = waiting_before_commit
            thread = threading.Thread(target=finish_old)
            thread.start()
            at_commit.wait()
            before_every_operation(reached)
            collect_orphans(str(run_dir))
            send(b"held up" if held_up else b"")
            collecting.set()
            thread.join()

        status, held_up = in_child(body)
        assert status == 0
        assert_sound(str(run_dir), at_least=1, at_most=9)
        shutil.rmtree(run_dir)
        if not held_up:
            break
    assert number > 10


def test_a_worker_that_writes_on_while_a_new_attempt_collects_never_makes_a_torn_checkpoint_on_s3(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = object_storage.request
    for number in itertools.count():
        run_dir = f"s3://{bucket}/{number}"
        save(run_dir, SNAPSHOTS[1])
        requests, interrupted = itertools.count(), False

        def interrupting(
            method: str,
            *,
            requests: Iterator[int] = requests,
            run_dir: str = run_dir,
            number: int = number,
            **rest: Any,
        ) -> Any:
            nonlocal interrupted
            if not interrupted and next(requests) == number:
                interrupted = True
                new_attempt(run_dir)
            return request(method, **rest)

        monkeypatch.setattr(object_storage, "request", interrupting)
        finish(checkpointer(run_dir, keep_last=1, keep_best=False), 9)
        monkeypatch.setattr(object_storage, "request", request)
        if not interrupted:
            break
        assert_sound(run_dir, at_least=3, at_most=9)
    assert number >= 6 + 5


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, SNAPSHOTS[1], SNAPSHOTS[2])
    read = storage.read_bytes

    def late(url: str, *limits: int) -> bytes:
        if url.endswith("optimizer.safetensors"):
            monkeypatch.setattr(storage, "read_bytes", read)
            save(tmp_path, SNAPSHOTS[3], SNAPSHOTS[4], keep_last=1, keep_best=False)
        return read(url, *limits)

    monkeypatch.setattr(storage, "read_bytes", late)
    assert_equal(load_newest(str(tmp_path)), SNAPSHOTS[4])
    assert [one.step for one in find_committed(str(tmp_path / "checkpoints"))] == [4]


def test_snapshots_of_these_tests_differ() -> None:
    """Else a mixed-up checkpoint would go unnoticed."""
    one, other = SNAPSHOTS[1], SNAPSHOTS[2]
    assert isinstance(one, Snapshot)
    assert any(not torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
