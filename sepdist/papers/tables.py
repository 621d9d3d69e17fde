"""Tables of a pipeline: results beside the paper's numbers, as JSON and Markdown."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sepdist import storage
from sepdist.config import ConfigError
from sepdist.papers.schema import PipelineConfig, RowConfig, Stage
from sepdist.reporting import read_metrics

MARKER = "stage.json"
NO_CELL = "-"


def read_marker(stage: Stage) -> dict[str, Any]:
    """The marker of a finished stage: its whole config and the seconds that it took."""
    return json.loads(storage.read_bytes(storage.join(stage.folder, MARKER)))


def fill_tables(cfg: PipelineConfig, stages: Sequence[Stage]) -> dict[str, Any]:
    """Return all tables with the numbers of each seed in their cells, and the stages' minutes."""
    minutes = {f"seed-{one.seed}/{one.name}": read_marker(one)["seconds"] / 60 for one in stages}
    tables = [
        asdict(table) | {"rows": [fill_row(row, stages) for row in table.rows]}
        for table in cfg.tables
    ]
    return {"name": cfg.name, "title": cfg.title, "tables": tables, "minutes_of_stages": minutes}


def fill_row(row: RowConfig, stages: Sequence[Stage]) -> dict[str, Any]:
    """Return a row of a table with the paper's number and that of each seed in its cells."""
    cells = []
    for cell, paper in zip(row.cells, row.paper or [None] * len(row.cells), strict=True):
        name, _, path = cell.partition(":")
        seeds = {str(one.seed): number_of(one, path) for one in stages if one.name == name}
        cells.append({"paper": paper, "seeds": seeds})
    return {"title": row.title, "cells": cells}


def number_of(stage: Stage, path: str) -> float | None:
    """Look up a number such as metrics_db.si_snri.mean in the results of a stage.

    A training stage has steps, minutes, switch_percent (mean label switches). ConfigError if none.
    """
    if stage.kind == "train":
        rows = read_metrics(stage.folder)
        rates = [100 * row["switching/rate"] for row in rows if "switching/rate" in row]
        found: Any = {
            "steps": rows[-1]["step"],
            "minutes": rows[-1]["seconds"] / 60,
            "switch_percent": sum(rates) / len(rates) if rates else None,
        }
    else:
        found = json.loads(storage.read_bytes(storage.join(stage.folder, "results.json")))
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            todo = f"change the cell {stage.name}:{path}"
            raise ConfigError(f"{stage.folder}: its results have no {path}: {todo}")
        found = found[key]
    if not isinstance(found, int | float | None):
        raise ConfigError(f"{stage.folder}: {path} is no number: change {stage.name}:{path}")
    return found


def to_markdown(results: dict[str, Any]) -> str:
    """Format the tables: means over seeds, each seed in brackets where there are several."""
    lines = [f"# {results['title'] or results['name']}"]
    for table in results["tables"]:
        if table["title"]:
            lines += ["", f"## {table['title']}"]
        lines += ["", "| | " + " | ".join(table["columns"]) + " |"]
        lines += ["|---" * (len(table["columns"]) + 1) + "|"]
        for row in table["rows"]:
            cells = [format_cell(cell, table["digits"]) for cell in row["cells"]]
            lines.append("| " + " | ".join([row["title"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def format_cell(cell: dict[str, Any], digits: int) -> str:
    """Format the mean, each of several seeds and the paper's number; "" where there is none."""
    values = [value for value in cell["seeds"].values() if value is not None]
    if all(isinstance(value, int) for value in values):
        digits = 0
    each = [f"{value:.{digits}f}" for value in values]
    mean = [f"{sum(values) / len(values):.{digits}f}"] if values else []
    seeds = [f"({', '.join(each)})"] if len(each) > 1 else []
    paper = [] if cell["paper"] is None else [f"(paper {cell['paper']})"]
    return " ".join(mean + seeds + paper)
