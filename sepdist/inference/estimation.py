"""Score an SI-SNR estimator: correlation and error of its predictions on a data set with estimates."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sepdist import storage
from sepdist.cluster import run_tasks
from sepdist.config import ConfigError, EvaluateConfig
from sepdist.console import progress_bar
from sepdist.inference.export import load_export
from sepdist.inference.scoring import absolute_paths, open_dataset, read_full, single_threaded
from sepdist.metrics.si_snr import si_snr
from sepdist.plotting import scatter, to_png


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One mixture: SI-SNR in dB of each estimate, in the order of the sources."""

    id: str
    true: tuple[float, ...]
    predicted: tuple[float, ...]


def judge(cfg: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Judge the data set, write the output folder; returns what results.json holds.

    Raises:
        ConfigError: the data set has no estimates, or another sample rate than the model.
    """
    cfg = absolute_paths(cfg)
    dataset, export = open_dataset(cfg), load_export(cfg.model)
    manifest = dataset.manifest
    if "e1" not in manifest.members:
        raise ConfigError(
            f"{cfg.data} has {', '.join(manifest.members)}, no estimates; write it with corpus=separated"
        )
    if export.sample_rate != manifest.sample_rate:
        raise ConfigError(
            f"{cfg.model} works at {export.sample_rate} Hz, {cfg.data} has {manifest.sample_rate} Hz"
        )
    count = min(cfg.num_mixtures or manifest.num_samples, manifest.num_samples)
    num_parts = max(1, min(cfg.num_workers, count))
    calls = [(cfg, part, count, num_parts) for part in range(num_parts)]
    found: dict[int, Verdict] = {}
    with progress_bar(console, "scoring", count) as advance:
        here = itertools.chain.from_iterable(itertools.starmap(judge_part, calls))
        for index, verdict in (
            run_tasks(judge_part, calls, num_gpus=float(cfg.use_gpu)) if cfg.num_workers else here
        ):
            found[index] = verdict
            advance()
    verdicts = [found[index] for index in range(count)]
    true, predicted = (
        np.array([getattr(one, name) for one in verdicts]) for name in ("true", "predicted")
    )
    results: dict[str, Any] = {
        "model": {"url": cfg.model, "lineage": export.lineage},
        "data": {
            "url": cfg.data,
            "corpus": manifest.corpus,
            "split": manifest.split,
            "digest": manifest.digest(),
        },
        "num_mixtures": count,
        **agreement(true.mean(1), predicted.mean(1)),
        "by_estimate": agreement(true.ravel(), predicted.ravel()),
    }
    storage.put_bytes(storage.join(cfg.output, "utterances.csv"), to_csv(verdicts).encode())
    label = (
        "no correlation"
        if results["lcc"] is None
        else f"LCC {results['lcc']:.2f}, MAE {results['mae']:.2f} dB"
    )
    picture = scatter({label: np.stack([true.mean(1), predicted.mean(1)])}, manifest.split)
    storage.put_bytes(storage.join(cfg.output, "scatter.png"), to_png(picture))
    storage.put_bytes(
        storage.join(cfg.output, "results.json"), json.dumps(results, indent=1).encode()
    )
    correlation = "none" if results["lcc"] is None else f"{results['lcc']:.3f}"
    line = f"{count} mixtures: LCC {correlation}, MAE {results['mae']:.2f} dB, bias {results['bias']:+.2f} dB"
    console.print(f"{line}; results: {cfg.output}", markup=False, highlight=False, soft_wrap=True)
    return results


def judge_part(
    cfg: EvaluateConfig, part: int, count: int, num_parts: int
) -> Iterator[tuple[int, Verdict]]:
    """Index and verdict of the mixtures `part`, `part + num_parts`, ... below `count`."""
    device = torch.device("cuda" if cfg.use_gpu else "cpu")
    model, dataset = load_export(cfg.model).model.to(device), open_dataset(cfg)
    with single_threaded(), torch.inference_mode():
        for index in range(part, count, num_parts):
            batch = read_full(cfg, dataset, index)
            assert batch.sources is not None and batch.estimates is not None
            true = si_snr(batch.estimates.double(), batch.sources.double())[0]
            predicted = model(batch.mixture.to(device), batch.estimates.to(device))[0].float().cpu()
            yield index, Verdict(batch.ids[0], tuple(true.tolist()), tuple(predicted.tolist()))


def agreement(true: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """Pearson's correlation (None where one side never varies), mean absolute error and mean error in dB."""
    varied = len(true) > 1 and true.std() > 0 and predicted.std() > 0
    return {
        "lcc": float(np.corrcoef(true, predicted)[0, 1]) if varied else None,
        "mae": float(np.abs(predicted - true).mean()),
        "bias": float((predicted - true).mean()),
    }


def to_csv(verdicts: Sequence[Verdict]) -> str:
    """One line per mixture, one pair of columns per estimate."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    numbers = range(1, len(verdicts[0].true) + 1)
    writer.writerow(["id", *(f"true_{i}" for i in numbers), *(f"predicted_{i}" for i in numbers)])
    for one in verdicts:
        writer.writerow([one.id, *(f"{value:.4f}" for value in (*one.true, *one.predicted))])
    return stream.getvalue()
