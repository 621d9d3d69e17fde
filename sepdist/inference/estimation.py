"""Score an SI-SNR estimator: correlation and error of its predictions on a data set."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sepdist import slots
from sepdist.config import ConfigError, EvaluateConfig
from sepdist.inference import scoring
from sepdist.inference.export import load_export
from sepdist.metrics.si_snr import si_snr
from sepdist.reporting import versions


def evaluate_estimator(cfg: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Score the estimator and write the output folder; returns the content of results.json."""
    from sepdist.plotting import scatter, to_png  # late: Ray tasks draw nothing

    slots.make_paths_absolute(cfg)
    export = load_export(cfg.model)
    if not getattr(export.model, "estimates_si_snr", False):
        kind = type(export.model).__name__
        raise ConfigError(f"{cfg.model}: a {kind} is no SI-SNR estimator: give a run of one")
    manifest, ids = scoring.check_data(cfg, export)
    if "e1" not in manifest.members:
        raise ConfigError(
            f"{cfg.data} has {', '.join(manifest.members)}, no estimates; "
            "write it with corpus=separated"
        )
    rows, unscored = scoring.run_on_data_set(predictor, cfg, range(len(ids)), ids, console)
    true, predicted = np.split(np.array([[*one.values()] for one in rows.values()]), 2, axis=1)
    found = agreement(true.mean(1), predicted.mean(1))
    data = {"url": cfg.data, "corpus": manifest.corpus, "split": manifest.split}
    results: dict[str, Any] = {
        "model": {"url": cfg.model, "lineage": export.lineage},
        "data": data | {"digest": manifest.digest()},
        "num_mixtures": len(true),
        **found,
        "by_estimate": agreement(true.ravel(), predicted.ravel()),
        "versions": versions("torch", "numpy"),
    } | unscored
    lcc = "none" if found["lcc"] is None else f"{found['lcc']:.3f}"
    title = f"LCC {lcc}, MAE {found['mae']:.2f} dB"
    picture = scatter({title: np.stack([true.mean(1), predicted.mean(1)])}, manifest.split)
    counted = f"{len(true)} of " * (len(true) < len(ids)) + f"{len(ids)} mixtures"
    console.print(f"{counted}: {title}, bias {found['bias']:+.2f} dB")
    scoring.write_results(console, cfg, {"scatter.png": to_png(picture)}, results)
    return results


def predictor(cfg: EvaluateConfig) -> Callable[[int], dict[str, float]]:
    """A function that gives SI-SNR in dB of a mixture's estimates: true_1, ..., predicted_1, ..."""
    device, dataset = scoring.device_of(cfg), scoring.open_dataset(cfg)
    model = load_export(cfg.model).model.to(device)

    def predict(number: int) -> dict[str, float]:
        batch = dataset.full(number, cfg.max_seconds or scoring.NO_LIMIT_SECONDS)
        assert batch.sources is not None and batch.estimates is not None
        scoring.check_audible(batch.ids[0], batch.estimates[0], batch.sources[0])
        true = si_snr(batch.estimates.double(), batch.sources.double())[0]
        with torch.inference_mode():
            predicted = model(batch.mixture.to(device), batch.estimates.to(device))[0].float().cpu()
        if not predicted.isfinite().all():
            raise scoring.EvaluationError(f"{batch.ids[0]}: the estimator predicts NaN or infinity")
        named = {"true": true.tolist(), "predicted": predicted.tolist()}
        return {f"{one}_{i}": x for one, all_ in named.items() for i, x in enumerate(all_, 1)}

    return predict


def agreement(true: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """Pearson's correlation (None where one does not vary), mean absolute and mean error in dB."""
    varied = len(true) > 1 and true.std() > 0 and predicted.std() > 0
    return {
        "lcc": float(np.corrcoef(true, predicted)[0, 1]) if varied else None,
        "mae": float(np.abs(predicted - true).mean()),
        "bias": float((predicted - true).mean()),
    }
