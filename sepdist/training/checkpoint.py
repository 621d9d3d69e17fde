"""Write and read checkpoints: folders that are either whole or do not exist.

    run_dir/checkpoints/step-000000500-<unique>/
        model.safetensors      fp32 weights       model.yaml    the model's config, its sample rate
        raw.safetensors        of a run with an average of the weights, which model.safetensors is
        optimizer.safetensors  whole tensors      lineage.json  run, step, hash, parent's lineage
        switches.safetensors   label assignments  state.json    counters, ledger
        COMMIT                 sizes and sha256 of all, put last

A folder without COMMIT does not exist for any reader. Tensors are stored whole, not by rank, so a
checkpoint loads at any world size and ZeRO stage; no file is a pickle. A checkpoint is also an
export (sepdist/inference/export.py).
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

import safetensors.torch
import yaml
from torch import Tensor

from sepdist import storage
from sepdist.patience import Patience
from sepdist.reporting import to_json
from sepdist.training.ledger import RunsByRank, SegmentRef, put_segment

logger = logging.getLogger(__name__)

COMMIT = "COMMIT"
SWITCHES = "switches.safetensors"
RAW = "raw.safetensors"
COLLECTED = b'{"collected": true}'  # a COMMIT that keeps another writer from putting its own
FORMAT = 1  # of COMMIT
_MARK = "not_finite"  # of a number that JSON cannot hold
# Errors of one file or folder; any other may mean that storage is away, which is no damage.
_UNREADABLE = {errno.EIO, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EBADMSG}
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class TornError(CheckpointError):
    """A writer that was thought dead committed a folder whose first files had been collected."""


@dataclass
class OptimizerState:
    """Optimizer state by whole parameters, independent of world size and ZeRO stage."""

    tensors: dict[str, Tensor]  # "exp_avg/<parameter>" -> tensor of the parameter's shape
    scalars: dict[str, float]  # "step" -> ..., the same for all parameters


@dataclass
class Snapshot:
    """The contents of a checkpoint: tensors on CPU that nobody else writes to, and counters."""

    step: int
    weights: dict[str, Tensor]
    optimizer: OptimizerState
    state: dict[str, Any]
    score: float | None = None  # validation score, higher is better; None if there was none
    ledger: list[RunsByRank] = field(default_factory=list)  # since the snapshot before
    tables: Mapping[str, Any] = field(default_factory=dict)  # of the SwitchTracker
    url: str = ""  # where it was read from
    lineage: Mapping[str, Any] = field(default_factory=dict)  # as it was read
    average: dict[str, Tensor] = field(default_factory=dict)  # of the weights, if the run has one


@dataclass(frozen=True)
class Committed:
    """A checkpoint with a valid COMMIT."""

    url: str
    step: int
    score: float | None
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)


@dataclass
class Checkpointer:
    """Writes snapshots in the background, one at a time and in order, on the main rank.

    If storage fails the run goes on without that checkpoint, until all writes have failed for
    `patience_seconds`; `num_failed` counts the checkpoints that were given up. For the last
    checkpoint of a run a failure is always an error.
    """

    run_dir: str
    _: KW_ONLY
    model_node: Mapping[str, Any]
    sample_rate: int
    outputs: Mapping[str, int] = field(default_factory=dict)  # OUTPUT_RULES of the objective
    lineage: dict[str, Any]
    keep_last: int
    keep_best: bool
    keep_every: int = 0
    patience_seconds: float = 600.0
    previous: SegmentRef | None = None  # the ledger segment of the newest commit
    num_failed: int = 0

    def __post_init__(self) -> None:
        self.folder = storage.join(self.run_dir, "checkpoints")
        self._consumed: list[RunsByRank] = []  # since the newest commit
        self._patience = Patience(self.patience_seconds, "checkpoint")
        self._failure: OSError | None = None  # of the last write, if it is tolerated
        self._fatal: Exception | None = None
        self._unfinished: list[str] = []  # folders of saves that failed
        self._newest: Committed | None = None  # of those written here
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._lock = threading.Lock()
        self._next: tuple[Snapshot, Future[None] | None] | None = None
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot, after: Future[None] | None = None) -> None:
        """Write a snapshot in the background after the one before; commit it after `after`.

        While storage fails it does not wait, but takes the place of one that does, so that there
        are never more than two. StorageError if nothing could be written for `patience_seconds`.
        """
        self.settle()
        with self._lock:
            if self._next is None:
                self._pending = self._pool.submit(self._write_next)
            else:
                given_up = self._next[0]
                self.num_failed += 1
                logger.warning("the checkpoint of step %d gives way to a newer one", given_up.step)
                snapshot.ledger = given_up.ledger + snapshot.ledger
            self._next = snapshot, after

    def settle(self, *, also_failing: bool = False) -> None:
        """Wait until the snapshots are committed or have failed, or while storage does not fail.

        StorageError if nothing could be written for `patience_seconds`.
        """
        while self._pending and not self._pending.done():
            if storage.failing() and not also_failing:
                return
            futures.wait([self._pending], timeout=0.2)
        if self._fatal:
            raise self._fatal

    def wait(self) -> None:
        """Wait until the last snapshot is committed; raises the error of its writer."""
        if self._pending is not None:
            self._pending.result()
            if self._failure:
                raise self._failure

    def close(self) -> None:
        """Wait for the last snapshot, read it back to check it, and end the writer."""
        try:
            self.wait()
            if self._newest is not None:
                _check(self._newest)
        finally:
            self._pool.shutdown()

    def _write_next(self) -> None:
        with self._lock:
            assert self._next
            (snapshot, after), self._next = self._next, None
        began = time.monotonic()
        try:
            try:
                self._write(snapshot, after)
                self._failure = None
                self._patience.succeeded()
            except OSError as error:
                self.num_failed += 1
                self._failure = error
                self._patience.failed(error, began)
        except Exception as error:
            self._fatal = error
            raise

    def _write(self, snapshot: Snapshot, after: Future[None] | None = None) -> None:
        # A unique name, because another attempt may write the same step.
        name = f"step-{snapshot.step:09d}-{uuid.uuid4().hex[:8]}"
        url = storage.join(self.folder, name)
        self._consumed += snapshot.ledger
        ledger = put_segment(self.run_dir, name, self._consumed, self.previous)
        contents = self._contents(snapshot, ledger)
        files = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents.items()
        }
        score = snapshot.score
        commit: dict[str, Any] = {"format": FORMAT, "step": snapshot.step, "score": score}
        if score is not None and not math.isfinite(score):
            commit |= {"score": None, _MARK: str(score)}
        commit["files"] = files
        commit["sha256"] = _digest(commit)
        try:
            for name, data in contents.items():
                storage.put_bytes(storage.join(url, name), data)
            if after:
                after.result()
            storage.put_bytes(storage.join(url, COMMIT), to_json(commit).encode(), create_only=True)
        except OSError:
            self._unfinished.append(url)
            if not storage.is_remote(url):  # at once, else a full disk would stay full
                with contextlib.suppress(OSError):
                    storage.remove(url)
            raise
        self._newest = Committed(url, snapshot.step, commit["score"], files)
        self.previous, self._consumed = ledger, []
        try:
            self._prune(self._newest)
        except OSError as error:
            logger.warning("%s; old checkpoints are removed after the next one", error)

    def _contents(self, snapshot: Snapshot, ledger: SegmentRef) -> dict[str, bytes]:
        """Return the files of a checkpoint but COMMIT."""
        card = {"model": dict(self.model_node), "sample_rate": self.sample_rate, **self.outputs}
        weights = _save(snapshot.average or snapshot.weights)
        sha256 = hashlib.sha256(weights).hexdigest()
        lineage = self.lineage | {"step": snapshot.step, "sha256": sha256}
        state = snapshot.state | {
            "step": snapshot.step,
            "optimizer_scalars": snapshot.optimizer.scalars,
            "ledger": asdict(ledger),
        }
        more = {SWITCHES: dict(snapshot.tables), RAW: snapshot.average and snapshot.weights}
        return {
            "model.safetensors": weights,
            "optimizer.safetensors": _save(snapshot.optimizer.tensors),
            "state.json": to_json(state, lambda number: {_MARK: str(number)}).encode(),
            "model.yaml": yaml.safe_dump(card, sort_keys=False).encode(),
            "lineage.json": to_json(lineage, indent=1).encode(),
        } | {name: _save(tensors) for name, tensors in more.items() if tensors}

    def _prune(self, written: Committed) -> None:
        """Remove earlier checkpoints but those that `keep_last`, `keep_best` and `keep_every` keep.

        Later steps are of another attempt and stay; they may be damaged, so they do not count among
        the last.
        """
        committed = find_committed(self.folder)
        if written.url not in {one.url for one in committed}:
            raise CheckpointError(
                f"{written.url} was removed by another attempt of this run, or cannot be read: "
                "this one ends; to keep both, give them different run_dirs"
            )
        earlier = [one for one in committed if one.step <= written.step and one.url != written.url]
        keep = {written.url} | {one.url for one in [*earlier, written][-self.keep_last :]}
        if self.keep_every:
            keep |= {one.url for one in committed if one.step % self.keep_every == 0}
        if self.keep_best and (best := best_of(committed)) is not None:
            keep.add(best.url)
        for url in set(self._unfinished) - {one.url for one in committed}:
            storage.remove(url)
        self._unfinished.clear()
        for url in (one.url for one in earlier if one.url not in keep):
            # COMMIT first, so that a removal that is interrupted leaves nothing loadable.
            storage.remove(storage.join(url, COMMIT))
            storage.remove(url)


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})


@contextlib.contextmanager
def _unreadable_is_damage() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if getattr(error.__cause__, "errno", error.errno) not in _UNREADABLE:
            raise
        raise CheckpointError(str(error)) from error


def _digest(commit: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(commit, sort_keys=True).encode()).hexdigest()


def parse_commit(url: str) -> Committed:
    """Read the COMMIT of a folder; CheckpointError if it is damaged or of a later sepdist.

    FileNotFoundError if there is none, or the folder is being removed.
    """
    with _unreadable_is_damage():
        raw = storage.read_bytes(storage.join(url, COMMIT))
    if raw == COLLECTED:
        raise FileNotFoundError(f"{url}: is being removed, it was never finished")
    try:
        commit = json.loads(raw)
        files, its_format = dict(commit["files"]), commit["format"]
        if commit.pop("sha256") != _digest(commit):
            raise ValueError("its sha256 is another")
        score = None if commit["score"] is None else float(commit["score"])
        one = Committed(url, int(commit["step"]), score, files)
        _ = [(file["bytes"], file["sha256"]) for file in files.values()]
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{url}/{COMMIT} is damaged ({reason})") from None
    if its_format != FORMAT:
        raise CheckpointError(
            f"{url}/{COMMIT} is of format {its_format!r}, this sepdist reads up to {FORMAT}"
        )
    return one


def _read_commit(url: str) -> Committed | None:
    """Return `parse_commit`; None if unfinished or collected, CheckpointError if damaged."""
    with _unreadable_is_damage():
        names = storage.list_names(url)  # before COMMIT is read: a removal takes COMMIT first
    if COMMIT not in names:
        return None
    try:
        one = parse_commit(url)
    except FileNotFoundError:
        return None
    if missing := sorted(set(one.files) - set(names)):
        kind = TornError if "model.safetensors" in missing else CheckpointError  # put first
        raise kind(f"{url}: it is committed, but {', '.join(missing)} is missing")
    if f"/step-{one.step:09d}-" not in url:
        raise CheckpointError(f"{url}/{COMMIT} is damaged (it is of step {one.step})")
    return one


def _scan(folder: str) -> tuple[list[Committed], list[str], list[CheckpointError]]:
    """Return committed checkpoints by step, urls of unfinished ones, and errors of the others."""
    committed, unfinished, damaged = [], [], []
    for name in storage.list_names(folder):
        if not name.startswith("step-"):
            continue  # not ours
        url = storage.join(folder, name)
        try:
            if one := _read_commit(url):
                committed.append(one)
            else:
                unfinished.append(url)
        except CheckpointError as error:
            logger.warning("%s; the checkpoint is ignored", error)
            damaged.append(error)
            unfinished += [url] * isinstance(error, TornError)
    return sorted(committed, key=lambda one: (one.step, one.url)), unfinished, damaged


def find_committed(folder: str) -> list[Committed]:
    """Return the committed checkpoints of a `checkpoints` folder, oldest step first.

    One whose COMMIT is damaged is ignored.
    """
    return _scan(folder)[0]


def best_of(committed: Sequence[Committed]) -> Committed | None:
    """Return the one with the highest finite score, the latest of equals; None without scores."""
    scored = [one for one in committed if one.score is not None and math.isfinite(one.score)]
    return max(scored, key=lambda one: (one.score, one.step), default=None)


def read_file(one: Committed, name: str) -> bytes:
    """Read a file of a checkpoint and check it against COMMIT."""
    try:
        expected = one.files[name]
        with _unreadable_is_damage():
            data = storage.read_bytes(storage.join(one.url, name))
    except (KeyError, FileNotFoundError) as error:
        raise CheckpointError(f"{one.url}: {name} is missing") from error
    if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CheckpointError(
            f"{one.url}: {name} is damaged ({len(data)} bytes, {expected['bytes']} were committed)"
        )
    return data


def _check(one: Committed) -> None:
    """Read a checkpoint back; CheckpointError if it is not as written."""
    found = _read_commit(one.url)
    if found is None or found.files != one.files:
        change = "gone" if found is None else "changed"
        raise CheckpointError(f"{one.url}: {change} since it was committed")
    for name in one.files:
        read_file(one, name)


def load_newest(run_dir: str) -> Snapshot | None:
    """Load the newest undamaged checkpoint of a run; None if it has no checkpoints.

    CheckpointError if there are checkpoints, but all are damaged.
    """
    folder = storage.join(run_dir, "checkpoints")
    problems: dict[str, CheckpointError] = {}
    # The folder is listed again after each failure: if another process removed the checkpoint, then
    # because it wrote a newer one.
    while True:
        committed, _, damaged = _scan(folder)
        left = [one for one in committed if one.url not in problems]
        if not left:
            break
        try:
            snapshot = _load(left[-1])
            logger.info("resuming from %s", snapshot.url)
            return snapshot
        except CheckpointError as error:
            logger.warning("%s; falling back to the newest of the others", error)
            problems[left[-1].url] = error
    damaged += [problems[one.url] for one in committed]
    if damaged:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole: {'; '.join(map(str, damaged))}; restore one of "
            "them, or choose another run_dir to start from the beginning"
        )
    return None


def load_snapshot(url: str) -> Snapshot:
    """Load and verify one checkpoint; CheckpointError if it is missing or damaged."""
    one = _read_commit(url)
    if one is None:
        raise CheckpointError(f"{url}: no committed checkpoint")
    return _load(one)


def _load(one: Committed) -> Snapshot:
    # All files, also those that only an evaluation reads.
    contents = {name: read_file(one, name) for name in one.files}
    state = json.loads(
        contents["state.json"],
        object_hook=lambda node: float(node[_MARK]) if node.keys() == {_MARK} else node,
    )
    load, lineage = safetensors.torch.load, json.loads(contents["lineage.json"])
    weights, average = load(contents["model.safetensors"]), {}
    if RAW in contents:
        weights, average = load(contents[RAW]), weights
    optimizer = OptimizerState(load(contents["optimizer.safetensors"]), state["optimizer_scalars"])
    # Older checkpoints have the label switches in state.json.
    tables = load(contents[SWITCHES]) if SWITCHES in contents else state.get("switches", {})
    head = (one.step, weights, optimizer, state, one.score)
    return Snapshot(*head, [], tables, one.url, lineage, average)


def collect_orphans(run_dir: str) -> list[str]:
    """Remove uncommitted folders that earlier attempts left; returns their names.

    To be called before writing starts. A writer that is still alive fails, because no folder can be
    committed and collected at once. What cannot be removed stays, with a warning.
    """
    _, unfinished, _ = _scan(storage.join(run_dir, "checkpoints"))
    collected = []
    for url in filter(re.compile(r"/step-\d{9,}-[0-9a-f]{8}$").search, unfinished):
        try:
            # It exists if an earlier collection was interrupted, or files are missing.
            with contextlib.suppress(FileExistsError):
                storage.put_bytes(storage.join(url, COMMIT), COLLECTED, create_only=True)
            with contextlib.suppress(TornError):
                if _read_commit(url) is not None:
                    continue  # its writer was alive, and came first
            for name in storage.list_names(url):
                if name != COMMIT:  # the last to go: while it is there nobody can commit
                    storage.remove(storage.join(url, name))
            storage.remove(url)
            collected.append(url.rpartition("/")[2])
        except (OSError, CheckpointError) as error:
            logger.warning("%s; an unfinished checkpoint stays", error)
    return collected
