"""What TensorBoard shows of a run besides metrics: settings to compare runs by, and a text."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict

from torch import nn

from sepdist import storage
from sepdist.config import TrainConfig, leaves
from sepdist.data.stream import Feed
from sepdist.reporting import Reporter

COMPARED = ("model", "objective", "engine", "optim", "data", "schedule", "init", "training")


def describe(
    reporter: Reporter, cfg: TrainConfig, model: nn.Module, feeds: Mapping[str, Feed]
) -> None:
    """Write the settings in COMPARED as hparams, and command, model and data as a text."""
    config, url = asdict(cfg), storage.join(cfg.run_dir, "environment.json")
    settings = {name: value for part in COMPARED for name, value in leaves(config[part], part)}
    known = json.loads(storage.read_bytes(url)) if storage.exists(url) else {}
    size = sum(p.numel() for p in model.parameters())
    lines = [f"| command | `{known.get('command') or shlex.join(sys.argv)}` |", "|---|---|"]
    lines += [f"| model | {type(model).__name__}, {size:,} parameters |"]
    places = {"main": cfg.data.train} | {one.name: one.url for one in cfg.data.extra}
    lines += [f"| data | {places[k]}, {one.num_samples:,} samples |" for k, one in feeds.items()]
    reporter.describe(settings, "\n".join([*lines, f"| validation | {cfg.data.validation} |"]))
