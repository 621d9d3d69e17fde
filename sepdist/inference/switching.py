"""Measure label switching: how often the permutations change between a run's checkpoints."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from rich.console import Console

from sepdist import slots, storage
from sepdist.config import ConfigError, EvaluateConfig
from sepdist.inference import scoring
from sepdist.inference.export import load_separator
from sepdist.metrics.permutation import best_permutation, permutation_rank
from sepdist.metrics.si_snr import pairwise_si_snr
from sepdist.metrics.switching import SwitchTracker
from sepdist.reporting import read_metrics, to_csv, versions
from sepdist.training.checkpoint import find_committed, load_snapshot

Permutations = dict[str, int]  # utterance id -> rank of its best permutation


def measure_switching(cfg: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Assign the data set by each checkpoint of the run `cfg.model`.

    Writes a table per checkpoint and switching.json; returns the content of the latter. ConfigError
    if the run has fewer than two checkpoints, or model and data do not fit.
    """
    slots.make_paths_absolute(cfg)
    committed = find_committed(storage.join(cfg.model, "checkpoints"))
    by_step = {one.step: one for one in committed}  # the newest, where a step occurs twice
    checkpoints = [by_step[step] for step in sorted(by_step)]
    if len(checkpoints) < 2:
        raise ConfigError(
            f"{cfg.model} has {len(checkpoints)} checkpoint(s), a switch rate needs two: train with"
            " training.keep_every and training.checkpoint_every set to the steps of an epoch"
        )
    _, ids = scoring.check_data(cfg, load_separator(checkpoints[-1].url))
    items = [(one.url, number) for one in checkpoints for number in range(len(ids))]
    names = [{"step": one.step} | own for one in checkpoints for own in ids]
    ranked, unscored = scoring.run_on_data_set(
        assigner, cfg, items, names, console, "switching.json"
    )
    found: dict[int, Permutations] = {one.step: {} for one in checkpoints}
    for item, assigned in ranked.items():
        found[names[item]["step"]][names[item]["id"]] = assigned["permutation"]
    tables = {
        f"step-{step:09d}.csv": to_csv(("id", "permutation"), sorted(permutations.items()))
        for step, permutations in found.items()
    }
    # The permutations of the last whole epoch before a checkpoint, as the run saw its crops.
    in_training, tracker = {}, SwitchTracker()
    for one in checkpoints:
        tracker.load(load_snapshot(one.url).tables)
        in_training[one.step] = tracker.previous(list(found[one.step]))
    results = {
        "run": cfg.model,
        "data": cfg.data,
        "num_utterances": len({names[item]["id"] for item in ranked}),
        **compare(found, read_metrics(cfg.model), in_training),
        "versions": versions("torch", "numpy"),
    } | unscored
    known = [row["rate"] for row in results["rates"] if row["rate"] is not None]
    rates = ", ".join(f"{100 * rate:.1f}" for rate in known)
    console.print(f"labels switched, % from checkpoint to checkpoint: {rates}")
    scoring.write_results(console, cfg, tables, results, "switching.json")
    return results


def assigner(cfg: EvaluateConfig) -> Callable[[tuple[str, int]], dict[str, int]]:
    """A function that gives the rank of the best `permutation` for (checkpoint, mixture)."""
    opened = lru_cache(maxsize=1)(lambda url: scoring.mixture_separator(replace(cfg, model=url)))

    def assign(item: tuple[str, int]) -> dict[str, int]:
        estimates_ST, batch, _ = opened(item[0])(item[1])
        assert batch.sources is not None
        scoring.check_audible(batch.ids[0], estimates_ST, batch.sources[0])
        _, order_BS = best_permutation(pairwise_si_snr(estimates_ST[None], batch.sources))
        return {"permutation": int(permutation_rank(order_BS))}

    return assign


def compare(
    by_step: Mapping[int, Permutations],
    metrics: Sequence[Mapping[str, float]],
    in_training: Mapping[int, Permutations],
) -> dict[str, Any]:
    """Switch rates between consecutive checkpoints, compared with those measured in training.

    A row has the steps `from` and `to`, `rate`, and `online`: the mean of `switching/rate` over the
    epochs that ended in (from, to], None where there is none. `agreement` has the mean difference
    and the correlation of the two rates, and the share of utterances with equal permutations.
    """
    steps = sorted(by_step)
    measured = [row for row in metrics if "switching/rate" in row]
    rows = []
    for before, after in itertools.pairwise(steps):
        online = [row["switching/rate"] for row in measured if before < row["step"] <= after]
        same = share_equal(by_step[before], by_step[after])
        rate = None if same is None else 1 - same
        mean = float(np.mean(online)) if online else None
        rows.append({"from": before, "to": after, "rate": rate, "online": mean})
    pairs = np.array([(row["rate"], row["online"]) for row in rows if None not in row.values()])
    shares = [share_equal(by_step[step], in_training[step]) for step in steps]
    equal = [share for share in shares if share is not None]
    varied = len(pairs) > 2 and (pairs.std(0) > 0).all()
    agreement = {
        "mean_difference": float((pairs[:, 0] - pairs[:, 1]).mean()) if len(pairs) else None,
        "correlation": float(np.corrcoef(pairs.T)[0, 1]) if varied else None,
        "equal_permutations": float(np.mean(equal)) if equal else None,
    }
    return {"rates": rows, "agreement": agreement}


def share_equal(first: Permutations, second: Permutations) -> float | None:
    """The share of the utterances in both that have equal permutations; None without any."""
    both = first.keys() & second.keys()
    return sum(first[id_] == second[id_] for id_ in both) / len(both) if both else None
