"""Checkpoints and hand-off: a snapshot of a run in, a folder that is either whole or not there out; and back.

    run_dir/checkpoints/step-000000500-<attempt>/
        model.safetensors   fp32 weights            model.yaml     what builds the model, and its sample rate
        optimizer.safetensors  whole tensors        lineage.json   run, step, hash, and the parent's lineage
        state.json          counters, ledger        COMMIT         sizes and sha256 of the others, put last

A folder without COMMIT does not exist for any reader. Tensors are stored whole, not by rank, so a checkpoint loads at
any world size and ZeRO stage; no file is a pickle. A checkpoint is also an export: `load_export` takes it, or its
run_dir (the best one of it), or any folder with model.safetensors and model.yaml.
"""

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
from torch import Tensor, nn

from sepdist import config, storage
from sepdist.training.ledger import Entry, Link, put_segment

logger = logging.getLogger(__name__)

COMMIT = "COMMIT"


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
    score: float | None = None  # validation score, higher is better; None where none was taken at this step
    ledger: list[Entry] = field(default_factory=list)  # what all ranks consumed since the snapshot before


@dataclass(frozen=True)
class Committed:
    """A checkpoint whose COMMIT could be read."""

    url: str
    step: int
    score: float | None
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)


@dataclass
class Export:
    """A model ready for use, and where it comes from."""

    model: nn.Module
    sample_rate: int
    lineage: dict[str, Any]
    url: str


class Checkpointer:
    """Writes snapshots in the background, at most one at a time; only the main rank has one."""

    def __init__(
        self,
        run_dir: str,
        *,
        model_node: Mapping[str, Any],
        sample_rate: int,
        lineage: Mapping[str, Any],
        keep_last: int,
        keep_best: bool,
        previous: Link | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.folder = storage.join(run_dir, "checkpoints")
        self.model_yaml = yaml.safe_dump({"model": dict(model_node), "sample_rate": sample_rate}, sort_keys=False)
        self.lineage = dict(lineage)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._attempt = uuid.uuid4().hex[:8]
        self._previous = previous  # the ledger segment of the newest commit
        self._consumed: list[Entry] = []  # since then
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Hand the snapshot to the writer; waits only for the one before it, and raises what went wrong with that."""
        self.wait()
        self._pending = self._pool.submit(self._write, snapshot)

    def wait(self) -> None:
        """Return once the pending checkpoint is committed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Commit what is pending and end the writer."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        name = f"step-{snapshot.step:09d}-{self._attempt}"
        url = storage.join(self.folder, name)
        self._consumed += snapshot.ledger
        ledger = put_segment(self.run_dir, name, self._consumed, self._previous)
        weights = safetensors.torch.save({name: value.contiguous() for name, value in snapshot.weights.items()})
        lineage = self.lineage | {"step": snapshot.step, "sha256": hashlib.sha256(weights).hexdigest()}
        state = {"step": snapshot.step, "optimizer_scalars": snapshot.optimizer.scalars, "ledger": asdict(ledger)}
        state = snapshot.state | state
        contents = {
            "model.safetensors": weights,
            "optimizer.safetensors": safetensors.torch.save(snapshot.optimizer.tensors),
            "state.json": json.dumps(state).encode(),
            "model.yaml": self.model_yaml.encode(),
            "lineage.json": json.dumps(lineage, indent=1).encode(),
        }
        for name, data in contents.items():
            storage.put_bytes(storage.join(url, name), data)
        files = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in contents.items()}
        commit = {"format": 1, "step": snapshot.step, "score": snapshot.score, "files": files}
        storage.put_bytes(storage.join(url, COMMIT), json.dumps(commit).encode(), create_only=True)
        self._previous, self._consumed = ledger, []
        self._prune()

    def _prune(self) -> None:
        committed = find_committed(self.folder)
        keep = {one.url for one in committed[-self.keep_last :]}
        if self.keep_best and (best := best_of(committed)) is not None:
            keep.add(best.url)
        for one in committed:
            if one.url not in keep:
                storage.remove(storage.join(one.url, COMMIT))  # first, so that a torn removal is never loadable
                storage.remove(one.url)


def find_committed(folder: str) -> list[Committed]:
    """The committed checkpoints of a `checkpoints` folder, oldest step first; a torn COMMIT counts as none."""
    found = []
    for name in storage.list_names(folder):
        url = storage.join(folder, name)
        try:
            commit = json.loads(storage.read_bytes(storage.join(url, COMMIT)))
            found.append(Committed(url, int(commit["step"]), commit["score"], commit["files"]))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            logger.warning("%s/%s is not readable; the checkpoint is left out", url, COMMIT)
    return sorted(found, key=lambda one: (one.step, one.url))


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
        raise CheckpointError(f"{one.url}: {name} is damaged ({len(data)} bytes, {expected['bytes']} were committed)")
    return data


