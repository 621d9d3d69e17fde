"""Read the model.yaml and lineage.json of a model that may come from a stranger.

A model.yaml says which class to build, and how. It is read as plain values of bounded size, and
`check_arguments` refuses arguments that would read anything but the model's own folder.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sepdist import slots
from sepdist.config import ConfigError, parse_plain
from sepdist.objectives.contract import OUTPUT_RULES
from sepdist.training.checkpoint import CheckpointError

MAX_BYTES = 2**16  # of a model.yaml
MAX_NUMBER = 1_000_000  # a size in a model.yaml; larger ones exhaust the memory before weights do
MAX_OUTPUTS = 100
SAMPLE_RATES = (1000, 384_000)


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
    for name, value in _leaves(node, "model"):
        if isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise CheckpointError(f"{url}: {name}={value} is not between +-{MAX_NUMBER}")
    return card


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every plain value with its dotted name."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{name}.{key}")
    else:
        yield name, value


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
