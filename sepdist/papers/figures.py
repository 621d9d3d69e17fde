"""Figures of the papers: read the logs and results of stages, draw, store a PNG."""

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from sepdist import storage
from sepdist.config import ConfigError, load_frozen
from sepdist.data.order import units_per_epoch
from sepdist.data.shards import all_metadata, read_manifest
from sepdist.papers.schema import FigureConfig
from sepdist.plotting import Curves, figure2, gap, histogram, scatter, to_png
from sepdist.reporting import read_metrics


def draw(cfg: FigureConfig, console: Console) -> None:
    """Read the runs and write the figure to `cfg.output`."""
    if cfg.kind not in FIGURES:
        raise ConfigError(f"kind={cfg.kind!r} of a figure: it is one of {', '.join(FIGURES)}")
    if not cfg.runs:
        raise ConfigError('nothing to draw: give "runs.TITLE=FOLDER", once or more')
    read, paint = FIGURES[cfg.kind]
    figure = paint({title: read(folder) for title, folder in cfg.runs.items()}, cfg.title)
    storage.put_bytes(cfg.output, to_png(figure))
    console.print(f"figure: {cfg.output}")


def read_curves(run_dir: str) -> Curves:
    """Read a run's log, over epochs of data.train; ConfigError if it has no validation yet."""
    rows = read_metrics(run_dir)
    data = load_frozen(storage.join(run_dir, "config.yaml")).data
    urls = [data.train, *(one.url for one in data.extra)]
    sizes = [read_manifest(url).num_samples for url in urls]
    units = units_per_epoch(sizes, [None, *(one.weight for one in data.extra)], data.micro_batch)
    epoch_steps = sizes[0] * sum(units) / units[0] / (data.num_virtual_shards * data.micro_batch)

    def curve(name: str) -> list[tuple[float, float]]:
        return [(row["step"] / epoch_steps, row[name]) for row in rows if row.get(name) is not None]

    si_snr = curve("validation/si_snr")
    if not si_snr:
        raise ConfigError(f"{run_dir}: its metrics.jsonl has no validation/si_snr to draw")
    known = [row for row in rows if "switching/rate" in row]
    switches = [(row["switching/epoch"] + 1, 100 * row["switching/rate"]) for row in known]
    predicted = curve("validation/predicted_si_snr")
    return Curves(si_snr, switches, predicted, curve("train/unsupervised_weight"))


def read_si_snr(data: str) -> np.ndarray:
    """Read the true SI-SNR in dB of every estimate of a data set; ConfigError if it has none."""
    found = [value for one in all_metadata(data) for value in one.get("si_snr", ())]
    if not found:
        raise ConfigError(f"{data}: no estimates of known SI-SNR; write it with corpus=separated")
    return np.array(found)


def read_predictions(output: str) -> np.ndarray:
    """Read [2, mixtures], true and predicted SI-SNR, from an output of `sepdist estimate`."""
    text = storage.read_bytes(storage.join(output, "utterances.csv")).decode()
    rows = [row for row in csv.DictReader(io.StringIO(text)) if not row.get("reason")]
    if not rows or "true_1" not in rows[0]:
        raise ConfigError(f"{output}: no predictions; give an output of `sepdist estimate`")
    sides = [[name for name in rows[0] if name.startswith(one)] for one in ("true_", "predicted_")]
    return np.array([[np.mean([float(row[k]) for k in side]) for row in rows] for side in sides])


FIGURES: dict[str, tuple[Callable[[str], Any], Callable[[Mapping[str, Any], str], Figure]]] = {
    "figure2": (read_curves, figure2),
    "gap": (read_curves, gap),
    "histogram": (read_si_snr, histogram),
    "scatter": (read_predictions, scatter),
}
