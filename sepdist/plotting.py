"""Draw spectrograms and the papers' figures with matplotlib's object interface.

That interface works in any thread. matplotlib and scipy.signal are imported where they are needed,
because every worker imports this module and few draw.
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sepdist.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DYNAMIC_RANGE_DB = 70.0
COLOURS = (  # the first three as in paper 1
    *("#3b6fb6", "#e07b28", "#3f9b4b", "#a64d79", "#7a7a7a"),
    *("#8c6d31", "#2aa7a7", "#c44e52", "#6a51a3", "#1b1b1b"),
)


def decibel_spectrogram(wave: np.ndarray, rate: int) -> np.ndarray:
    """Power in dB relative to the loudest bin, float32 [F, N]; silence is at the floor.

    Hann windows of 32 ms every 8 ms.
    """
    import scipy.signal

    size = max(int(0.032 * rate), 16)
    wave = np.pad(np.asarray(wave, dtype=np.float32), (0, max(0, size - len(wave))))
    _, _, spectrum = scipy.signal.stft(wave, rate, nperseg=size, noverlap=size - size // 4)
    power = np.abs(spectrum) ** 2
    loudest = power.max()
    if loudest == 0:
        return np.full(power.shape, -DYNAMIC_RANGE_DB, dtype=np.float32)
    decibels = 10 * np.log10(np.maximum(power / loudest, np.finfo(np.float32).tiny))
    return np.maximum(decibels, -DYNAMIC_RANGE_DB).astype(np.float32)


def spectrogram_figure(waves: Mapping[str, np.ndarray], rate: int) -> "Figure":
    """Draw spectrograms on one dB scale, a column for each first word of their names.

    Names such as "source 1" and "estimate 1" put a source next to its estimate. Every panel is
    relative to its own loudest bin, because SI-SNR leaves the level of an estimate open.
    """
    columns: dict[str, list[str]] = {}
    for name in waves:
        columns.setdefault(name.split()[0], []).append(name)
    num_rows = max(len(names) for names in columns.values())
    figure = empty_figure((1.2 + 4.2 * len(columns), 0.8 + 2.4 * num_rows), dpi=80)
    axes = figure.subplots(num_rows, len(columns), squeeze=False, sharex=True, sharey=True)
    image = None
    for column, names in enumerate(columns.values()):
        for row in range(num_rows):
            axis: Axes = axes[row, column]
            if row >= len(names):
                axis.set_visible(False)
                continue
            wave = np.asarray(waves[names[row]])
            image = axis.imshow(
                decibel_spectrogram(wave, rate),
                origin="lower",
                aspect="auto",
                extent=(0.0, len(wave) / rate, 0.0, rate / 2000),
                vmin=-DYNAMIC_RANGE_DB,
                vmax=0.0,
                cmap="magma",
            )
            axis.set_title(names[row])
            if row == len(names) - 1:
                axis.set_xlabel("time in seconds")
                axis.tick_params(labelbottom=True)
            if column == 0:
                axis.set_ylabel("frequency in kHz")
    assert image is not None, "a picture needs at least one wave"
    figure.colorbar(image, ax=axes, label="dB below the loudest of the panel", fraction=0.04)
    return figure


def empty_figure(size: tuple[float, float], dpi: int) -> "Figure":
    """A figure of `size` in inches without axes."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=dpi, layout="constrained")


