"""What TensorBoard shows of a run besides its metrics: settings to compare runs by, and a card."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from sepdist import storage
from sepdist.config import TrainConfig
from sepdist.data.dataset import Dataset
from sepdist.data.stream import Feed
from sepdist.reporting import Reporter, versions

COMPARED = ("seed", "model", "objective", "engine", "optim", "data", "schedule", "init", "training")


def describe(
    reporter: Reporter, cfg: TrainConfig, model: nn.Module, feeds: Mapping[str, Feed], dev: Dataset
) -> None:
    """Write the settings in COMPARED as hparams; command, model and data as a text."""
    settings = {name: value for name, value in asdict(cfg).items() if name in COMPARED}
    url, manifest = storage.join(cfg.run_dir, "environment.json"), dev.manifest
    started = json.loads(storage.read_bytes(url)) if storage.exists(url) else {}
    num_parameters = sum(p.numel() for p in model.parameters())
    places = {"main": cfg.data.train} | {one.name: one.url for one in cfg.data.extra}
    facts = {
        "run": f"{cfg.name} in {cfg.run_dir}",
        "command": f"`{started.get('command') or shlex.join(sys.argv)}`",
        "model": f"{type(model).__name__}, {num_parameters:,} parameters",
        **{f"data: {k}": f"{places[k]}, {feeds[k].num_samples:,} samples" for k in feeds},
        "validation": f"{cfg.data.validation}, {manifest.num_samples:,} ({manifest.hours:.2f} h)",
        "versions": ", ".join(f"{k} {v}" for k, v in versions("torch", "deepspeed").items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    reporter.describe(dict(leaves(settings)), "| | |\n|---|---|\n" + table)


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The plain values within nested mappings by their dotted names; lists as texts."""
    if isinstance(value, Mapping):
        return [
            one for k, inner in value.items() for one in leaves(inner, f"{name}.{k}".strip("."))
        ]
    return [(name, value if isinstance(value, int | float) else str(value))]
