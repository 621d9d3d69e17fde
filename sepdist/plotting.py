"""Draw spectrograms, the scores of a separator and the papers' figures.

Only matplotlib's object interface is used, which works in any thread. Import this module where
something is drawn, because matplotlib takes most of a second.
"""

import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sepdist.config import ConfigError

DYNAMIC_RANGE_DB = 70.0
COLOURS = (  # the first three as in paper 1
    *("#3b6fb6", "#e07b28", "#3f9b4b", "#a64d79", "#7a7a7a"),
    *("#8c6d31", "#2aa7a7", "#c44e52", "#6a51a3", "#1b1b1b"),
)


def decibel_spectrogram(wave: np.ndarray, rate: int) -> np.ndarray:
    """Power in dB below the loudest bin, floored, of Hann windows of 32 ms every 8 ms: [F, N]."""
    import scipy.signal  # late, because few figures are spectrograms

    size = max(int(0.032 * rate), 16)
    wave = np.pad(np.asarray(wave, dtype=np.float32), (0, max(0, size - len(wave))))
    _, _, spectrum = scipy.signal.stft(wave, rate, nperseg=size, noverlap=size - size // 4)
    power = np.abs(spectrum) ** 2
    tiny = np.finfo(np.float32).tiny
    decibels = 10 * np.log10(np.maximum(power / max(power.max(), tiny), tiny))
    return np.maximum(decibels, -DYNAMIC_RANGE_DB).astype(np.float32)


def spectrogram_figure(waves: Mapping[str, np.ndarray], rate: int) -> Figure:
    """Draw spectrograms on one dB scale, a column for each first word of their names.

    Names such as "source 1" and "estimate 1" put a source next to its estimate. Every panel is
    relative to its own loudest bin, because SI-SNR leaves the level of an estimate open. Panels are
    small beside their text, which can be read where the picture is 340 pixels wide.
    """
    columns: dict[str, list[str]] = {}
    for name in waves:
        columns.setdefault(name.split()[0], []).append(name)
    rows: Any = [list(row) for row in itertools.zip_longest(*columns.values(), fillvalue=".")]
    size = (0.5 + 2.0 * len(columns), 0.4 + 1.4 * len(rows))
    figure = Figure(size, dpi=170, layout="constrained")
    panels = figure.subplot_mosaic(rows, sharex=True, sharey=True)
    options: Any = {"origin": "lower", "aspect": "auto", "cmap": "magma"}
    for name, axes in panels.items():
        options["extent"] = (0.0, len(waves[name]) / rate, 0.0, rate / 2000)
        image = axes.imshow(decibel_spectrogram(waves[name], rate), **options)
        image.set_clim(-DYNAMIC_RANGE_DB, 0.0)
        axes.set_title(name)
    for names in columns.values():
        panels[names[-1]].tick_params(labelbottom=True)
    figure.supxlabel("seconds")
    figure.supylabel("kHz")
    return figure


def to_png(figure: Figure) -> bytes:
    """Encode the figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


@dataclasses.dataclass(frozen=True)
class Curves:
    """Curves of one run as (epoch, value); SI-SNR in dB, switches in %, weight from 0 to 1."""

    si_snr: list[tuple[float, float]]
    switches: list[tuple[float, float]]
    predicted: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    weight: list[tuple[float, float]] = dataclasses.field(default_factory=list)


def figure2(runs: Mapping[str, Curves], title: str = "") -> Figure:
    """Draw lines of SI-SNR above bars of label switches, if any, one colour for each run."""
    figure, upper, lower = two_axes()
    width = 0.8 / len(runs)
    for number, (name, curves) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        style = "-o" if len(curves.si_snr) <= 30 else "-"
        upper.plot(*zip(*curves.si_snr, strict=True), style, color=colour, ms=4, label=name)
        places = [epoch + (number - (len(runs) - 1) / 2) * width for epoch, _ in curves.switches]
        lower.bar(places, [rate for _, rate in curves.switches], width, color=colour, label=name)
    upper.set(ylabel="validation SI-SNR in dB", title=title)
    lower.set(xlabel="epoch", ylabel="label switches in %", ylim=(0, None))
    if not any(curves.switches for curves in runs.values()):  # mixed anew, nothing comes twice
        lower.remove()
        upper.set_subplotspec(figure.add_gridspec()[0])
        upper.set_xlabel("epoch")
        upper.tick_params(labelbottom=True)
    upper.legend(loc="lower right")
    return figure


def gap(runs: Mapping[str, Curves], title: str = "") -> Figure:
    """Draw true (solid) and predicted (dashed) SI-SNR above the weight of the unsupervised loss."""
    figure, upper, lower = two_axes()
    for number, (name, curves) in enumerate(runs.items()):
        if not curves.predicted:
            raise ConfigError(f"{name}: no validation/predicted_si_snr in its log: not guided")
        colour = COLOURS[number % len(COLOURS)]
        true, predicted = (zip(*curve, strict=True) for curve in (curves.si_snr, curves.predicted))
        upper.plot(*true, "-", color=colour, label=f"{name}, true")
        upper.plot(*predicted, "--", color=colour, label=f"{name}, predicted")
        lower.plot(*zip(*curves.weight, strict=True), color=colour)
    upper.set(ylabel="validation SI-SNR in dB", title=title)
    lower.set(xlabel="epoch", ylabel="weight of the unsupervised loss", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def two_axes() -> tuple[Figure, Axes, Axes]:
    """A figure with its upper and lower axes over epochs."""
    figure = Figure((7.5, 6.5), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure, upper, lower


def histogram(sets: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """Draw one panel for each data set, all with the same dB axis."""
    figure = Figure((1 + 3.2 * len(sets), 3.2), dpi=120, layout="constrained")
    panels: Any = np.atleast_1d(figure.subplots(1, len(sets), sharex=True, sharey=True))
    low, high = (np.percentile(np.concatenate(list(sets.values())), share) for share in (0.5, 99.5))
    for axes, colour, (name, values) in zip(panels, COLOURS, sets.items(), strict=False):
        axes.hist(np.clip(values, low, high), bins=np.linspace(low, high, 41), color=colour)
        axes.axvline(values.mean(), color="black", linewidth=1)
        caption = f"{name}: mean {values.mean():.1f}, std {values.std():.1f}"
        axes.set(title=caption, xlabel="SI-SNR in dB")
    panels[0].set_ylabel("estimates")
    figure.suptitle(title)
    return figure


def scatter(predictions: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """Draw a dot for each mixture, a colour for each estimator, and the line of perfect ones."""
    figure = Figure((5.5, 5.5), dpi=110, layout="constrained")
    axes: Any = figure.subplots()
    for colour, (name, pair) in zip(COLOURS, predictions.items(), strict=False):
        axes.scatter(pair[0], pair[1], s=14, alpha=0.6, linewidths=0, color=colour, label=name)
    every = np.concatenate([pair.ravel() for pair in predictions.values()])
    ends = [every.min(), every.max()]
    axes.plot(ends, ends, color="grey", linestyle=":")
    axes.set(xlabel="SI-SNR in dB", ylabel="predicted SI-SNR in dB", title=title)
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure


def improvements(gains: np.ndarray, before: Sequence[float], after: Sequence[float]) -> Figure:
    """Draw the distribution of SI-SNRi, and output over input SI-SNR by source; all in dB."""
    figure = Figure((10, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    num_bins = min(50, max(5, len(gains) // 8))
    left.hist(gains, bins=num_bins, color="tab:blue", edgecolor="white", linewidth=0.5)
    for name, value, style in (("mean", np.mean(gains), "-"), ("median", np.median(gains), "--")):
        left.axvline(value, color="tab:red", linestyle=style, label=f"{name} {value:.2f} dB")
    left.set(xlabel="SI-SNRi in dB", ylabel="utterances", title=f"{len(gains)} utterances")
    left.legend()
    right.scatter(before, after, s=12, alpha=0.6, linewidths=0)
    ends = [min(*before, *after), max(*before, *after)]
    right.plot(ends, ends, color="grey", linestyle=":", label="no improvement")
    right.set(xlabel="SI-SNR of the mixture in dB", ylabel="SI-SNR of the estimate in dB")
    right.set_title("output over input, by source")
    right.legend()
    return figure
