"""Score an SI-SNR estimator: correlation and error of its predictions on a data set."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sepdist import slots
from sepdist.config import ConfigError, EvaluateConfig
from sepdist.inference import scoring
from sepdist.inference.export import load_export
from sepdist.metrics.si_snr import si_snr
from sepdist.reporting import to_csv, versions


@dataclass(frozen=True)
class Prediction:
    """SI-SNR in dB of each estimate of one mixture, in the order of the sources."""

    id: str
    true: tuple[float, ...]
    predicted: tuple[float, ...]


def evaluate_estimator(cfg: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Score the estimator and write the output folder; returns the content of results.json."""
    from sepdist.plotting import scatter, to_png  # late: Ray tasks draw nothing

    slots.make_paths_absolute(cfg)
    export = load_export(cfg.model)
    manifest, numbers = scoring.check_data(cfg, export)
    if "e1" not in manifest.members:
        raise ConfigError(
            f"{cfg.data} has {', '.join(manifest.members)}, no estimates; "
            "write it with corpus=separated"
        )
    predictions = scoring.run_on_data_set(predict, cfg, numbers, console)
    true = np.array([one.true for one in predictions])
    predicted = np.array([one.predicted for one in predictions])
    found = agreement(true.mean(1), predicted.mean(1))
    results: dict[str, Any] = {
        "model": {"url": cfg.model, "lineage": export.lineage},
        "data": {
            "url": cfg.data,
            "corpus": manifest.corpus,
            "split": manifest.split,
            "digest": manifest.digest(),
        },
        "num_mixtures": len(predictions),
        **found,
        "by_estimate": agreement(true.ravel(), predicted.ravel()),
        "versions": versions("torch", "numpy"),
    }
    lcc = "none" if found["lcc"] is None else f"{found['lcc']:.3f}"
    title = f"LCC {lcc}, MAE {found['mae']:.2f} dB"
    picture = scatter({title: np.stack([true.mean(1), predicted.mean(1)])}, manifest.split)
    columns = itertools.product(("true", "predicted"), range(1, true.shape[1] + 1))
    header = ["id", *(f"{name}_{number}" for name, number in columns)]
    rows = [(one.id, *one.true, *one.predicted) for one in predictions]
    files = {"utterances.csv": to_csv(header, rows), "scatter.png": to_png(picture)}
    console.print(f"{len(predictions)} mixtures: {title}, bias {found['bias']:+.2f} dB")
    scoring.write_results(console, cfg.output, files, results)
    return results


def predict(cfg: EvaluateConfig, numbers: Sequence[int]) -> Iterator[Prediction]:
    """True and predicted SI-SNR of the estimates of each mixture."""
    device = scoring.device_of(cfg)
    model = load_export(cfg.model).model.to(device)
    for batch in scoring.read_batches(cfg, numbers):
        assert batch.sources is not None and batch.estimates is not None
        true = si_snr(batch.estimates.double(), batch.sources.double())[0]
        with torch.inference_mode():
            predicted = model(batch.mixture.to(device), batch.estimates.to(device))[0].float().cpu()
        yield Prediction(batch.ids[0], tuple(true.tolist()), tuple(predicted.tolist()))


def agreement(true: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """Pearson's correlation (None where one does not vary), mean absolute and mean error in dB."""
    varied = len(true) > 1 and true.std() > 0 and predicted.std() > 0
    return {
        "lcc": float(np.corrcoef(true, predicted)[0, 1]) if varied else None,
        "mae": float(np.abs(predicted - true).mean()),
        "bias": float((predicted - true).mean()),
    }
