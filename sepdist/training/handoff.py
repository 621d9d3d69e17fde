"""Hand-off: find, read and check the weights of an earlier stage and load them into a model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import yaml
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

OUTPUT_RULES = (
    "num_extra_outputs",
    "num_loudest",
)  # in model.yaml: what `speakers_of` takes; absent or 0 = none


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
            raise CheckpointError(
                f"init.reinit: no parameter of {type(model).__name__} begins with {prefix!r}"
            )
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
        shown = "; ".join(problems[:6]) + (
            f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        )
        raise CheckpointError(
            f"{source or 'these weights'} are not of this {type(model).__name__}: {shown}{hint}"
        )
    model.load_state_dict(
        {name: weights[name] for name in wanted} | {name: own[name] for name in kept}
    )
    return kept


def part_of(weights: Mapping[str, Tensor], part: str, source: str) -> dict[str, Tensor]:
    """The weights whose names begin with `part.`, without it; CheckpointError, naming what there is, if none does."""
    prefix = part.rstrip(".") + "."
    chosen = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    if not chosen:
        there = ", ".join(sorted({name.partition(".")[0] for name in weights}))
        raise CheckpointError(f"init.part={part}: {source} has no such part, it has {there}")
    return chosen


def inherit(model: nn.Module, init: InitConfig) -> tuple[list[str], dict[str, Any]]:
    """Fill `model` from the parent stage that `init` names: what stays fresh, and the parent's url and lineage."""
    weights, _, lineage, folder = read_export(str(init.weights))
    if init.part:
        weights = part_of(weights, init.part, folder)
    return load_weights(model, weights, init.reinit, source=folder), {"url": folder} | lineage


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

    def read(name: str) -> bytes:
        return (
            read_file(one, name)
            if one is not None
            else storage.read_bytes(storage.join(folder, name))
        )

    one = parse_commit(folder) if storage.exists(storage.join(folder, COMMIT)) else None
    data, card = read("model.safetensors"), yaml.safe_load(read("model.yaml"))
    lineage = (
        json.loads(read("lineage.json"))
        if storage.exists(storage.join(folder, "lineage.json"))
        else {}
    )
    try:
        return safetensors.torch.load(data), card, lineage, folder
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder}/model.safetensors is damaged: {error}") from error
