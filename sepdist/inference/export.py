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
    """A model in eval mode, and its origin."""

    model: nn.Module
    sample_rate: int
    lineage: dict[str, Any]
    url: str


def load_export(url: str) -> Export:
    """Build the model that `read_export` finds at `url` and load its weights.

    The model returns the speakers alone: outputs that it was trained with for another purpose are
    removed (see `speakers_of`).
    """
    weights, card, lineage, folder = read_export(url)
    model: nn.Module = config.build(card["model"])
    load_weights(model, weights, source=folder)
    rules = {name: int(card[name]) for name in OUTPUT_RULES if card.get(name)}
    if rules:
        model.register_forward_hook(lambda _, __, estimates: speakers_of(estimates, **rules))
    return Export(model.eval(), int(card["sample_rate"]), lineage, folder)


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
    """The model of `load_export`; its attribute `origin` holds its folder and lineage."""
    export = load_export(url)
    export.model.origin = {"url": export.url} | export.lineage  # type: ignore[assignment]
    return export.model


load_estimator.path_arguments = ("url",)  # type: ignore[attr-defined]