def load_newest(run_dir: str) -> Snapshot | None:
    """The newest committed and undamaged checkpoint of a run; None where there is none."""
    for one in reversed(find_committed(storage.join(run_dir, "checkpoints"))):
        try:
            state = json.loads(read_file(one, "state.json"))
            optimizer = safetensors.torch.load(read_file(one, "optimizer.safetensors"))
            weights = safetensors.torch.load(read_file(one, "model.safetensors"))
        except CheckpointError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
            continue
        logger.info("resuming from %s", one.url)
        return Snapshot(one.step, weights, OptimizerState(optimizer, state["optimizer_scalars"]), state, one.score)
    return None


def collect_orphans(run_dir: str) -> list[str]:
    """Remove the uncommitted folders that earlier attempts left; returns their names. Only before writing starts."""
    folder = storage.join(run_dir, "checkpoints")
    committed = {one.url for one in find_committed(folder)}
    orphans = [name for name in storage.list_names(folder) if storage.join(folder, name) not in committed]
    for name in orphans:
        storage.remove(storage.join(folder, name))
    return orphans


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], reinit: Sequence[str] = (), source: str = ""
) -> list[str]:
    """Copy `weights` into `model`; returns the names that keep their fresh values, which `reinit` prefixes name.

    Raises:
        CheckpointError: any other parameter is missing, unexpected, or of another shape, or a prefix names nothing.
    """
    own = model.state_dict()

    def fresh(name: str) -> bool:
        return any(name == prefix or name.startswith(prefix.rstrip(".") + ".") for prefix in reinit)

    kept = sorted(name for name in own if fresh(name))
    for prefix in reinit:
        if not any(name == prefix or name.startswith(prefix.rstrip(".") + ".") for name in own):
            raise CheckpointError(f"init.reinit: no parameter of {type(model).__name__} begins with {prefix!r}")
    wanted = {name for name in own if not fresh(name)}
    given = {name for name in weights if not fresh(name)}
    problems = [f"missing {name}" for name in sorted(wanted - given)]
    problems += [f"unexpected {name}" for name in sorted(given - wanted)]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in sorted(wanted & given)
        if weights[name].shape != own[name].shape
    ]
    if problems:
        outputs = list(getattr(model, "output_parameters", ()))
        hint = f"; to start the output layer afresh set init.reinit={outputs}" if outputs else ""
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{source or 'these weights'} are not of this {type(model).__name__}: {shown}{hint}")
    model.load_state_dict({name: weights[name] for name in wanted} | {name: own[name] for name in kept})
    return kept


def find_export(url: str) -> str:
    """The folder of model.safetensors that `url` means: itself, or the best (else newest) checkpoint of a run_dir."""
    if storage.exists(storage.join(url, "model.safetensors")):
        return url
    committed = find_committed(storage.join(url, "checkpoints"))
    if not committed:
        raise CheckpointError(
            f"{url}: neither a folder with model.safetensors nor a run_dir with a finished checkpoint"
        )
    return (best_of(committed) or committed[-1]).url


def read_export(url: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], str]:
    """Weights, model.yaml, lineage and folder of the export that `url` means; checked where it has a COMMIT."""
    folder = find_export(url)
    raw = {name: storage.join(folder, name) for name in ("model.safetensors", "model.yaml", "lineage.json")}
    data = storage.read_bytes(raw["model.safetensors"])
    if storage.exists(storage.join(folder, COMMIT)):
        commit = json.loads(storage.read_bytes(storage.join(folder, COMMIT)))
        data = read_file(Committed(folder, commit["step"], commit["score"], commit["files"]), "model.safetensors")
    card = yaml.safe_load(storage.read_bytes(raw["model.yaml"]))
    lineage = json.loads(storage.read_bytes(raw["lineage.json"])) if storage.exists(raw["lineage.json"]) else {}
    try:
        return safetensors.torch.load(data), card, lineage, folder
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{raw['model.safetensors']} is damaged: {error}") from error


def load_export(url: str) -> Export:
    """The model that `url` means (see `find_export`), built, loaded and in eval mode."""
    weights, card, lineage, folder = read_export(url)
    model = config.build(card["model"])
    load_weights(model, weights, source=folder)
    return Export(model.eval(), int(card["sample_rate"]), lineage, folder)


def load_model(url: str) -> nn.Module:
    """The model of `load_export` alone."""
    return load_export(url).model
