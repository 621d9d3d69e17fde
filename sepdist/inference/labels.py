"""Label assignments of every checkpoint of a run on a data set, and how often they switch."""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sepdist import storage
from sepdist.cluster import run_tasks
from sepdist.config import ConfigError, EvaluateConfig
from sepdist.console import progress_bar
from sepdist.inference.export import load_export
from sepdist.inference.scoring import (
    absolute_paths,
    check_fit,
    estimate,
    open_dataset,
    read_full,
    single_threaded,
)
from sepdist.metrics.permutation import best_permutation, permutation_rank
from sepdist.metrics.si_snr import pairwise_si_snr
from sepdist.reporting import read_metrics
from sepdist.training.checkpoint import Committed, find_committed, read_file

Labels = dict[str, int]  # utterance id -> rank of its best assignment


def label(cfg: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Label the data set by each checkpoint of the run `cfg.model`; returns what switching.json holds.

    Raises:
        ConfigError: the run has fewer than two checkpoints, or model and data do not fit each other.
    """
    cfg = absolute_paths(cfg)
    latest = {
        one.step: one for one in find_committed(storage.join(cfg.model, "checkpoints"))
    }  # a step may come twice
    checkpoints = [latest[step] for step in sorted(latest)]
    if len(checkpoints) < 2:
        raise ConfigError(
            f"{cfg.model} has {len(checkpoints)} checkpoint(s), a switch rate needs two: train with "
            "training.keep_every and training.checkpoint_every set to the steps of an epoch"
        )
    dataset = open_dataset(cfg)
    check_fit(cfg, load_export(checkpoints[-1].url), dataset)
    total = dataset.manifest.num_samples
    count = min(cfg.num_mixtures or total, total)
    by_step: dict[int, Labels] = {one.step: {} for one in checkpoints}
    with progress_bar(console, "scoring", count * len(checkpoints)) as advance:
        calls = [(cfg, one.url, one.step, count) for one in checkpoints]
        here = itertools.chain.from_iterable(itertools.starmap(label_by, calls))
        for step, id_, rank in (
            run_tasks(label_by, calls, num_gpus=float(cfg.use_gpu)) if cfg.num_workers else here
        ):
            by_step[step][id_] = rank
            advance()
    order = sorted(by_step[checkpoints[0].step])
    for step, labels in by_step.items():
        table = {id_: labels[id_] for id_ in order}
        storage.put_bytes(storage.join(cfg.output, f"step-{step:09d}.csv"), to_csv(table).encode())
    results: dict[str, Any] = {
        "run": cfg.model,
        "data": cfg.data,
        "num_utterances": count,
    } | compare(
        by_step,
        read_metrics(cfg.model),
        {one.step: labels_while_training(one) for one in checkpoints},
    )
    storage.put_bytes(
        storage.join(cfg.output, "switching.json"), json.dumps(results, indent=1).encode()
    )
    rates = ", ".join(f"{100 * row['rate']:.1f}" for row in results["rates"])
    console.print(
        f"labels switched, % from checkpoint to checkpoint: {rates}",
        highlight=False,
        soft_wrap=True,
    )
    return results


def label_by(
    cfg: EvaluateConfig, url: str, step: int, count: int
) -> Iterator[tuple[int, str, int]]:
    """(step, id, rank) of the first `count` utterances by one checkpoint, whole and in the order of the manifest."""
    device = torch.device("cuda" if cfg.use_gpu else "cpu")
    model, dataset = load_export(url).model.to(device), open_dataset(cfg)
    with single_threaded():
        for index in range(count):
            batch = read_full(cfg, dataset, index)
            assert batch.sources is not None
            scores = pairwise_si_snr(estimate(model, batch, device)[None], batch.sources)
            yield step, batch.ids[0], int(permutation_rank(best_permutation(scores)[1]))


def labels_while_training(one: Committed) -> Labels:
    """The labels of the last whole epoch before a checkpoint, as the run itself noted them on its crops."""
    return json.loads(read_file(one, "state.json"))["switches"]["previous"]


def compare(
    by_step: Mapping[int, Labels],
    metrics: Sequence[Mapping[str, float]],
    online: Mapping[int, Labels],
) -> dict[str, Any]:
    """The switch rate between consecutive checkpoints, and beside it what the run measured on its crops.

    A row holds the steps `from` and `to`, `rate`, and `online`: the mean of `switching/rate` over the epochs that ended
    in (from, to], None where there is none. `agreement` has the mean difference and the correlation of the two, and the
    share of utterances with the same label in both.
    """
    steps = sorted(by_step)
    rows = []
    for before, after in itertools.pairwise(steps):
        now = [
            row["switching/rate"]
            for row in metrics
            if "switching/rate" in row and before < row["step"] <= after
        ]
        rows.append(
            {
                "from": before,
                "to": after,
                "rate": 1 - share_equal(by_step[before], by_step[after]),
                "online": float(np.mean(now)) if now else None,
            }
        )
    pairs = np.array([(row["rate"], row["online"]) for row in rows if row["online"] is not None])
    same = [
        share_equal(by_step[step], online[step])
        for step in steps
        if by_step[step].keys() & online[step].keys()
    ]
    varied = len(pairs) > 2 and (pairs.std(0) > 0).all()
    agreement = {
        "mean_difference": float((pairs[:, 0] - pairs[:, 1]).mean()) if len(pairs) else None,
        "correlation": float(np.corrcoef(pairs.T)[0, 1]) if varied else None,
        "equal_labels": float(np.mean(same)) if same else None,
    }
    return {"rates": rows, "agreement": agreement}


def share_equal(first: Labels, second: Labels) -> float:
    """Of the utterances in both, the share with the same label."""
    both = first.keys() & second.keys()
    return sum(first[id_] == second[id_] for id_ in both) / len(both)


def to_csv(labels: Labels) -> str:
    """A table of labels as text."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("id", "permutation"))
    writer.writerows(labels.items())
    return stream.getvalue()
