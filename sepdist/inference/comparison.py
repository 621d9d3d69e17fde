"""Compare two evaluations of one data set: mean differences, intervals and a paired test."""

import csv
import io
import json
from typing import Any

import numpy as np
from rich.console import Console

from sepdist import slots, storage
from sepdist.config import CompareConfig, ConfigError, differences
from sepdist.inference.evaluation import METRICS, print_scores, text_of
from sepdist.metrics.intervals import SCHEME, mean_intervals, sign_flip_p
from sepdist.reporting import to_json

COLUMNS = ("a", "b", "b - a (95 % interval)", "p")


def compare(cfg: CompareConfig, console: Console) -> dict[str, Any]:
    """Print and return how far `b` is above `a` on the utterances that both scored.

    ConfigError if a folder is no evaluation, or their data or settings differ.
    """
    slots.make_paths_absolute(cfg)
    data, rows = zip(read_evaluation(cfg.a), read_evaluation(cfg.b), strict=True)
    if different := differences(*data, free=("url",)):
        raise ConfigError(f"{cfg.a} and {cfg.b} are of different data: {'; '.join(different)}")
    ids = [one for one in rows[0] if one in rows[1]]
    shared = [
        name for name in METRICS if all(one and name in next(iter(one.values())) for one in rows)
    ]
    left_out = [len(one) - len(ids) for one in rows]
    if not ids:
        raise ConfigError(f"{cfg.a} and {cfg.b} have no utterance in common")
    values = np.array([[[float(one[id_][name]) for name in shared] for id_ in ids] for one in rows])
    speakers = [rows[0][id_]["speakers"] for id_ in ids]
    ends_2K = mean_intervals(values[1] - values[0], speakers)
    found, columns = dict[str, Any](), {one: dict[str, str]() for one in COLUMNS}
    for name, pair, ends in zip(shared, np.moveaxis(values, 2, 0), ends_2K.T, strict=True):
        known = ~np.isnan(pair).any(0)
        [a, b], gain = pair[:, known].mean(1), pair[1, known] - pair[0, known]
        p = sign_flip_p(gain, [one for one, use in zip(speakers, known, strict=True) if use])
        found[name] = {"a": a, "b": b, "difference": gain.mean(), "p": p, "num": len(gain)}
        found[name]["interval"] = None if np.isnan(ends).any() else ends.tolist()
        difference = text_of(name, gain.mean(), *(found[name]["interval"] or ()))
        cells = text_of(name, a), text_of(name, b), difference, f"{p:.4f}"
        for column, cell in zip(columns.values(), cells, strict=True):
            column[name] = cell
    print_scores(
        console, f"{len(ids)} utterances of {data[0]['corpus']} {data[0]['split']}", columns
    )
    if any(left_out):
        console.print("left out, as the other has no score: {} of a, {} of b".format(*left_out))
    results = {"a": cfg.a, "b": cfg.b, "num_utterances": len(ids), "num_left_out": left_out}
    results |= {"data": data[0], "scheme": SCHEME, "differences": found}
    if cfg.output:
        place = storage.join(cfg.output, "comparison.json")
        storage.put_bytes(place, to_json(results, indent=1).encode())
    return results


def read_evaluation(folder: str) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """What was scored, and the scored lines of utterances.csv by id."""
    try:
        data = json.loads(storage.read_bytes(storage.join(folder, "results.json")))["data"]
        text = storage.read_bytes(storage.join(folder, "utterances.csv")).decode()
    except (FileNotFoundError, KeyError) as error:
        raise ConfigError(f"{folder} holds no evaluation of one data set ({error})") from error
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(text)) if not row["reason"]}
    return data, rows
