"""Load the model of a run_dir or an export folder, ready to use."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sepdist import slots, storage
from sepdist.config import ConfigError
from sepdist.objectives.contract import OUTPUT_RULES, speakers_of
from sepdist.training.checkpoint import CheckpointError
from sepdist.training.handoff import check_arguments, check_weights, load_weights, read_export

MAX_MODULES = 5_000  # in a model
SLACK = 10_000_000  # parameters more than the weights have, until a constructor is stopped


@dataclass
class Export:
    """A model in eval mode, and its origin."""

    model: nn.Module
    sample_rate: int
    lineage: dict[str, Any]
    url: str


def load_export(url: str) -> Export:
    """Build the model that `read_export` finds at `url` and load its weights.

    The model returns the speakers alone, without outputs for another purpose (`speakers_of`).
    """
    weights, card, lineage, folder = read_export(url)
    model = build_stored(card["model"], weights, folder)
    load_weights(model, weights, source=folder)
    rules = {name: int(card[name]) for name in OUTPUT_RULES if card.get(name)}
    if rules:
        model.output_rules = rules  # type: ignore[assignment]
        model.register_forward_hook(lambda _, __, estimates: speakers_of(estimates, **rules))
    return Export(model.eval(), int(card["sample_rate"]), lineage, folder)


def build_stored(node: Mapping[str, Any], weights: Mapping[str, Tensor], folder: str) -> nn.Module:
    """Build the model of a model.yaml, with random weights, after `weights` were found to fit it.

    They are compared on the meta device first, so that no file makes this process run out of
    memory: no more is allocated than the weights take.

    CheckpointError if arguments or weights do not fit; ConfigError if the class is not allowed, for
    example because its plug-in was not named.
    """
    check_arguments(node, folder)
    try:
        with torch.device("meta"), bounded(weights):
            fresh = slots.build("model", node)
        check_weights(fresh, weights, source=folder)
        model: nn.Module = slots.build("model", node)
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # of a constructor that got a stranger's arguments
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"{folder}/model.yaml: it makes no model ({reason})") from error
    return model


@contextmanager
def bounded(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """CheckpointError if what is built inside is far larger than `weights`, or has many modules."""
    num_modules = 0
    room = sum(tensor.numel() for tensor in weights.values()) + SLACK

    def count_module(*_: Any) -> None:
        nonlocal num_modules
        num_modules += 1
        if num_modules > MAX_MODULES:
            raise CheckpointError(f"model.yaml describes more than {MAX_MODULES} modules")

    def count_parameters(_: nn.Module, name: str, parameter: Tensor) -> None:
        nonlocal room
        room -= parameter.numel()
        if room < 0:
            raise CheckpointError("model.yaml describes a model much larger than its weights")

    hooks = [
        torch_module.register_module_module_registration_hook(count_module),
        torch_module.register_module_parameter_registration_hook(count_parameters),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_new(url: str) -> None:
    """Raise FileExistsError unless nothing is at `url`, or an empty folder."""
    is_file = storage.exists(url) and not os.path.isdir(os.path.expanduser(url))
    if is_file or storage.list_names(url):
        raise FileExistsError(f"{url} holds something already; choose another place")


def load_separator(url: str) -> Export:
    """`load_export` of a separator; CheckpointError for an SI-SNR estimator."""
    export = load_export(url)
    if getattr(export.model, "estimates_si_snr", False):
        raise CheckpointError(
            f"{url}: a {type(export.model).__name__} estimates SI-SNR and separates nothing: "
            "give a separator"
        )
    return export


def load_estimator(url: str) -> nn.Module:
    """The model of `load_export`, with its `sample_rate` and as `origin` its folder and lineage."""
    export = load_export(url)
    export.model.sample_rate = export.sample_rate  # type: ignore[assignment]
    export.model.origin = {"url": export.url} | export.lineage  # type: ignore[assignment]
    return export.model


load_estimator.path_arguments = ("url",)  # type: ignore[attr-defined]
