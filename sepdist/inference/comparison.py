"""Compare two evaluations of one data set: mean differences, intervals and a paired test."""

import csv
import io
import json
from typing import Any

import numpy as np
from rich.console import Console

from sepdist import slots, storage
from sepdist.config import CompareConfig, ConfigError, differences
from sepdist.inference.evaluation import METRICS, mean_of, print_scores, text_of
from sepdist.metrics.intervals import SCHEME, mean_intervals, sign_flip_p
from sepdist.reporting import to_json


def compare(cfg: CompareConfig, console: Console) -> dict[str, Any]:
    """Print and return how far `b` is above `a` on the utterances that have all scores in both.

    ConfigError if a folder is no evaluation, their data or settings differ, or nothing is common.
    """
    slots.make_paths_absolute(cfg)
    data, rows = zip(*map(read_evaluation, (cfg.a, cfg.b)), strict=True)
    if different := differences(data[0], data[1], free=("url",)):
        raise ConfigError(f"{cfg.a} and {cfg.b} are of different data: {'; '.join(different)}")
    names = [one for one in METRICS if not one.endswith("_mixture")]
    metrics = [one for one in names if all(one in next(iter(each.values()), ()) for each in rows)]
    values = {
        id_: np.array([[float(each[id_][one]) for one in metrics] for each in rows])
        for id_ in rows[0].keys() & rows[1].keys()
    }
    ids = [id_ for id_ in rows[0] if id_ in values and not np.isnan(values[id_]).any()]
    if not ids or not metrics:
        raise ConfigError(f"{cfg.a} and {cfg.b} have no scored utterance in common")
    pairs_NK2 = np.stack([values[id_].T for id_ in ids])
    speakers, gains_NK = [rows[0][id_]["speakers"] for id_ in ids], np.diff(pairs_NK2)[..., 0]
    intervals, means_K2 = mean_intervals(gains_NK, speakers), pairs_NK2.mean(0)
    found, columns = dict[str, Any](), {one: dict[str, str]() for one in ("a", "b", "b - a", "p")}
    for k, one in enumerate(metrics):
        gain, p = float(gains_NK[:, k].mean()), sign_flip_p(gains_NK[:, k], speakers)
        found[one] = {"mean": gain, "interval": intervals[k], "p": p}
        texts = [
            *(text_of(one, mean) for mean in means_K2[k]),
            mean_of(one, found[one]),
            f"{p:.4f}",
        ]
        for column, text in zip(columns.values(), texts, strict=True):
            column[one] = text
    title = f"{len(ids)} utterances of {data[0]['corpus']} {data[0]['split']}"
    print_scores(console, title, columns)
    left_out = [len(each) - len(ids) for each in rows]
    if any(left_out):
        console.print("left out, without a score in the other: {} of a, {} of b".format(*left_out))
    results = {"a": cfg.a, "b": cfg.b, "num_utterances": len(ids), "num_left_out": left_out}
    results |= {"data": data[0], "intervals": SCHEME, "differences": found}
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
    return data, {
        row["id"]: row for row in csv.DictReader(io.StringIO(text)) if not row.get("reason")
    }
