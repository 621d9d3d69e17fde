"""Compare two evaluations of one data set: mean differences, intervals and a paired test."""

import csv
import io
import json
from typing import Any

import numpy as np
from rich.console import Console

from sepdist import storage
from sepdist.config import CompareConfig, ConfigError, differences, listed
from sepdist.inference.evaluation import METRICS, mean_of, print_scores, text_of
from sepdist.metrics.intervals import SCHEME, SEEDS, mean_intervals, sign_flip_p, t_interval
from sepdist.reporting import to_json


def compare(cfg: CompareConfig, console: Console) -> dict[str, Any]:
    """Print and return how far `b` is above `a` on the utterances that have all scores in all.

    With several folders on each side, runs of as many seeds in the same order, the difference has
    also an interval over seeds. ConfigError if a folder is no evaluation, their data or settings
    differ, or nothing is common.
    """
    sides = [[storage.absolute(one) for one in listed(side)] for side in (cfg.a, cfg.b)]
    if len(sides[0]) != len(sides[1]):
        raise ConfigError(f"a has {len(sides[0])} evaluations, b {len(sides[1])}: give pairs")
    folders = [one for pair in zip(*sides, strict=True) for one in pair]
    data, rows = zip(*map(read_evaluation, folders), strict=True)
    for folder, other in zip(folders[1:], data[1:], strict=True):
        if different := differences(data[0], other, free=("url",)):
            both = f"{folders[0]} and {folder}"
            raise ConfigError(f"{both} are of different data: {'; '.join(different)}")
    names = [one for one in METRICS if not one.endswith("_mixture")]
    metrics = [one for one in names if all(one in next(iter(each.values()), ()) for each in rows)]
    values = {
        id_: np.array([[float(each[id_][one]) for one in metrics] for each in rows])
        for id_ in set.intersection(*(set(each) for each in rows))
    }
    ids = [id_ for id_ in rows[0] if id_ in values and not np.isnan(values[id_]).any()]
    if not ids or not metrics:
        raise ConfigError(f"{cfg.a} and {cfg.b} have no scored utterance in common")
    num_seeds, speakers = len(sides[0]), [rows[0][id_]["speakers"] for id_ in ids]
    pairs_NE2K = np.stack([values[id_] for id_ in ids]).reshape(len(ids), num_seeds, 2, -1)
    gains_ENK = (pairs_NE2K[:, :, 1] - pairs_NE2K[:, :, 0]).swapaxes(0, 1)
    several = num_seeds > 1
    intervals = mean_intervals(gains_ENK if several else gains_ENK[0], speakers)
    means_2K = pairs_NE2K.mean((0, 1))
    titles = ("a", "b", "b - a", *(["over seeds"] if several else []), "p")
    found, columns = dict[str, Any](), {one: dict[str, str]() for one in titles}
    for k, one in enumerate(metrics):
        gains_EN = gains_ENK[..., k]
        gain, p = float(gains_EN.mean()), sign_flip_p(gains_EN.mean(0), speakers)
        found[one] = {"mean": gain, "interval": intervals[k], "p": p}
        texts = [*(text_of(one, mean) for mean in means_2K[:, k]), mean_of(one, found[one])]
        if several:
            found[one]["over_seeds"] = over = t_interval(gains_EN.mean(1))
            found[one]["seeds"] = gains_EN.mean(1).tolist()
            texts.append(text_of(one, *over or ()))
        for column, text in zip(columns.values(), [*texts, f"{p:.4f}"], strict=True):
            column[one] = text
    title = f"{len(ids)} utterances of {data[0]['corpus']} {data[0]['split']}"
    print_scores(console, title + f", {num_seeds} seeds" * several, columns)
    left_out = [max(map(len, rows[side::2])) - len(ids) for side in (0, 1)]
    if any(left_out):
        console.print("left out, without a score in the other: {} of a, {} of b".format(*left_out))
    results = {"a": cfg.a, "b": cfg.b, "num_utterances": len(ids), "num_left_out": left_out}
    results |= {"data": data[0], "intervals": SEEDS if several else SCHEME, "differences": found}
    if cfg.output:
        place = storage.join(storage.absolute(cfg.output), "comparison.json")
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
