"""Hand-off between stages: find, check and load the weights of an earlier one."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from sepdist import storage
from sepdist.config import InitConfig
from sepdist.training.checkpoint import (
    COMMIT,
    CheckpointError,
    best_of,
    find_committed,
    parse_commit,
    read_file,
)
from sepdist.training.model_card import parse_card, parse_lineage


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], reinit: Sequence[str] = (), source: str = ""
) -> list[str]:
    """Copy what `check_weights` accepts into `model`; returns the names below `reinit` prefixes."""
    kept = check_weights(model, weights, reinit, source)
    names = model.state_dict().keys() - kept.keys()
    model.load_state_dict({name: weights[name] for name in names} | kept)
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
        outputs = list(getattr(model, "output_parameters", ()))
        hint = f"; to start the output layer afresh set init.reinit={outputs}" if outputs else ""
        raise CheckpointError(f"{source or 'these weights'} do not fit this {kind}: {shown}{hint}")
    return kept


def submodule_of(weights: Mapping[str, Tensor], submodule: str, source: str) -> dict[str, Tensor]:
    """Return the weights below `submodule`, their names without it; CheckpointError if none are."""
    prefix = submodule.rstrip(".") + "."
    chosen = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not chosen:
        there = ", ".join(sorted({name.partition(".")[0] for name in weights}))
        raise CheckpointError(f"init.submodule={submodule}: {source} has no such one, only {there}")
    return chosen


def inherit(model: nn.Module, init: InitConfig) -> tuple[list[str], dict[str, Any]]:
    """Fill `model` from the parent stage; returns re-initialised names, and its url and lineage."""
    weights, _, lineage, folder = read_export(str(init.weights))
    if init.submodule:
        weights = submodule_of(weights, init.submodule, folder)
    return load_weights(model, weights, init.reinit, source=folder), {"url": folder} | lineage


def find_export(url: str) -> str:
    """Return the folder with weights: `url` or the best (else newest) checkpoint of that run."""
    if storage.exists(storage.join(url, "model.safetensors")):
        return url
    committed = find_committed(storage.join(url, "checkpoints"))
    if not committed:
        what = "neither a folder with model.safetensors nor a run_dir with a checkpoint"
        raise CheckpointError(f"{url}: {what}")
    return (best_of(committed) or committed[-1]).url


def read_export(url: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], str]:
    """Return weights, model.yaml, lineage and folder of an export, checked if it has a COMMIT."""
    folder = find_export(url)
    names = storage.list_names(folder)
    one = parse_commit(folder) if COMMIT in names else None
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
