"""Score a separator on a data set: SI-SNR and SDR of every utterance, summarised in results.json."""

import csv
import dataclasses
import io
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import fast_bss_eval
import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sepdist
from sepdist import storage
from sepdist.cluster import run_tasks
from sepdist.config import EvaluateConfig
from sepdist.console import progress_bar
from sepdist.data.dataset import Dataset
from sepdist.data.records import Batch
from sepdist.inference.export import Export, load_export, load_separator
from sepdist.inference.scoring import (
    EvaluationError,
    absolute_paths,
    check_fit,
    estimate,
    open_dataset,
    read_full,
    single_threaded,
)
from sepdist.metrics.permutation import best_permutation
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr
from sepdist.plotting import spectrogram_figure, to_png

METRICS = ("si_snr_mixture", "si_snr", "si_snri", "sdr_mixture", "sdr", "sdri")
SDR_LIMIT_DB = 100.0  # a perfect estimate has an infinite SDR


@dataclasses.dataclass(frozen=True)
class Score:
    """One utterance; dB, means over its sources."""

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
    permutation: (
        str  # for source 1, 2, ... the number (from 1) of the estimate with the best mean SI-SNR
    )


def evaluate(cfg: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Score the data set, write the output folder, print the table; returns what results.json holds.

    Raises:
        ConfigError: model and data do not fit each other.
        EvaluationError: an utterance has no finite score.
    """
    cfg = absolute_paths(cfg)
    began = time.monotonic()
    export = load_separator(cfg.model)
    dataset = open_dataset(cfg)
    check_fit(cfg, export, dataset)
    total = dataset.manifest.num_samples
    count = min(cfg.num_mixtures or total, total)
    storage.remove(
        storage.join(cfg.output, "results.json")
    )  # an earlier one must not stand beside half of a new one
    with single_threaded(), progress_bar(console, "scoring", count) as advance:
        for index in range(min(cfg.num_listening, count)):
            write_listening(cfg, export.model, dataset, index)
        if cfg.num_workers == 0:
            rows = dict(score_part(export.model, dataset, range(count), cfg, advance))
        else:
            rows = score_on_ray(cfg, count, advance)
    scores = [rows[index] for index in range(count)]
    results = summarise(cfg, export, dataset, scores)
    results["run"] = {"seconds": round(time.monotonic() - began, 1), "num_workers": cfg.num_workers}
    storage.put_bytes(storage.join(cfg.output, "utterances.csv"), to_csv(scores).encode())
    storage.put_bytes(storage.join(cfg.output, "histogram.png"), to_png(histogram(scores)))
    storage.put_bytes(
        storage.join(cfg.output, "results.json"), json.dumps(results, indent=1).encode()
    )
    print_table(console, cfg, results, scores)
    return results


def score_part(
    model: nn.Module,
    dataset: Dataset,
    indices: range,
    cfg: EvaluateConfig,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Score]]:
    """Index and score of each utterance of `indices`."""
    device = torch.device("cuda" if cfg.use_gpu else "cpu")
    model = model.to(device).eval()
    for index in indices:
        batch = read_full(cfg, dataset, index)
        yield (
            index,
            score_utterance(estimate(model, batch, device), batch, dataset.manifest.sample_rate),
        )
        advance()


def score_utterance(estimates: Tensor, batch: Batch, rate: int) -> Score:
    """Score estimates [S, T] against a batch of one.

    SI-SNR is of the permutation with the best mean; SDR (BSS Eval, 512 taps) finds its own. Improvements are over the
    mixture taken as the estimate of each source.

    Raises:
        EvaluationError: the estimates are of another shape, silent or not finite, or a source is silent.
    """
    name = batch.ids[0]
    assert len(batch.ids) == 1 and batch.sources is not None, (
        f"{name}: scoring takes one utterance with its sources"
    )
    sources, mixture = batch.sources[0].double(), batch.mixture[0].double()
    if estimates.shape != sources.shape:
        raise EvaluationError(
            f"{name}: the model gives estimates of shape {list(estimates.shape)}, the sources are of shape "
            f"{list(sources.shape)}; num_sources must be the number of its outputs"
        )
    for label, waves in (("source", sources), ("estimate", estimates)):
        for number, wave in enumerate(waves, start=1):
            if not torch.isfinite(wave).all():
                raise EvaluationError(f"{name}: {label} {number} holds NaN or infinity; no score")
            if wave.std() == 0:
                raise EvaluationError(
                    f"{name}: {label} {number} is silent; SI-SNR and SDR are undefined"
                )
    # At one level, because the epsilon in SI-SNR is absolute and the level of an estimate is arbitrary.
    wide = estimates.double() / estimates.double().std(-1, keepdim=True)
    _, order = best_permutation(pairwise_si_snr(wide[None], sources[None]))
    best = wide[order[0]]
    as_estimates = (mixture / mixture.std()).expand_as(sources)
    before, after = si_snr(as_estimates, sources), si_snr(best, sources)
    sdr_before, sdr_after = _sdr(as_estimates, sources), _sdr(wide, sources)
    score = Score(
        id=name,
        length_seconds=mixture.numel() / rate,
        speakers="+".join(batch.speakers[0]) if batch.speakers else "",
        si_snr_mixture=float(before.mean()),
        si_snr=float(after.mean()),
        si_snri=float((after - before).mean()),
        sdr_mixture=sdr_before,
        sdr=sdr_after,
        sdri=sdr_after - sdr_before,
        si_snr_mixture_by_source=tuple(before.tolist()),
        si_snr_by_source=tuple(after.tolist()),
        permutation=" ".join(str(int(i) + 1) for i in order[0]),
    )
    for metric in METRICS:
        if not np.isfinite(getattr(score, metric)):
            raise EvaluationError(f"{name}: its {metric} is {getattr(score, metric)}")
    return score


def _sdr(estimates: Tensor, sources: Tensor) -> float:
    """Mean SDR over the sources in dB, of the best permutation, within +-100 dB."""
    ratios = fast_bss_eval.sdr(sources.numpy(), estimates.numpy(), clamp_db=SDR_LIMIT_DB)
    return float(np.mean(ratios))


def score_on_ray(cfg: EvaluateConfig, count: int, advance: Callable[[], None]) -> dict[int, Score]:
    """Scores by index from `num_workers` Ray tasks; task k takes utterances k, k + num_workers, ..."""
    num_tasks = min(cfg.num_workers, count)
    rows: dict[int, Score] = {}
    calls = [(cfg, part, count, num_tasks) for part in range(num_tasks)]
    for index, score in run_tasks(score_remotely, calls, num_gpus=float(cfg.use_gpu)):
        rows[index] = score
        advance()
    return rows


def score_remotely(
    cfg: EvaluateConfig, part: int, count: int, num_parts: int
) -> Iterator[tuple[int, Score]]:
    """What a Ray task runs: it reads model and data itself, so that only scores cross the network."""
    with single_threaded():
        yield from score_part(
            load_export(cfg.model).model, open_dataset(cfg), range(part, count, num_parts), cfg
        )


def write_listening(cfg: EvaluateConfig, model: nn.Module, dataset: Dataset, index: int) -> None:
    """Sound and picture of one utterance; estimates in the order of the sources and at their levels."""
    batch = read_full(cfg, dataset, index)
    rate = dataset.manifest.sample_rate
    estimates = estimate(model.eval(), batch, torch.device("cpu"))
    score_utterance(estimates, batch, rate)  # only for its checks: what has no score is not put out
    assert batch.sources is not None
    _, order = best_permutation(pairwise_si_snr(estimates[None], batch.sources))
    waves = {"mixture": batch.mixture[0].numpy()}
    waves |= {f"source {i}": wave.numpy() for i, wave in enumerate(batch.sources[0], start=1)}
    for i, wave in enumerate(estimates[order[0]], start=1):
        source = waves[f"source {i}"]
        waves[f"estimate {i}"] = wave.numpy() * float(np.linalg.norm(source) / np.linalg.norm(wave))
    folder = storage.join(cfg.output, "listening", str(index))
    loudest = max(float(np.abs(wave).max()) for wave in waves.values())
    for name, wave in waves.items():
        stream = io.BytesIO()
        soundfile.write(
            stream, wave * min(1.0, 0.99 / loudest), rate, format="WAV", subtype="PCM_16"
        )
        storage.put_bytes(storage.join(folder, f"{name.replace(' ', '_')}.wav"), stream.getvalue())
    storage.put_bytes(
        storage.join(folder, "spectrogram.png"), to_png(spectrogram_figure(waves, rate))
    )


def summarise(
    cfg: EvaluateConfig, export: Export, dataset: Dataset, scores: Sequence[Score]
) -> dict[str, Any]:
    """What results.json holds, but for the time it took."""
    manifest = dataset.manifest
    metrics = {}
    for name in METRICS:
        values = np.array([getattr(score, name) for score in scores])
        metrics[name] = {
            "mean": float(values.mean()),
            "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            "median": float(np.median(values)),
            "min": float(values.min()),
            "max": float(values.max()),
        }
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
        "versions": {name: version(name) for name in ("torch", "numpy", "fast-bss-eval")}
        | {"sepdist": sepdist.__version__, "python": platform.python_version()},
    }


def to_csv(scores: Sequence[Score]) -> str:
    """A header and one line per utterance, in the order of the manifest; dB with four digits."""
    stream = io.StringIO()
    names = [field.name for field in dataclasses.fields(Score)]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for score in scores:
        writer.writerow({name: _cell(value) for name, value in dataclasses.asdict(score).items()})
    return stream.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_cell(one) for one in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def histogram(scores: Sequence[Score]) -> Figure:
    """Left: how SI-SNRi is distributed. Right: SI-SNR of the output over that of the input, one dot per source."""
    gained = np.array([score.si_snri for score in scores])
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(
        gained,
        bins=min(50, max(5, len(gained) // 8)),
        color="tab:blue",
        edgecolor="white",
        linewidth=0.5,
    )
    left.axvline(gained.mean(), color="tab:red", label=f"mean {gained.mean():.2f} dB")
    left.axvline(
        float(np.median(gained)),
        color="tab:red",
        linestyle="--",
        label=f"median {np.median(gained):.2f} dB",
    )
    left.set(xlabel="SI-SNRi in dB", ylabel="utterances", title=f"{len(gained)} utterances")
    left.legend()
    before = [value for score in scores for value in score.si_snr_mixture_by_source]
    after = [value for score in scores for value in score.si_snr_by_source]
    right.scatter(before, after, s=12, alpha=0.6, linewidths=0)
    ends = [min(before + after), max(before + after)]
    right.plot(ends, ends, color="grey", linestyle=":", label="no improvement")
    right.set(
        xlabel="SI-SNR of the mixture in dB",
        ylabel="SI-SNR of the estimate in dB",
        title="output over input, by source",
    )
    right.legend()
    return figure


def print_table(
    console: Console, cfg: EvaluateConfig, results: Mapping[str, Any], scores: Sequence[Score]
) -> None:
    """The metrics, and where the model does worst."""
    data = results["data"]
    title = f"{data['corpus']} {data['split']}: {results['num_utterances']} utterances, {results['hours']:.2f} h"
    table = Table("dB", *("mean", "std", "median", "min", "max"), title=title, title_justify="left")
    labels = ("SI-SNR of the mixture", "SI-SNR", "SI-SNRi", "SDR of the mixture", "SDR", "SDRi")
    for name, label in zip(METRICS, labels, strict=True):
        bold = "bold" if name in ("si_snri", "sdri") else None
        table.add_row(
            label, *(f"{value:.2f}" for value in results["metrics_db"][name].values()), style=bold
        )
    console.print(table)
    worst = min(scores, key=lambda score: score.si_snri)
    console.print(
        f"worse than the mixture: {results['num_worse_than_mixture']}; least SI-SNRi: "
        f"{worst.id} ({worst.si_snri:.2f} dB)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"results: {storage.join(cfg.output, 'results.json')}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
