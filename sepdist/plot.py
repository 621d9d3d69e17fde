"""Figure 2 of paper 1: the metrics.jsonl of several runs in, a PNG out.

    python -m sepdist.plot figure2.png "from scratch=runs/scratch" "PT-FT (SE)=runs/finetune" --title Libri2Mix

Above, the validation SI-SNR by epoch, a line for each run. Below, the share of label assignments that switched since
the epoch before, bars side by side. Runs may be on local disk or s3://, and may still be going on.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from sepdist import storage
from sepdist.config import ConfigError, FigureConfig, load_frozen
from sepdist.console import user_console
from sepdist.data.order import units_per_epoch
from sepdist.data.shards import read_manifest
from sepdist.reporting import read_metrics, to_png

COLOURS = ("#3b6fb6", "#e07b28", "#3f9b4b", "#a64d79", "#7a7a7a", "#8c6d31")  # as in the paper: blue, orange, green


@dataclasses.dataclass(frozen=True)
class Curves:
    """What is drawn of one run; (epochs, value) each, the value in dB or per cent."""

    si_snr: list[tuple[float, float]]
    switches: list[tuple[float, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the PNG file, a path or s3://")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_DIR", help="in the order of the legend")
    parser.add_argument("--title", default="", help="above the picture")
    given = parser.parse_args(arguments)
    with user_console() as console:
        if wrong := [one for one in given.runs if "=" not in one]:
            raise ConfigError(f"{wrong[0]}: a run is given as LABEL=RUN_DIR")
        draw(FigureConfig(dict(one.split("=", 1) for one in given.runs), given.output, given.title), console)


def draw(cfg: FigureConfig, console: Console) -> None:
    """Read the runs and put the picture at `cfg.output`."""
    figure = figure2({name: read_curves(run_dir) for name, run_dir in cfg.runs.items()}, cfg.title)
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
    si_snr = [(row["step"] / epoch_steps, row["validation/si_snr"]) for row in rows if "validation/si_snr" in row]
    if not si_snr:
        raise ConfigError(f"{run_dir}: its metrics.jsonl has no validation/si_snr; there is nothing to draw")
    switches = [(row["switching/epoch"] + 1, 100 * row["switching/rate"]) for row in rows if "switching/rate" in row]
    return Curves(si_snr, switches)


def figure2(runs: Mapping[str, Curves], title: str = "") -> Figure:
    """The picture of all runs: lines of SI-SNR above, bars of label switches below, one colour for each run."""
    figure = Figure(figsize=(7.5, 6.5), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    assert isinstance(upper, Axes) and isinstance(lower, Axes)
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
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    upper.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main()