def to_png(figure: "Figure") -> bytes:
    """Encode the figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


@dataclasses.dataclass(frozen=True)
class Curves:
    """Curves of one run as (epoch, value); SI-SNR in dB, switches in %, weight from 0 to 1."""

    si_snr: list[tuple[float, float]]
    switches: list[tuple[float, float]]
    predicted: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    weight: list[tuple[float, float]] = dataclasses.field(default_factory=list)


def figure2(runs: Mapping[str, Curves], title: str = "") -> "Figure":
    """Draw lines of SI-SNR above bars of label switches, one colour for each run."""
    figure, upper, lower = two_axes()
    width = 0.8 / len(runs)
    for number, (name, curves) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        marker = "o" if len(curves.si_snr) <= 30 else ""
        upper.plot(
            *zip(*curves.si_snr, strict=True), color=colour, marker=marker, markersize=4, label=name
        )
        shift = (number - (len(runs) - 1) / 2) * width
        places = [epoch + shift for epoch, _ in curves.switches]
        lower.bar(places, [rate for _, rate in curves.switches], width, color=colour, label=name)
    upper.set(ylabel="validation SI-SNR in dB", title=title)
    lower.set(xlabel="epoch", ylabel="label switches in %", ylim=(0, None))
    upper.legend(loc="lower right")
    return figure


def gap(runs: Mapping[str, Curves], title: str = "") -> "Figure":
    """Draw true (solid) and predicted (dashed) SI-SNR above the weight of the unsupervised loss."""
    figure, upper, lower = two_axes()
    for number, (name, curves) in enumerate(runs.items()):
        if not curves.predicted:
            raise ConfigError(
                f"{name}: no validation/predicted_si_snr in its log: not a semi-supervised run"
            )
        colour = COLOURS[number % len(COLOURS)]
        upper.plot(*zip(*curves.si_snr, strict=True), color=colour, label=f"{name}, true")
        upper.plot(
            *zip(*curves.predicted, strict=True),
            color=colour,
            linestyle="--",
            label=f"{name}, predicted",
        )
        lower.plot(*zip(*curves.weight, strict=True), color=colour)
    upper.set(ylabel="validation SI-SNR in dB", title=title)
    lower.set(xlabel="epoch", ylabel="weight of the unsupervised loss", ylim=(0, None))
    upper.legend(loc="best")
    return figure


def two_axes() -> tuple["Figure", "Axes", "Axes"]:
    """A figure with its upper and lower axes over epochs."""
    from matplotlib.ticker import MaxNLocator

    figure = empty_figure((7.5, 6.5), dpi=120)
    upper, lower = figure.subplots(2, 1, sharex=True)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure, upper, lower


def histogram(sets: Mapping[str, np.ndarray], title: str = "") -> "Figure":
    """Draw one panel for each data set, all with the same dB axis."""
    figure = empty_figure((1 + 3.2 * len(sets), 3.2), dpi=120)
    panels: Any = np.atleast_1d(figure.subplots(1, len(sets), sharex=True, sharey=True))
    low, high = (np.percentile(np.concatenate(list(sets.values())), share) for share in (0.5, 99.5))
    for axes, colour, (name, values) in zip(panels, COLOURS, sets.items(), strict=False):
        axes.hist(np.clip(values, low, high), bins=np.linspace(low, high, 41), color=colour)
        axes.axvline(values.mean(), color="black", linewidth=1)
        axes.set(
            title=f"{name}: mean {values.mean():.1f}, std {values.std():.1f}", xlabel="SI-SNR in dB"
        )
    panels[0].set_ylabel("estimates")
    figure.suptitle(title)
    return figure


def scatter(predictions: Mapping[str, np.ndarray], title: str = "") -> "Figure":
    """Draw a dot for each mixture, a colour for each estimator, and the line of perfect ones."""
    figure = empty_figure((5.5, 5.5), dpi=110)
    axes: Any = figure.subplots()
    for colour, (name, pair) in zip(COLOURS, predictions.items(), strict=False):
        axes.scatter(pair[0], pair[1], s=14, alpha=0.6, linewidths=0, color=colour, label=name)
    every = np.concatenate([pair.ravel() for pair in predictions.values()])
    axes.plot([every.min(), every.max()], [every.min(), every.max()], color="grey", linestyle=":")
    axes.set(xlabel="SI-SNR in dB", ylabel="predicted SI-SNR in dB", title=title)
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure
