"""Figures: what several runs, or other stages, left behind in, a PNG out.

    python -m sepdist.plot figure2.png "from scratch=runs/scratch" "PT-FT (SE)=runs/finetune" --title Libri2Mix
    python -m sepdist.plot gap.png "SSLM-SS (10%)=runs/sslm" --kind gap

figure2, of paper 1: above, the validation SI-SNR by epoch, a line for each run; below, the share of label assignments
that switched since the epoch before, bars side by side. gap, of semi-supervised runs: above, the SI-SNR that the judge
predicts on the validation set beside the true one, which part where it is fooled; below, the weight of the unsupervised
loss. Runs may still be going on.

histogram, of data sets with estimates: how their SI-SNR is distributed (paper 2, figure 3). scatter, of the outputs of
`sepdist.judge`: predicted over true SI-SNR of mixtures (figure 4). All may be on local disk or s3://.
"""

import argparse
import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from sepdist import storage
from sepdist.config import ConfigError, FigureConfig, load_frozen
from sepdist.console import user_console
from sepdist.data.order import units_per_epoch
from sepdist.data.shards import all_facts, read_manifest
from sepdist.reporting import read_metrics, to_png

COLOURS: tuple[str, ...] = ("#3b6fb6", "#e07b28", "#3f9b4b", "#a64d79", "#7a7a7a", "#8c6d31")
COLOURS += ("#2aa7a7", "#c44e52", "#6a51a3", "#1b1b1b")  # the first three as in the paper


@dataclasses.dataclass(frozen=True)
class Curves:
    """What is drawn of one run; (epochs, value) each, the value in dB, per cent or, for the weight, from 0 to 1."""

    si_snr: list[tuple[float, float]]
    switches: list[tuple[float, float]]
    predicted: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    weight: list[tuple[float, float]] = dataclasses.field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the PNG file, a path or s3://")
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER", help="run_dir, data set or output, in their order")
    parser.add_argument("--title", default="", help="above the picture")
    parser.add_argument("--kind", choices=FIGURES, default="figure2", help="which figure (default: %(default)s)")
    given = parser.parse_args(arguments)
    with user_console() as console:
        if wrong := [one for one in given.runs if "=" not in one]:
            raise ConfigError(f"{wrong[0]}: give LABEL=FOLDER")
        runs = dict(one.split("=", 1) for one in given.runs)
        draw(FigureConfig(runs, given.output, given.title, given.kind), console)


def draw(cfg: FigureConfig, console: Console) -> None:
    """Read the runs and put the picture at `cfg.output`."""
    if cfg.kind not in FIGURES:
        raise ConfigError(f"kind={cfg.kind!r} of a figure: it is one of {', '.join(FIGURES)}")
    read, paint = FIGURES[cfg.kind]
    figure = paint({name: read(folder) for name, folder in cfg.runs.items()}, cfg.title)
    storage.put_bytes(cfg.output, to_png(figure))
    console.print(f"figure: {cfg.output}", markup=False, highlight=False, soft_wrap=True)


def read_curves(run_dir: str) -> Curves:
    """The curves of a run, over epochs of its main data set; ConfigError where it has no validation yet."""
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
        raise ConfigError(f"{run_dir}: its metrics.jsonl has no validation/si_snr; there is nothing to draw")
    switches = [(row["switching/epoch"] + 1, 100 * row["switching/rate"]) for row in rows if "switching/rate" in row]
    return Curves(si_snr, switches, curve("validation/predicted_si_snr"), curve("train/unsupervised_weight"))


def figure2(runs: Mapping[str, Curves], title: str = "") -> Figure:
    """The picture of all runs: lines of SI-SNR above, bars of label switches below, one colour for each run."""
    figure, upper, lower = two_axes()
    width = 0.8 / len(runs)
    for number, (name, curves) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        marker = "o" if len(curves.si_snr) <= 30 else ""
        upper.plot(*zip(*curves.si_snr, strict=True), color=colour, marker=marker, markersize=4, label=name)
        shift = (number - (len(runs) - 1) / 2) * width
        places = [epoch + shift for epoch, _ in curves.switches]
        lower.bar(places, [rate for _, rate in curves.switches], width, color=colour, label=name)
    upper.set(ylabel="validation SI-SNR in dB", title=title)
    lower.set(xlabel="epoch", ylabel="label switches in %", ylim=(0, None))
    upper.legend(loc="lower right")
    return figure


