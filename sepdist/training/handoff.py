"""Hand-off between stages: find, check and load the weights of an earlier one, or a stranger's.

A model.yaml says which class to build, and how. It is read as plain values of bounded size, and
`check_arguments` refuses arguments that would read anything but the model's own folder.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from sepdist import hub, slots, storage
from sepdist.config import ConfigError, InitConfig, leaves, parse_plain
from sepdist.objectives.contract import OUTPUT_RULES
from sepdist.training import checkpoint
from sepdist.training.checkpoint import CheckpointError, read_file

MAX_BYTES = 2**16  # of a model.yaml
MAX_NUMBER = 1_000_000  # a size in a model.yaml; larger ones exhaust the memory before weights do
MAX_OUTPUTS = 100
SAMPLE_RATES = (1000, 384_000)


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], reinit: Sequence[str] = (), source: str = ""
) -> list[str]:
    """Copy what `check_weights` accepts into `model`; returns the names below `reinit` prefixes."""
    kept = check_weights(model, weights, reinit, source)
    model.load_state_dict({k: kept.get(k, weights.get(k)) for k in model.state_dict()})
    return sorted(kept)


def check_weights(
    model: nn.Module, weights: Mapping[str, Tensor], reinit: Sequence[str] = (), source: str = ""
) -> dict[str, Tensor]:
    """Compare names and shapes; returns what `model` keeps, below the `reinit` prefixes.

    CheckpointError if any other parameter is missing, unexpected or of another shape, or nothing
    in the model has such a prefix.
    """
    own, kind = model.state_dict(), type(model).__name__

    def below(name: str, prefixes: Sequence[str]) -> bool:
        return f"{name}.".startswith(tuple(prefix.rstrip(".") + "." for prefix in prefixes))

    for prefix in reinit:
        if not any(below(name, [prefix]) for name in own):
            raise CheckpointError(f"init.reinit: no parameter of {kind} begins with {prefix!r}")
    kept = {name: own[name] for name in own if below(name, reinit)}
    wanted = own.keys() - kept.keys()
    given = {name for name in weights if not below(name, reinit)}
    problems = [f"missing {name}" for name in sorted(wanted - given)]
    problems += [f"unexpected {name}" for name in sorted(given - wanted)]
    for name in sorted(wanted & given):
        has, wants = tuple(weights[name].shape), tuple(own[name].shape)
        problems += [f"{name} is {has}, the model's is {wants}"] if has != wants else []
    if problems:
        shown, more = "; ".join(problems[:6]), len(problems) - 6
        shown += f"; and {more} more" if more > 0 else ""
        others = [one for one in getattr(model, "output_parameters", ()) if one not in reinit]
        hint = f"; to start the output layer afresh set init.reinit={[*reinit, *others]}"
        hint = hint if others else ""
        raise CheckpointError(f"{source or 'these weights'} do not fit this {kind}: {shown}{hint}")
    return kept


def inherit(model: nn.Module, init: InitConfig) -> tuple[list[str], dict[str, Any]]:
    """Fill `model` from the parent stage; returns re-initialised names, and its url and lineage."""
    weights, _, lineage, folder = read_export(str(init.weights))
    if init.submodule:
        prefix = init.submodule.rstrip(".") + "."
        chosen = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not chosen:
            there = ", ".join(sorted({name.partition(".")[0] for name in weights}))
            wrong = f"{folder} has no such one, only {there}"
            raise CheckpointError(f"init.submodule={init.submodule}: {wrong}")
        weights = chosen
    return load_weights(model, weights, init.reinit, source=folder), {"url": folder} | lineage


def find_export(url: str) -> str:
    """Return the folder with weights: `url` or the best (else newest) checkpoint of that run.

    For hf://org/name[@revision] it is the one in the hub's cache, after a download if need be.
    """
    url = hub.local(url)
    if storage.exists(storage.join(url, "model.safetensors")):
        return url
    committed = checkpoint.find_committed(storage.join(url, "checkpoints"))
    if not committed:
        what = "neither a folder with model.safetensors nor a run_dir with a checkpoint"
        raise CheckpointError(f"{url}: {what}")
    return (checkpoint.best_of(committed) or committed[-1]).url


def read_export(url: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], str]:
    """Return weights, model.yaml, lineage and folder of an export, checked if it has a COMMIT."""
    folder = find_export(url)
    names = storage.list_names(folder)
    one = checkpoint.parse_commit(folder) if checkpoint.COMMIT in names else None
    in_run = re.search(r"/checkpoints/step-[^/]*$", storage.absolute(folder))
    if one is None and (in_run or {"state.json", "optimizer.safetensors"} & set(names)):
        why = "was never finished or is being removed; take another one of its run"
        raise CheckpointError(f"{folder}: a checkpoint without COMMIT {why}")

    def read(name: str) -> bytes:
        return read_file(one, name) if one else storage.read_bytes(storage.join(folder, name))

    data, card = read("model.safetensors"), parse_card(read("model.yaml"), folder)
    has_lineage = "lineage.json" in (one.files if one else names)
    lineage = parse_lineage(read("lineage.json"), folder) if has_lineage else {}
    try:
        return safetensors.torch.load(data), card, lineage, folder
    except (safetensors.SafetensorError, RuntimeError, TypeError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"{folder}/model.safetensors is damaged ({reason})") from error


def parse_card(data: bytes, folder: str) -> dict[str, Any]:
    """The content of a model.yaml: `model` with `_target_`, `sample_rate` and OUTPUT_RULES.

    CheckpointError if it is malformed; the message names the file and the value.
    """
    url = f"{folder}/model.yaml"
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{url}: {len(data)} bytes are too many for the config of a model")
    try:
        card = parse_plain(data)
    except ConfigError as error:
        raise CheckpointError(f"{url} is {error}") from error
    node = card.get("model") if isinstance(card, dict) else None
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise CheckpointError(f"{url}: it must be a mapping whose `model` has a _target_")
    numbers = {"sample_rate": (card.get("sample_rate"), *SAMPLE_RATES)}
    numbers |= {name: (card.get(name) or 0, 0, MAX_OUTPUTS) for name in OUTPUT_RULES}
    for name, (value, least, most) in numbers.items():
        if type(value) is not int or not least <= value <= most:
            needs = f"must be a whole number, {least} to {most}"
            raise CheckpointError(f"{url}: {name}={value!r} {needs}")
    for name, value in leaves(node, "model"):
        if isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise CheckpointError(f"{url}: {name}={value} is not between +-{MAX_NUMBER}")
    return card


def parse_lineage(data: bytes, folder: str) -> dict[str, Any]:
    """The content of a lineage.json: a mapping, shown and copied but never acted on."""
    try:
        lineage = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}/lineage.json is damaged: {error}") from error
    if not isinstance(lineage, dict):
        raise CheckpointError(f"{folder}/lineage.json: it must be a mapping")
    return lineage


def check_arguments(node: Mapping[str, Any], folder: str) -> None:
    """Raise CheckpointError for an argument that would read a file or fetch a model."""
    kind = slots.resolve("model", node["_target_"])
    for name in getattr(kind, "parts", ()):
        if isinstance(part := node.get(name), Mapping) and "_target_" in part:
            check_arguments(part, folder)
    names = (*getattr(kind, "path_arguments", ()), *getattr(kind, "outside_arguments", ()))
    if given := [name for name in names if node.get(name) is not None]:
        wrong = f"{given[0]}={node[given[0]]!r} leads out of the model's folder"
        has = "a stored model has all its weights in model.safetensors"
        raise CheckpointError(f"{folder}/model.yaml: {wrong}; {has}")
