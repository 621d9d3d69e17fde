"""Score a separator on a data set: SI-SNR and SDR of every utterance, summarised in results.json.

Shapes: S sources, T samples.
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sepdist import slots, storage
from sepdist.config import EvaluateConfig
from sepdist.data.records import Batch
from sepdist.data.shards import Manifest, read_manifest
from sepdist.inference import scoring
from sepdist.inference.export import Export, load_separator
from sepdist.inference.scoring import EvaluationError
from sepdist.metrics.permutation import best_permutation
from sepdist.metrics.sdr import TAPS, pairwise_sdr
from sepdist.metrics.si_snr import pairwise_si_snr
from sepdist.reporting import versions

METRICS = {
    "si_snr_mixture": "SI-SNR of the mixture",
    "si_snr": "SI-SNR",
    "si_snri": "SI-SNRi",
    "sdr_mixture": "SDR of the mixture",
    "sdr": "SDR",
    "sdri": "SDRi",
}
STATISTICS: dict[str, Callable[[np.ndarray], Any]] = {
    "mean": np.mean,
    "std": lambda values: values.std(ddof=min(1, len(values) - 1)),
    "median": np.median,
    "min": np.min,
    "max": np.max,
}


@dataclass(frozen=True)
class Score:
    """One utterance; values in dB are means over its sources unless named `by_source`."""

    id: str
    length_seconds: float
    speakers: str  # "+" between them
    si_snr_mixture: float
    si_snr: float
    si_snri: float
    sdr_mixture: float
    sdr: float
    sdri: float
    si_snr_mixture_by_source: tuple[float, ...]
    si_snr_by_source: tuple[float, ...]
    permutation: str  # for sources 1, 2, ... the number (from 1) of the estimate assigned to it


def evaluate(cfg: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Score the data set, write the output folder, print the table; returns results.json's content.

    ConfigError if model and data do not fit; EvaluationError, when the rest is written, if more
    than `max_unscored` utterances have no finite score.
    """
    from sepdist.plotting import improvements, to_png  # late: Ray tasks draw nothing

    slots.make_paths_absolute(cfg)
    began = time.monotonic()
    export = load_separator(cfg.model)
    manifest, ids = scoring.check_data(cfg, export)
    found, unscored = scoring.run_on_data_set(scorer, cfg, range(len(ids)), ids, console)
    with scoring.single_threaded():
        separate = scoring.mixture_separator(cfg)
        for number in list(found)[: cfg.num_listening]:
            folder = storage.join(cfg.output, "listening", str(number))
            write_listening(folder, *separate(number), export.sample_rate)
    scores: list[Score] = list(found.values())
    results = summarise(cfg, export, manifest, scores) | unscored
    results["run"] = {"seconds": round(time.monotonic() - began, 1), "num_workers": cfg.num_workers}
    gains = np.array([score.si_snri for score in scores])
    before = [value for score in scores for value in score.si_snr_mixture_by_source]
    after = [value for score in scores for value in score.si_snr_by_source]
    files = {"histogram.png": to_png(improvements(gains, before, after))}
    print_table(console, results, scores)
    scoring.write_results(console, cfg, files, results)
    return results


def scorer(cfg: EvaluateConfig) -> Callable[[int], Callable[[], Score]]:
    """A function that separates a mixture and gives a function that scores it."""
    rate, separate = read_manifest(cfg.data).sample_rate, scoring.mixture_separator(cfg)
    return lambda number: partial(score_utterance, *separate(number), rate)


def score_utterance(estimates_ST: Tensor, batch: Batch, rate: int) -> Score:
    """Score estimates against a batch of one mixture.

    SI-SNR is of the permutation with the best mean; SDR (BSS Eval, 512 taps) finds its own.
    Improvements are over the mixture taken as the estimate of each source. EvaluationError where
    there is no score (see `scoring.check_audible`).
    """
    name = batch.ids[0]
    assert len(batch.ids) == 1 and batch.sources is not None, f"{name}: one mixture with sources"
    sources_ST, mixture_T = batch.sources[0].double(), batch.mixture[0].double()
    scoring.check_audible(name, estimates_ST, sources_ST)
    if mixture_T.numel() < TAPS:
        raise EvaluationError(f"{name}: {mixture_T.numel()} samples; SDR needs {TAPS}")
    # At one level, because the epsilon in SI-SNR is absolute and an estimate's level is arbitrary.
    wide_ST, mixture_T = estimates_ST.double(), mixture_T / mixture_T.std()
    waves = torch.cat([wide_ST / wide_ST.std(-1, keepdim=True), mixture_T[None]])
    si_snr, sdr = pairwise_si_snr(waves[None], sources_ST[None])[0], pairwise_sdr(waves, sources_ST)
    _, order = best_permutation(si_snr[None, :-1])
    before, after = si_snr[-1], si_snr[:-1].gather(0, order)[0]
    sdr_before, sdr_after = sdr[-1].mean(), best_permutation(sdr[None, :-1])[0]
    means = [before.mean(), after.mean(), (after - before).mean(), sdr_before, sdr_after]
    values = dict(zip(METRICS, map(float, [*means, sdr_after - sdr_before]), strict=True))
    if not np.isfinite([*values.values()]).all():
        raise EvaluationError(f"{name}: its scores are not finite: {values}")
    return Score(
        id=name,
        length_seconds=mixture_T.numel() / rate,
        speakers="+".join(batch.speakers[0]) if batch.speakers else "",
        **values,
        si_snr_mixture_by_source=tuple(before.tolist()),
        si_snr_by_source=tuple(after.tolist()),
        permutation=" ".join(str(int(i) + 1) for i in order[0]),
    )


