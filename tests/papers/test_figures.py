"""Figures from the logs of runs: what is on their axes is what stands in the logs."""

import itertools
import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.container import BarContainer
from rich.console import Console

from sepdist import plotting
from sepdist.cli import plot
from sepdist.config import ConfigError
from sepdist.data import shards
from sepdist.data.records import Mixture
from sepdist.papers import figures
from sepdist.papers.schema import FigureConfig
from tests.support.runs import frozen
from tests.support.shard_sets import write_shard

EPOCH_STEPS = 2.5  # 10 mixtures, 4 a step


def log(data: dict[str, str], run_dir: Path, si_snr: list[float], rates: list[float]) -> str:
    """Make a run_dir: a validation every 5 steps, a switch rate at the end of every later epoch."""
    frozen(data, run_dir)
    rows = [
        {"step": 5 * i, "seconds": i, "validation/si_snr": value}
        for i, value in enumerate(si_snr, start=1)
    ]
    rows += [
        {
            "step": int(EPOCH_STEPS * (epoch + 1)),
            "seconds": epoch,
            "switching/epoch": epoch,
            "switching/rate": rate,
        }
        for epoch, rate in enumerate(rates, start=1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(run_dir)


def test_each_run_is_a_line_of_si_snr_and_bars_of_switches_over_epochs(
    tiny_data, tmp_path: Path
) -> None:
    logs = {
        "from scratch": ([1.0, 4.0, 5.0], [0.3, 0.2]),
        "PT-FT (SE)": ([3.0, 5.0, 6.5], [0.1, 0.05]),
        "multi-task (SE)": ([2.0, 4.5], [0.4, 0.25]),
    }
    runs = {
        name: log(tiny_data, tmp_path / str(i), *values)
        for i, (name, values) in enumerate(logs.items())
    }
    figure = plotting.figure2(
        {name: figures.read_curves(run_dir) for name, run_dir in runs.items()}, "Libri2Mix"
    )
    upper, lower = figure.axes
    assert [text.get_text() for text in upper.get_legend().get_texts()] == list(logs)
    assert upper.get_title() == "Libri2Mix"
    assert len(upper.lines) == 3
    for line, (si_snr, _) in zip(upper.lines, logs.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), si_snr)
        np.testing.assert_allclose(
            line.get_xdata(), [5 * (i + 1) / EPOCH_STEPS for i in range(len(si_snr))]
        )
    groups = [group for group in lower.containers if isinstance(group, BarContainer)]
    for group, line, (_, rates) in zip(groups, upper.lines, logs.values(), strict=True):
        np.testing.assert_allclose(
            [bar.get_height() for bar in group], [100 * rate for rate in rates]
        )
        assert {bar.get_facecolor()[:3] for bar in group} == {matplotlib_colour(line.get_color())}
    edges = sorted(
        (bar.get_x(), bar.get_x() + bar.get_width()) for group in groups for bar in group
    )
    assert all(
        end <= begin + 1e-9 for (_, end), (begin, _) in itertools.pairwise(edges)
    )  # none hides another
    assert [
        sum(epoch - 0.5 < begin and end < epoch + 0.5 for begin, end in edges) for epoch in (2, 3)
    ] == [3, 3]


def test_without_label_switches_there_is_one_panel_with_its_epochs() -> None:
    curves = plotting.Curves([(1.0, 2.0), (2.0, 3.0)], [])
    (only,) = plotting.figure2({"mixed anew": curves}).axes
    assert only.get_xlabel() == "epoch" and only.xaxis.get_tick_params()["labelbottom"]
    assert only.get_subplotspec().get_gridspec().nrows == 1


def plotted(*words: str) -> None:
    """Run `sepdist plot`."""
    with patch.object(sys, "argv", ["sepdist plot", *words]):
        plot.main()


def matplotlib_colour(name: str) -> tuple[float, ...]:
    return tuple(int(name[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_the_program_puts_a_png_and_says_what_it_misses(tiny_data, tmp_path: Path, capsys) -> None:
    run_dir = log(tiny_data, tmp_path / "a", [1.0, 2.0], [0.5])
    plotted(f"output={tmp_path}/figure.png", f"runs.a run={run_dir}", "title=two epochs")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SystemExit, match="1"):
        plotted(f"{tmp_path}/figure.png", "a run=just-a-path")
    assert "give KEY=VALUE, as in: sepdist plot output=figure2.png" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        plotted(f"output={tmp_path}/figure.png")
    assert "runs.TITLE=FOLDER" in capsys.readouterr().err
    log(tiny_data, tmp_path / "a", [], [])
    with pytest.raises(ConfigError, match=r"no validation/si_snr"):
        figures.draw(FigureConfig({"a": run_dir}, str(tmp_path / "b.png")), Console())


def test_the_gap_of_a_run_is_predicted_beside_true_si_snr_and_the_weight_below(
    tiny_data, tmp_path: Path
) -> None:
    run_dir = log(tiny_data, tmp_path / "a", [], [])
    true, predicted, weight = [1.0, 4.0, 3.0], [0.5, 6.0, 12.0], [0.0, 0.1, 0.05, 0.1]
    rows = [
        {
            "step": 5 * i,
            "seconds": i,
            "validation/si_snr": one,
            "validation/predicted_si_snr": other,
        }
        for i, (one, other) in enumerate(zip(true, predicted, strict=True), start=1)
    ]
    rows += [
        {"step": i, "seconds": i, "train/unsupervised_weight": value}
        for i, value in enumerate(weight, start=1)
    ]
    rows += [
        {"step": 9, "seconds": 9, "train/unsupervised_weight": None}
    ]  # an interval of which no step was applied
    Path(run_dir, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = plotting.gap({"SSLM-SS": figures.read_curves(run_dir)})
    upper, lower = figure.axes
    assert [line.get_label() for line in upper.lines] == ["SSLM-SS, true", "SSLM-SS, predicted"]
    for line, values in zip(upper.lines, (true, predicted), strict=True):
        np.testing.assert_allclose(
            line.get_xydata().T, [[5 / EPOCH_STEPS, 10 / EPOCH_STEPS, 15 / EPOCH_STEPS], values]
        )
    np.testing.assert_allclose(
        lower.lines[0].get_xydata().T, [[i / EPOCH_STEPS for i in (1, 2, 3, 4)], weight]
    )
    plotted(f"output={tmp_path}/gap.png", f"runs.SSLM-SS={run_dir}", "kind=gap")
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_figure_of_another_kind_or_of_a_run_without_an_estimator_is_refused(
    tiny_data, tmp_path: Path
) -> None:
    run_dir = log(tiny_data, tmp_path / "a", [1.0], [])
    with pytest.raises(ConfigError, match="a run: no validation/predicted_si_snr in its log"):
        figures.draw(
            FigureConfig({"a run": run_dir}, str(tmp_path / "b.png"), kind="gap"), Console()
        )
    with pytest.raises(ConfigError, match="kind='bars' of a figure: it is one of figure2, gap"):
        figures.draw(
            FigureConfig({"a run": run_dir}, str(tmp_path / "b.png"), kind="bars"), Console()
        )


def test_the_histogram_shows_every_estimate_of_a_data_set_and_their_mean(tmp_path: Path) -> None:
    wanted = {"DR": [1.0, 2.0, 3.0, 10.0], "CTN": [-4.0, 0.0]}
    for name, values in wanted.items():
        wave = np.full(100, 0.5, np.float32)
        records = [
            Mixture(
                f"m{i}",
                ("a",),
                8000,
                lambda wave=wave: {"s1": wave, "e1": wave},
                metadata=lambda _, v=v: {"si_snr": [v]},
            )
            for i, v in enumerate(values)
        ]
        info = write_shard(records, tmp_path / name, shards.shard_name("toy", "x", 0))
        shards.write_manifest(tmp_path / name, "toy", "x", 8000, [info])
    sets = {name: figures.read_si_snr(str(tmp_path / name)) for name in wanted}
    assert {name: values.tolist() for name, values in sets.items()} == wanted
    figure = plotting.histogram(sets, "Figure 3")
    assert figure.get_suptitle() == "Figure 3"
    panels = figure.axes
    assert [sum(bar.get_height() for bar in axes.patches) for axes in panels] == [4, 2]
    assert panels[0].get_title() == "DR: mean 4.0, std 3.5"


def test_a_data_set_without_estimates_has_no_histogram(tiny_data) -> None:
    with pytest.raises(
        ConfigError, match="no estimates of known SI-SNR; write it with corpus=separated"
    ):
        figures.read_si_snr(tiny_data["dev"])


def test_the_scatter_has_a_dot_for_the_mean_over_sources_of_each_mixture(tmp_path: Path) -> None:
    text = "id,true_1,true_2,predicted_1,predicted_2\na,1,3,5,6\nb,-2,0,0,1\n"
    (tmp_path / "utterances.csv").write_text(text)
    pair = figures.read_predictions(str(tmp_path))
    np.testing.assert_allclose(pair, [[2, -1], [5.5, 0.5]])
    [axes] = plotting.scatter({"SSQP-Net": pair}).axes
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[2, 5.5], [-1, 0.5]])