def gap(runs: Mapping[str, Curves], title: str = "") -> Figure:
    """The picture of all runs: true SI-SNR (line) and predicted (dashed) above, weight below, a colour for each run."""
    figure, upper, lower = two_axes()
    for number, (name, curves) in enumerate(runs.items()):
        if not curves.predicted:
            raise ConfigError(f"{name}: no validation/predicted_si_snr in its log; it is no semi-supervised run")
        colour = COLOURS[number % len(COLOURS)]
        upper.plot(*zip(*curves.si_snr, strict=True), color=colour, label=f"{name}, true")
        upper.plot(*zip(*curves.predicted, strict=True), color=colour, linestyle="--", label=f"{name}, predicted")
        lower.plot(*zip(*curves.weight, strict=True), color=colour)
    upper.set(ylabel="validation SI-SNR in dB", title=title)
    lower.set(xlabel="epoch", ylabel="weight of the unsupervised loss", ylim=(0, None))
    upper.legend(loc="best")
    return figure


def two_axes() -> tuple[Figure, Axes, Axes]:
    """A picture, and its upper and lower axes over epochs."""
    figure = Figure(figsize=(7.5, 6.5), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    assert isinstance(upper, Axes) and isinstance(lower, Axes)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure, upper, lower


def read_si_snr(data: str) -> np.ndarray:
    """The true SI-SNR in dB of every estimate of a data set; ConfigError where it has none."""
    found = [value for facts in all_facts(data) for value in facts.get("si_snr", ())]
    if not found:
        raise ConfigError(f"{data}: has no estimates of known SI-SNR; write it with corpus=separated")
    return np.array(found)


def histogram(sets: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """One panel for each data set, all over the same dB."""
    figure = Figure(figsize=(1 + 3.2 * len(sets), 3.2), dpi=120, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(sets), sharex=True, sharey=True))
    low, high = (np.percentile(np.concatenate(list(sets.values())), share) for share in (0.5, 99.5))
    for axes, colour, (name, values) in zip(panels, COLOURS, sets.items(), strict=False):
        axes.hist(np.clip(values, low, high), bins=np.linspace(low, high, 41), color=colour)
        axes.axvline(values.mean(), color="black", linewidth=1)
        axes.set(title=f"{name}: mean {values.mean():.1f}, std {values.std():.1f}", xlabel="SI-SNR in dB")
    panels[0].set_ylabel("estimates")
    figure.suptitle(title)
    return figure


def read_verdicts(output: str) -> np.ndarray:
    """[2, mixtures], true and predicted SI-SNR, of what `sepdist.judge` left in a folder."""
    text = storage.read_bytes(storage.join(output, "utterances.csv")).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    sides = [[name for name in rows[0] if name.startswith(side)] for side in ("true_", "predicted_")]
    return np.array([[np.mean([float(row[name]) for name in names]) for row in rows] for names in sides])


def scatter(verdicts: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """One dot for each mixture, a colour for each judge, and the line on which all would lie."""
    figure = Figure(figsize=(5.5, 5.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    assert isinstance(axes, Axes)
    for colour, (name, pair) in zip(COLOURS, verdicts.items(), strict=False):
        axes.scatter(pair[0], pair[1], s=14, alpha=0.6, linewidths=0, color=colour, label=name)
    every = np.concatenate([pair.ravel() for pair in verdicts.values()])
    axes.plot([every.min(), every.max()], [every.min(), every.max()], color="grey", linestyle=":")
    axes.set(xlabel="SI-SNR in dB", ylabel="predicted SI-SNR in dB", title=title)
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure


FIGURES: dict[str, tuple[Callable[[str], Any], Callable[[Mapping[str, Any], str], Figure]]] = {
    "figure2": (read_curves, figure2),
    "gap": (read_curves, gap),
    "histogram": (read_si_snr, histogram),
    "scatter": (read_verdicts, scatter),
}


if __name__ == "__main__":
    main()