def write_listening(folder: str, estimates_ST: Tensor, batch: Batch, rate: int) -> None:
    """Write audio and spectrograms of one mixture; estimates in the order and level of sources."""
    from sepdist.plotting import spectrogram_figure, to_png

    assert batch.sources is not None
    _, order = best_permutation(pairwise_si_snr(estimates_ST[None], batch.sources))
    sources = {f"source {i}": wave.numpy() for i, wave in enumerate(batch.sources[0], start=1)}
    waves = {"mixture": batch.mixture[0].numpy()} | sources
    for i, wave in enumerate(estimates_ST[order[0]].numpy(), start=1):
        level = np.linalg.norm(sources[f"source {i}"]) / np.linalg.norm(wave)
        waves[f"estimate {i}"] = wave * float(level)
    scale = min(1.0, 0.99 / max(float(np.abs(wave).max()) for wave in waves.values()))
    for name, wave in waves.items():
        stream = io.BytesIO()
        soundfile.write(stream, wave * scale, rate, format="WAV", subtype="PCM_16")
        storage.put_bytes(storage.join(folder, f"{name.replace(' ', '_')}.wav"), stream.getvalue())
    picture = to_png(spectrogram_figure(waves, rate))
    storage.put_bytes(storage.join(folder, "spectrogram.png"), picture)


def summarise(
    cfg: EvaluateConfig, export: Export, manifest: Manifest, scores: Sequence[Score]
) -> dict[str, Any]:
    """The content of results.json, without the time that the scoring took."""
    metrics = {}
    for name in METRICS:
        values = np.array([getattr(score, name) for score in scores])
        metrics[name] = {key: float(function(values)) for key, function in STATISTICS.items()}
    return {
        "num_utterances": len(scores),
        "num_worse_than_mixture": sum(score.si_snri < 0 for score in scores),
        "hours": sum(score.length_seconds for score in scores) / 3600,
        "metrics_db": metrics,
        "model": {
            "url": export.url,
            "class": type(export.model).__name__,
            "num_parameters": sum(p.numel() for p in export.model.parameters()),
            "sample_rate": export.sample_rate,
            "lineage": export.lineage,
        },
        "data": {
            "url": cfg.data,
            "corpus": manifest.corpus,
            "split": manifest.split,
            "manifest_sha256": manifest.digest(),
            "num_sources": cfg.num_sources,
            "noise": cfg.noise,
            "max_seconds": cfg.max_seconds,
        },
        "versions": versions("torch", "numpy", "scipy"),
    }


def print_table(console: Console, results: Mapping[str, Any], scores: Sequence[Score]) -> None:
    """Print the metrics and the utterance with the least improvement."""
    data, missing = results["data"], results["num_unscored"]
    of_all = f" of {len(scores) + missing}" if missing else ""
    counts = f"{len(scores)}{of_all} utterances, {results['hours']:.2f} h"
    title = f"{data['corpus']} {data['split']}: {counts}"
    table = Table("dB", *STATISTICS, title=title, title_justify="left")
    for name, label in METRICS.items():
        values = [f"{value:.2f}" for value in results["metrics_db"][name].values()]
        table.add_row(label, *values, style="bold" if name in ("si_snri", "sdri") else None)
    console.print(table)
    worst = min(scores, key=lambda score: score.si_snri)
    console.print(
        f"worse than the mixture: {results['num_worse_than_mixture']}; "
        f"least SI-SNRi: {worst.id} ({worst.si_snri:.2f} dB)"
    )
