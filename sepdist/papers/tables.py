"""Tables of a pipeline: the paper's numbers beside ours, as JSON and Markdown."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from sepdist import storage
from sepdist.config import (
    ConfigError,
    GridConfig,
    PipelineConfig,
)
from sepdist.reporting import read_metrics

MARKER = "stage.json"
NO_CELL = "-"  # of a grid


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of one seed, ready to run."""

    seed: int
    name: str
    kind: str
    folder: str
    uses: tuple[str, ...]  # folders of earlier stages
    config: Any  # of its program, whole


def read_marker(stage: Stage) -> dict[str, Any]:
    """The marker of a finished stage: its whole config, that config's sha256, and the seconds it took."""
    return json.loads(storage.read_bytes(storage.join(stage.folder, MARKER)))


def table(cfg: PipelineConfig, stages: Sequence[Stage]) -> dict[str, Any]:
    """The rows of the table: the paper's SI-SNRi and SDRi in dB, ours by seed, and what the training took."""
    rows = []
    for row in cfg.table:
        results = {
            str(stage.seed): measured(stage)
            for stage in stages
            if row.stage and stage.name == row.stage
        }
        paper = dict(zip(("si_snri", "sdri"), row.paper, strict=False))
        rows.append({"label": row.label, "paper": paper, "seeds": results})
    minutes = {
        f"seed-{stage.seed}/{stage.name}": read_marker(stage)["seconds"] / 60 for stage in stages
    }
    grids = [filled(grid, stages) for grid in cfg.grids]
    return {
        "name": cfg.name,
        "title": cfg.title,
        "rows": rows,
        "grids": grids,
        "minutes_of_stages": minutes,
    }


def filled(grid: GridConfig, stages: Sequence[Stage]) -> dict[str, Any]:
    """A grid with the numbers of each seed in its cells."""
    rows = []
    for row in grid.rows:
        cells = []
        for cell, paper in zip(row.cells, row.paper or [None] * len(row.cells), strict=True):
            name, _, path = cell.partition(":")
            seeds = {
                str(stage.seed): number_of(stage, path) for stage in stages if stage.name == name
            }
            cells.append({"paper": paper, "seeds": seeds})
        rows.append({"label": row.label, "cells": cells})
    return {"title": grid.title, "columns": grid.columns, "digits": grid.digits, "rows": rows}


def number_of(stage: Stage, path: str) -> float | None:
    """The number `path`, as metrics_db.si_snri.mean, in the results of a stage; ConfigError where there is none."""
    found = json.loads(storage.read_bytes(storage.join(stage.folder, "results.json")))
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            raise ConfigError(
                f"{stage.folder}/results.json has no {path}: change the grid's cell {stage.name}:{path}"
            )
        found = found[key]
    return found


def measured(stage: Stage) -> dict[str, float | None]:
    """What one evaluation found, and the length and the mean label-switch rate of the run that it scored."""
    results = json.loads(storage.read_bytes(storage.join(stage.folder, "results.json")))
    rows = read_metrics(stage.uses[0])
    rates = [row["switching/rate"] for row in rows if "switching/rate" in row]
    return {
        "si_snri": results["metrics_db"]["si_snri"]["mean"],
        "sdri": results["metrics_db"]["sdri"]["mean"],
        "best_step": results["model"]["lineage"]["step"],
        "steps": rows[-1]["step"],
        "minutes": rows[-1]["seconds"] / 60,
        "switch_rate": sum(rates) / len(rates) if rates else None,
    }


def to_markdown(results: dict[str, Any]) -> str:
    """The table as people read it: the mean over seeds, and each seed in brackets where there are several."""
    head = (
        "",
        "SI-SNRi, paper",
        "SI-SNRi",
        "SDRi, paper",
        "SDRi",
        "steps",
        "minutes",
        "label switches",
    )
    lines = [f"# {results['title'] or results['name']}", ""]
    if results["rows"]:
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in results["rows"]:
        seeds = list(row["seeds"].values())

        def cell(name: str, digits: int = 2, factor: float = 1.0, seeds: list[Any] = seeds) -> str:
            return mean_and_each(
                [seed[name] * factor for seed in seeds if seed[name] is not None], digits
            )

        paper = {name: str(row["paper"].get(name, "")) for name in ("si_snri", "sdri")}
        cells = [row["label"], paper["si_snri"], cell("si_snri"), paper["sdri"], cell("sdri")]
        rate = cell("switch_rate", 1, 100)
        cells += [cell("steps", 0), cell("minutes", 1), f"{rate} %" if rate else ""]
        lines.append("| " + " | ".join(cells) + " |")
    for grid in results.get("grids", []):
        lines += [""] * bool(lines[-1]) + [
            f"## {grid['title']}",
            "",
            "| | " + " | ".join(grid["columns"]) + " |",
        ]
        lines.append("|---" * (len(grid["columns"]) + 1) + "|")
        for row in grid["rows"]:
            cells = [row["label"]]
            for one in row["cells"]:
                ours = mean_and_each(
                    [v for v in one["seeds"].values() if v is not None], grid["digits"]
                )
                cells.append(ours + ("" if one["paper"] is None else f" (paper {one['paper']})"))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_and_each(values: Sequence[float], digits: int) -> str:
    """The mean, and each value in brackets where there are several; nothing for none."""
    if not values:
        return ""
    each = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{each}"
