"""Load the model of a run_dir or an export folder, ready to use."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from sepdist import config
from sepdist.metrics.selection import speakers_of
from sepdist.objectives.contract import OUTPUT_RULES
from sepdist.training.checkpoint import CheckpointError
from sepdist.training.handoff import load_weights, read_export


@dataclass
class Export:
    """A model ready for use, and where it comes from."""

    model: nn.Module
    sample_rate: int
    lineage: dict[str, Any]
    url: str


def load_export(url: str) -> Export:
    """The model that `url` means (see `find_export`), built, loaded and in eval mode.

    It gives the speakers alone (see `speakers_of`): of other outputs that it was trained with, nothing is seen.
    """
    weights, card, lineage, folder = read_export(url)
    model: nn.Module = config.build(card["model"])
    load_weights(model, weights, source=folder)
    rules = {name: int(card[name]) for name in OUTPUT_RULES if card.get(name)}
    if rules:
        model.register_forward_hook(
            lambda module, inputs, estimates_BMT: speakers_of(estimates_BMT, **rules)
        )
    return Export(model.eval(), int(card["sample_rate"]), lineage, folder)


def load_separator(url: str) -> Export:
    """`load_export` of a model that separates; CheckpointError for one that judges estimates."""
    export = load_export(url)
    if getattr(export.model, "estimates_si_snr", False):
        raise CheckpointError(
            f"{url}: a {type(export.model).__name__} judges estimates and makes none: give a separator"
        )
    return export


def load_model(url: str) -> nn.Module:
    """The model of `load_export` alone; its `origin` is the folder that it came from, and that one's lineage."""
    export = load_export(url)
    export.model.origin = {"url": export.url} | export.lineage  # type: ignore[assignment]
    return export.model


load_model.path_arguments = ("url",)  # type: ignore[attr-defined]
