"""Checkpoints and hand-off: a snapshot of a run in, a folder that is either whole or not there out; and back.

    run_dir/checkpoints/step-000000500-<unique>/
        model.safetensors   fp32 weights            model.yaml     what builds the model, and its sample rate
        optimizer.safetensors  whole tensors        lineage.json   run, step, hash, and the parent's lineage
        state.json          counters, ledger        COMMIT         sizes and sha256 of the others, put last

A folder without COMMIT does not exist for any reader. Tensors are stored whole, not by rank, so a checkpoint loads at
any world size and ZeRO stage; no file is a pickle. A checkpoint is also an export (training/export.py).
"""

import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import yaml
from torch import Tensor

from sepdist import storage
from sepdist.training.ledger import Entry, Link, put_segment

logger = logging.getLogger(__name__)

COMMIT = "COMMIT"
COLLECTED = b'{"collected": true}'  # a COMMIT that keeps another writer from putting its own
FORMAT = 1  # of COMMIT


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another model."""


@dataclass
class OptimizerState:
    """Optimizer state by parameter, whatever the world size or ZeRO stage that held it."""

    tensors: dict[str, Tensor]  # "exp_avg/<parameter>" -> tensor of the parameter's shape
    scalars: dict[str, float]  # "step" -> ..., common to all parameters


@dataclass
class Snapshot:
    """All that a run needs to go on: tensors on CPU that nobody else writes to, and JSON-able counters."""

    step: int
    weights: dict[str, Tensor]
    optimizer: OptimizerState
    state: dict[str, Any]
    score: float | None = (
        None  # validation score, higher is better; None where none was taken at this step
    )
    ledger: list[Entry] = field(
        default_factory=list
    )  # what all ranks consumed since the snapshot before
    url: str = ""  # where it was read from


@dataclass(frozen=True)
class Committed:
    """A checkpoint whose COMMIT could be read."""

    url: str
    step: int
    score: float | None
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)


class Checkpointer:
    """Writes snapshots in the background, at most one at a time; only the main rank has one.

    Where storage fails for longer than its own retries last, the run goes on without that checkpoint, up to
    `max_failed` times in a row; `num_failed` counts them all. A failure of the last one is always raised.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        model_node: Mapping[str, Any],
        sample_rate: int,
        outputs: Mapping[str, int] | None = None,
        lineage: Mapping[str, Any],
        keep_last: int,
        keep_best: bool,
        keep_every: int = 0,
        max_failed: int = 3,
        previous: Link | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.folder = storage.join(run_dir, "checkpoints")
        card = {"model": dict(model_node), "sample_rate": sample_rate, **(outputs or {})}
        self.model_yaml = yaml.safe_dump(card, sort_keys=False)
        self.lineage = dict(lineage)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every = keep_every
        self._previous = previous  # the ledger segment of the newest commit
        self._consumed: list[Entry] = []  # since then
        self.max_failed = max_failed
        self.num_failed = 0
        self._failed_in_a_row = 0
        self._unfinished: list[str] = []  # folders of saves that failed
        self._newest: Committed | None = None  # of those written here
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Hand the snapshot to the writer, once the one before it is done.

        Raises:
            StorageError: more than `max_failed` snapshots in a row could not be written.
        """
        self.settle()
        self._pending = self._pool.submit(self._write, snapshot)

    def settle(self) -> None:
        """Return once the last snapshot handed over is committed, or has failed and may be done without.

        Raises:
            StorageError: more than `max_failed` snapshots in a row could not be written.
        """
        try:
            self.wait()
        except OSError as error:
            self._tolerate(error)

    def wait(self) -> None:
        """Return once the last snapshot handed over is committed; raises what went wrong with it."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
            self._failed_in_a_row = 0

    def close(self) -> None:
        """Commit what is pending, read the last checkpoint back to check it, and end the writer."""
        try:
            self.wait()
            if self._newest is not None:
                _check(self._newest)
        finally:
            self._pool.shutdown()

    def _tolerate(self, error: OSError) -> None:
        self.num_failed += 1
        self._failed_in_a_row += 1
        since = "" if self._newest is None else f", none since step {self._newest.step}"
        what = f"{error} (checkpoint not written, {self._failed_in_a_row} in a row{since})"
        if self._failed_in_a_row > self.max_failed:
            raise storage.StorageError(
                f"{what}; {self.max_failed} in a row are allowed, the run ends"
            ) from error
        logger.warning("%s; the run goes on, %d in a row are allowed", what, self.max_failed)

    def _write(self, snapshot: Snapshot) -> None:
        # A name of its own for every write: a step may come twice, after a rollback or in a second attempt.
        name = f"step-{snapshot.step:09d}-{uuid.uuid4().hex[:8]}"
        url = storage.join(self.folder, name)
        self._consumed += snapshot.ledger
        ledger = put_segment(self.run_dir, name, self._consumed, self._previous)
        weights = safetensors.torch.save(
            {name: value.contiguous() for name, value in snapshot.weights.items()}
        )
        lineage = self.lineage | {
            "step": snapshot.step,
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        state = {
            "step": snapshot.step,
            "optimizer_scalars": snapshot.optimizer.scalars,
            "ledger": asdict(ledger),
        }
        state = snapshot.state | state
        contents = {
            "model.safetensors": weights,
            "optimizer.safetensors": safetensors.torch.save(snapshot.optimizer.tensors),
            "state.json": json.dumps(state).encode(),
            "model.yaml": self.model_yaml.encode(),
            "lineage.json": json.dumps(lineage, indent=1).encode(),
        }
        files = {
            name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
            for name, d in contents.items()
        }
        commit: dict[str, Any] = {
            "format": FORMAT,
            "step": snapshot.step,
            "score": snapshot.score,
            "files": files,
        }
        commit["sha256"] = _digest(commit)
        try:
            for name, data in contents.items():
                storage.put_bytes(storage.join(url, name), data)
            storage.put_bytes(
                storage.join(url, COMMIT), json.dumps(commit).encode(), create_only=True
            )
        except OSError:
            self._unfinished.append(url)
            if not storage.is_remote(url):  # at once, else a full disk would stay full
                with contextlib.suppress(OSError):
                    storage.remove(url)
            raise
        self._newest = Committed(url, snapshot.step, snapshot.score, files)
        self._previous, self._consumed = ledger, []
        try:
            self._prune(self._newest)
        except OSError as error:
            logger.warning("%s; what is to go is tried again after the next checkpoint", error)

    def _prune(self, written: Committed) -> None:
        """Remove what `keep_last`, `keep_best` and `keep_every` do not name; `written` and later steps stay.

        Later steps are what another attempt left; they may be damaged, so they take no place among the last.
        """
        committed = find_committed(self.folder)
        if written.url not in {one.url for one in committed}:
            todo = "this one ends; if both are wanted, give them different run_dirs"
            raise CheckpointError(
                f"{written.url} was removed by another attempt of this run: {todo}"
            )
        until_now = [
            one for one in committed if one.step <= written.step and one.url != written.url
        ]
        keep = {written.url} | {one.url for one in [*until_now, written][-self.keep_last :]}
        if self.keep_every:
            keep |= {one.url for one in committed if one.step % self.keep_every == 0}
        if self.keep_best and (best := best_of(committed)) is not None:
            keep.add(best.url)
        for url in set(self._unfinished) - {one.url for one in committed}:
            storage.remove(url)
        self._unfinished.clear()
        for one in until_now:
            if one.url not in keep:
                storage.remove(
                    storage.join(one.url, COMMIT)
                )  # first, so that a torn removal is never loadable
                storage.remove(one.url)


def _digest(commit: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(commit, sort_keys=True).encode()).hexdigest()


def parse_commit(url: str) -> Committed:
    """What the COMMIT of a folder says; CheckpointError where it is damaged or of a later sepdist."""
    raw = storage.read_bytes(storage.join(url, COMMIT))
    if raw == COLLECTED:
        raise FileNotFoundError(f"{url}: is being removed, it was never finished")
    try:
        commit = json.loads(raw)
        files, its_format = dict(commit["files"]), commit["format"]
        if commit.pop("sha256") != _digest(commit):
            raise ValueError("its sha256 is another")
        one = Committed(url, int(commit["step"]), commit["score"], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{url}/{COMMIT} is damaged ({type(error).__name__}: {error})"
        ) from None
    if its_format != FORMAT:
        raise CheckpointError(
            f"{url}/{COMMIT} is of format {its_format}, this sepdist reads up to {FORMAT}"
        )
    return one


def _read_commit(url: str) -> Committed | None:
    """`parse_commit`, or None where the checkpoint is unfinished, collected, or lacks files that it names."""
    names = storage.list_names(url)  # before COMMIT is read: a removal takes COMMIT first
    if COMMIT not in names:
        return None
    try:
        one = parse_commit(url)
    except FileNotFoundError:
        return None
    missing = sorted(set(one.files) - set(names))
    if missing:
        # An attempt that was thought dead committed a folder of which its successor had collected the first files.
        logger.warning(
            "%s: committed, but %s is missing; the checkpoint is left out", url, ", ".join(missing)
        )
        return None
    return one


def _scan(folder: str) -> tuple[list[Committed], list[str], list[CheckpointError]]:
    """The checkpoints below `folder`: committed ones by step, urls of unfinished ones, what is wrong with others."""
    committed, unfinished, damaged = [], [], []
    for name in storage.list_names(folder):
        if not name.startswith("step-"):
            continue  # not ours
        url = storage.join(folder, name)
        try:
            one = _read_commit(url)
        except CheckpointError as error:
            logger.warning("%s; the checkpoint is left out, and stays until you remove it", error)
            damaged.append(error)
            continue
        if one is None:
            unfinished.append(url)
        else:
            committed.append(one)
    return sorted(committed, key=lambda one: (one.step, one.url)), unfinished, damaged


def find_committed(folder: str) -> list[Committed]:
    """The committed checkpoints of a `checkpoints` folder, oldest step first; a damaged COMMIT counts as none."""
    return _scan(folder)[0]


def best_of(committed: Sequence[Committed]) -> Committed | None:
    """The one with the highest validation score, the latest of equals; None where none was scored."""
    scored = [one for one in committed if one.score is not None]
    return max(scored, key=lambda one: (one.score, one.step)) if scored else None


def read_file(one: Committed, name: str) -> bytes:
    """A file of a checkpoint, checked against its COMMIT."""
    try:
        expected = one.files[name]
        data = storage.read_bytes(storage.join(one.url, name))
    except (KeyError, FileNotFoundError) as error:
        raise CheckpointError(f"{one.url}: {name} is missing") from error
    if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CheckpointError(
            f"{one.url}: {name} is damaged ({len(data)} bytes, {expected['bytes']} were committed)"
        )
    return data


def _check(one: Committed) -> None:
    """Read a checkpoint back; CheckpointError if it is not what was written."""
    found = _read_commit(one.url)
    if found is None or found.files != one.files:
        raise CheckpointError(
            f"{one.url}: {'gone' if found is None else 'changed'} since it was committed"
        )
    for name in one.files:
        read_file(one, name)


def load_newest(run_dir: str) -> Snapshot | None:
    """The newest committed and undamaged checkpoint of a run; None where there is none.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    folder = storage.join(run_dir, "checkpoints")
    problems: dict[str, CheckpointError] = {}
    while True:
        committed, _, damaged = _scan(folder)
        left = [one for one in committed if one.url not in problems]
        if not left:
            break
        one = left[-1]
        try:
            snapshot = _load(one)
        except CheckpointError as error:
            # The folder is listed anew: if another process removed this one, then because it wrote a newer one.
            logger.warning("%s; falling back to the newest of the others", error)
            problems[one.url] = error
            continue
        logger.info("resuming from %s", one.url)
        return snapshot
    damaged += [problems[one.url] for one in committed]
    if damaged:
        todo = "restore one of them, or remove the folder to start from the beginning"
        raise CheckpointError(
            f"{folder}: no checkpoint is whole: {'; '.join(map(str, damaged))}; {todo}"
        )
    return None


def load_snapshot(url: str) -> Snapshot:
    """One committed checkpoint, verified; CheckpointError if it is missing or damaged."""
    one = _read_commit(url)
    if one is None:
        raise CheckpointError(f"{url}: no committed checkpoint")
    return _load(one)


def _load(one: Committed) -> Snapshot:
    state = json.loads(read_file(one, "state.json"))
    optimizer = OptimizerState(
        safetensors.torch.load(read_file(one, "optimizer.safetensors")), state["optimizer_scalars"]
    )
    weights = safetensors.torch.load(read_file(one, "model.safetensors"))
    return Snapshot(one.step, weights, optimizer, state, one.score, url=one.url)


def collect_orphans(run_dir: str) -> list[str]:
    """Remove the uncommitted folders that earlier attempts left; returns their names. Only before writing starts.

    Their writer may still be alive; then it fails, as no folder is committed and collected at once. What cannot be
    removed stays, with a warning; so do folders with a damaged COMMIT.
    """
    _, unfinished, _ = _scan(storage.join(run_dir, "checkpoints"))
    collected = []
    for url in unfinished:
        try:
            with contextlib.suppress(
                FileExistsError
            ):  # an earlier start was interrupted here, or files are missing
                storage.put_bytes(storage.join(url, COMMIT), COLLECTED, create_only=True)
            if _read_commit(url) is not None:
                continue  # its writer was not dead, and came first
            for name in storage.list_names(url):
                if name != COMMIT:  # the last to go: while it is there nobody can commit
                    storage.remove(storage.join(url, name))
            storage.remove(url)
            collected.append(url.rpartition("/")[2])
        except (OSError, CheckpointError) as error:
            logger.warning("%s; an unfinished checkpoint stays", error)
    return collected
