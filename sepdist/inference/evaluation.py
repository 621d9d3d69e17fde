"""Score a separator, or files that another system made, on data sets; summarise in results.json.

Shapes: S sources, M outputs of a model that chooses S of them, T samples, N mixtures, K scores.
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sepdist import slots, storage
from sepdist.config import MISSING, ConfigError, EvaluateConfig, listed
from sepdist.data.records import Batch
from sepdist.data.shards import Manifest, read_manifest
from sepdist.inference import foreign, scoring
from sepdist.inference.export import Export, load_separator
from sepdist.inference.listening import Track, write_listening_page
from sepdist.inference.scoring import EvaluationError
from sepdist.metrics.intervals import SCHEME, mean_intervals
from sepdist.metrics.perceptual import PACKAGES, check_usable, perceptual_score
from sepdist.metrics.permutation import best_permutation
from sepdist.metrics.sdr import TAPS, bss_eval, pairwise_sdr
from sepdist.metrics.si_snr import pairwise_si_snr
from sepdist.reporting import versions

KINDS = {name: name.upper() for name in ("sdr", "sir", "sar", *PACKAGES)}
METRICS = {
    kind + ending: text.format(label)
    for kind, label in ({"si_snr": "SI-SNR"} | KINDS).items()
    for ending, text in {"_mixture": "{} of the mixture", "": "{}", "i": "{}i"}.items()
}
STATISTICS: dict[str, Callable[[np.ndarray], Any]] = {
    "mean": np.mean,
    "std": lambda values: values.std(ddof=min(1, len(values) - 1)),
    "median": np.median,
    "min": np.min,
    "max": np.max,
}


def kind_of(metric: str) -> str:
    """The kind that a key of METRICS belongs to; those of one kind are computed together."""
    kind = metric.removesuffix("_mixture")
    return kind if kind in PACKAGES else kind.removesuffix("i")


def evaluate(cfg: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Score the data sets, write the output folder, print tables; returns results.json's content.

    ConfigError if model and data do not fit; EvaluationError, when the rest is written, if more
    than `max_unscored` utterances lack a finite score.
    """
    if cfg.estimates and cfg.model not in (MISSING, cfg.estimates):
        raise ConfigError(f"model={cfg.model} and estimates={cfg.estimates}: give one of them")
    sets = [replace(cfg, data=url) for url in listed(cfg.data)]
    for one in sets:
        slots.make_paths_absolute(one)
    export = None if cfg.estimates else load_separator(sets[0].model)
    for one in sets:  # what does not fit is refused before anything is scored
        check_scores(one, scoring.check_data(one, export)[0])
    if listed(cfg.data) == [cfg.data]:
        return evaluate_one(sets[0], export, console)
    names = {"-".join(one.data.rstrip("/").split("/")[-2:]): one for one in sets}
    if len(names) < len(sets):
        raise ConfigError(f"data={cfg.data}: of two data sets the last two folders are the same")
    storage.remove(storage.join(sets[0].output, "results.json"))
    found: dict[str, Any] = {}
    for name, one in names.items():
        own = replace(one, output=storage.join(one.output, name), max_unscored=-1)
        found[name] = evaluate_one(own, export, console)
    scores = {name: one["metrics_db"] | one["metrics"] for name, one in found.items()}
    columns = {
        name: {key: mean_of(key, one) for key, one in own.items()} for name, own in scores.items()
    }
    print_scores(console, "means and their 95 % intervals", columns)
    lists = ("unscored", "incomplete")
    results = {key: [one for each in found.values() for one in each[key]] for key in lists}
    scoring.write_results(console, sets[0], {}, results | {"data_sets": found})
    return results | {"data_sets": found}


def check_scores(cfg: EvaluateConfig, manifest: Manifest) -> None:
    """Raise ValueError if the data set has no sources or one of the metrics is impossible."""
    known = ["si_snri", "sdri", "si_snr", *KINDS]
    if unknown := [one for one in cfg.metrics if one not in known]:
        raise ConfigError(f"metrics: no {unknown[0]!r}; there are {', '.join(known)}")
    if "s1" not in manifest.members:
        raise ConfigError(f"{cfg.data} has mixtures only; without sources there are no scores")
    check_usable([one for one in PACKAGES if one in cfg.metrics], manifest.sample_rate)


def evaluate_one(cfg: EvaluateConfig, export: Export | None, console: Console) -> dict[str, Any]:
    """`evaluate` on one data set; without an `export` the files of `cfg.estimates` are scored."""
    from sepdist.plotting import improvements, to_png  # late: Ray tasks draw nothing

    began = time.monotonic()
    manifest, ids = scoring.check_data(cfg, export)
    model: dict[str, Any] = {"url": cfg.estimates}
    if export:
        model = {
            "url": export.url,
            "class": type(export.model).__name__,
            "num_parameters": sum(p.numel() for p in export.model.parameters()),
            "sample_rate": export.sample_rate,
            "lineage": export.lineage,
        }
    elif unused := foreign.find_estimates(model["url"]).keys() - {one["id"] for one in ids}:
        model["unused"] = sorted(unused)
        console.print(f"{cfg.estimates}: {len(unused)} names are no mixture's, as {min(unused)}")
    found, unscored = scoring.run_on_data_set(scorer, cfg, range(len(ids)), ids, console)
    sections = []
    with scoring.single_threaded():
        outputs = outputs_of(cfg)
        for number in list(found)[: cfg.num_listening]:
            folder = storage.join(cfg.output, "listening", str(number))
            waves = outputs(number)[:2]
            tracks = write_listening(folder, *waves, manifest.sample_rate, found[number])
            sections.append((found[number]["id"], tracks))
    rows = list(found.values())
    results = summarise(cfg, model, manifest, rows) | unscored
    results["run"] = {"seconds": round(time.monotonic() - began, 1), "num_workers": cfg.num_workers}
    if sections:
        title = f"{len(sections)} of {len(rows)} mixtures of {manifest.corpus} {manifest.split}, "
        title += f"mean SI-SNRi {results['metrics_db']['si_snri']['mean']:.2f} dB"
        write_listening_page(storage.join(cfg.output, "listening", "index.html"), title, sections)
    gains = np.array([row["si_snri"] for row in rows])
    before = [value for row in rows for value in row["si_snr_mixture_by_source"]]
    after = [value for row in rows for value in row["si_snr_by_source"]]
    files = {"histogram.png": to_png(improvements(gains, before, after))}
    print_table(console, results, rows)
    scoring.write_results(console, cfg, files, results)
    return results


def outputs_of(cfg: EvaluateConfig) -> Callable[[int], tuple[Tensor, Batch, Tensor]]:
    """A function that gives a mixture's estimates, batch of one and outputs to choose from."""
    return (foreign.estimates_reader if cfg.estimates else scoring.mixture_separator)(cfg)


def scorer(cfg: EvaluateConfig) -> Callable[[int], Callable[[], dict[str, Any]]]:
    """A function that separates a mixture and gives a function that scores it."""
    rate, outputs = read_manifest(cfg.data).sample_rate, outputs_of(cfg)

    def begin(number: int) -> Callable[[], dict[str, Any]]:
        estimates_ST, batch, outputs_MT = outputs(number)
        return partial(score_utterance, estimates_ST, batch, rate, cfg.metrics, outputs_MT)

    return begin


def score_utterance(
    estimates_ST: Tensor,
    batch: Batch,
    rate: int,
    metrics: Sequence[str] = ("si_snri", "sdri"),
    outputs_MT: Tensor | None = None,
) -> dict[str, Any]:
    """Score estimates against a batch of one mixture; returns a line of utterances.csv.

    Values are means over sources unless named `by_source`, of the permutation with the best mean
    SI-SNR; SDR, SIR and SAR (BSS Eval, 512 taps) have that with the best SDR. Improvements are over
    the mixture taken as the estimate of each source. `..._oracle` are those of the S of the
    `outputs_MT` that fit the sources best. A score of `metrics` that cannot be had is NaN, with the
    reason in `incomplete`. EvaluationError where there is no SI-SNR (`scoring.check_audible`).
    """
    from scipy.optimize import linear_sum_assignment  # late: SciPy takes a second to import

    name, kinds = batch.ids[0], {"si_snr", *map(kind_of, metrics)}
    assert len(batch.ids) == 1 and batch.sources is not None, f"{name}: one mixture with sources"
    sources_ST, mixture_T = batch.sources[0].double(), batch.mixture[0].double()
    scoring.check_audible(name, estimates_ST, sources_ST)
    if mixture_T.numel() < TAPS and kinds & {"sdr", "sir", "sar"}:
        raise EvaluationError(f"{name}: {mixture_T.numel()} samples; SDR needs {TAPS}")
    values, by_source, order, reasons = measure(estimates_ST, sources_ST, mixture_T, rate, kinds)
    if outputs_MT is not None and len(outputs_MT) > len(sources_ST):
        waves_MT = outputs_MT.double() / outputs_MT.double().std(-1, keepdim=True).clamp_min(1e-30)
        fits_MS = pairwise_si_snr(waves_MT[None], sources_ST[None])[0].nan_to_num(-1e3).numpy()
        best_ST = outputs_MT[linear_sum_assignment(fits_MS, maximize=True)[0]]
        scoring.check_audible(f"{name}, oracle", best_ST, sources_ST)
        best, *_, why = measure(best_ST, sources_ST, mixture_T, rate, kinds)
        values |= {f"{one}_oracle": best[one] for one in best if not one.endswith("_mixture")}
        reasons += [f"oracle {one}" for one in why]
    if not np.isfinite([values[one] for one in ("si_snri", "sdri", "sir") if one in values]).all():
        raise EvaluationError(f"{name}: its scores are not finite: {values}")
    return {
        "id": name,
        "length_seconds": mixture_T.numel() / rate,
        "speakers": "+".join(batch.speakers[0]) if batch.speakers else "",
        **values,
        "si_snr_mixture_by_source": tuple(by_source[0].tolist()),
        "si_snr_by_source": tuple(by_source[1].tolist()),
        # For sources 1, 2, ... the number (from 1) of the estimate assigned to it.
        "permutation": " ".join(str(int(i) + 1) for i in order),
    } | ({"incomplete": "; ".join(dict.fromkeys(reasons))} if kinds - {"si_snr", "sdr"} else {})


def measure(
    estimates_ST: Tensor, sources_ST: Tensor, mixture_T: Tensor, rate: int, kinds: set[str]
) -> tuple[dict[str, float], tuple[Tensor, Tensor], Tensor, list[str]]:
    """Values by metric, SI-SNR before and after by source, order [S], and reasons of NaN values."""
    # At one level, because the epsilon in SI-SNR is absolute and an estimate's level is arbitrary.
    wide_ST, mixture_T = estimates_ST.double(), mixture_T / mixture_T.std()
    waves = torch.cat([wide_ST / wide_ST.std(-1, keepdim=True), mixture_T[None]])
    si_snr = pairwise_si_snr(waves[None], sources_ST[None])[0]
    [order] = best_permutation(si_snr[None, :-1])[1]
    before, after = si_snr[-1], si_snr[:-1].gather(0, order[None])[0]
    found = {"si_snr_mixture": before.mean(), "si_snr": after.mean()}
    found["si_snri"], reasons = (after - before).mean(), list[str]()
    if joint := kinds & {"sdr", "sir", "sar"}:
        sdr, *rest = (
            [pairwise_sdr(waves, sources_ST)] if joint == {"sdr"} else bss_eval(waves, sources_ST)
        )
        best, order_1S = best_permutation(sdr[None, :-1])
        found |= {"sdr_mixture": sdr[-1].mean(), "sdr": best, "sdri": best - sdr[-1].mean()}
        if rest:
            found |= {"sir": rest[0].gather(0, order_1S).mean(), "sar": rest[1][:-1].mean()}
    values = {one: float(value) for one, value in found.items() if kind_of(one) in kinds}
    heard = {"_mixture": mixture_T.expand_as(sources_ST).numpy(), "": waves[order].numpy()}
    for one in (kind + ending for kind in PACKAGES if kind in kinds for ending in heard):
        pairs = zip(heard[one.removeprefix(kind_of(one))], sources_ST.numpy(), strict=True)
        try:
            scores = [perceptual_score(kind_of(one), *pair, rate) for pair in pairs]
            values[one] = float(np.mean(scores))
        except ValueError as error:
            values[one] = np.nan
            reasons.append(f"{METRICS[kind_of(one)]}: {error}")
    return values, (before, after), order, reasons


def write_listening(
    folder: str, estimates_ST: Tensor, batch: Batch, rate: int, row: Mapping[str, Any]
) -> list[Track]:
    """Write audio of one mixture; estimates in the order and level of sources.

    Returns the tracks of a listening page, with the scores of `row`.
    """
    assert batch.sources is not None
    _, order = best_permutation(pairwise_si_snr(estimates_ST[None], batch.sources))
    sources = {f"source {i}": wave.numpy() for i, wave in enumerate(batch.sources[0], start=1)}
    waves = {"mixture": batch.mixture[0].numpy()} | sources
    for i, wave in enumerate(estimates_ST[order[0]].numpy(), start=1):
        level = np.linalg.norm(sources[f"source {i}"]) / np.linalg.norm(wave)
        waves[f"estimate {i}"] = wave * float(level)
    scale = min(1.0, 0.99 / max(float(np.abs(wave).max()) for wave in waves.values()))
    shown = [row["si_snri"], *[None] * len(sources), *row["si_snr_by_source"]]
    tracks = []
    for (name, wave), value in zip(waves.items(), shown, strict=True):
        stream, file = io.BytesIO(), storage.join(folder, f"{name.replace(' ', '_')}.wav")
        soundfile.write(stream, wave * scale, rate, format="WAV", subtype="PCM_16")
        storage.put_bytes(file, stream.getvalue())
        kind = "SI-SNRi" if name == "mixture" else "SI-SNR"
        tracks.append((name, file, "" if value is None else f"{kind} {value:.1f} dB"))
    return sorted(tracks, key=lambda track: track[0].partition(" ")[2])  # source 1, estimate 1


def summarise(
    cfg: EvaluateConfig, model: Mapping[str, Any], manifest: Manifest, rows: Sequence[Mapping]
) -> dict[str, Any]:
    """The content of results.json, without the time that the scoring took."""
    names, speakers = [one for one in METRICS if one in rows[0]], [row["speakers"] for row in rows]
    values_NK = np.array([[row[one] for one in names] for row in rows])
    intervals = mean_intervals(values_NK, speakers)
    metrics: dict[str, dict[str, dict[str, Any]]] = {"metrics_db": {}, "metrics": {}}
    for name, values, interval in zip(names, values_NK.T, intervals, strict=True):
        known = values[~np.isnan(values)]
        found: dict[str, Any] = {"mean": None, "interval": interval}
        found |= {key: float(of(known)) if known.size else None for key, of in STATISTICS.items()}
        if f"{name}_oracle" in rows[0]:
            found["oracle"] = float(np.nanmean([row[f"{name}_oracle"] for row in rows]))
        metrics["metrics" if kind_of(name) in PACKAGES else "metrics_db"][name] = found
    lacking = [row for row in rows if row.get("incomplete")]
    return {
        "num_utterances": len(rows),
        "num_worse_than_mixture": sum(row["si_snri"] < 0 for row in rows),
        "hours": sum(row["length_seconds"] for row in rows) / 3600,
        **metrics,
        "intervals": {"of": SCHEME, "num_speakers": len({*"+".join(speakers).split("+")} - {""})},
        "incomplete": [{"id": x["id"], "reason": f"{x['id']}: {x['incomplete']}"} for x in lacking],
        "model": model,
        "data": {
            "url": cfg.data,
            "corpus": manifest.corpus,
            "split": manifest.split,
            "manifest_sha256": manifest.digest(),
            "num_sources": cfg.num_sources,
            "noise": cfg.noise,
            "max_seconds": cfg.max_seconds,
        },
        "versions": versions("torch", "numpy", "scipy", *sorted({*PACKAGES.values()})),
    }


def text_of(metric: str, *values: float | None) -> str:
    """Scores as text: two decimals in dB, three of STOI and PESQ."""
    digits = 3 if kind_of(metric) in PACKAGES else 2
    return " to ".join("none" if one is None else f"{one:.{digits}f}" for one in values)


def mean_of(metric: str, score: Mapping[str, Any]) -> str:
    """A mean with its interval, if it has one, as text."""
    interval = f" ({text_of(metric, *score['interval'])})" if score["interval"] else ""
    return text_of(metric, score["mean"]) + interval


def print_scores(console: Console, title: str, columns: Mapping[str, Mapping[str, str]]) -> None:
    """Print a table with a row for each metric, of the texts in `columns` by metric."""
    table = Table("", *columns, title=title, title_justify="left")
    for metric in (one for one in METRICS if any(one in texts for texts in columns.values())):
        style = "bold" if metric in ("si_snri", "sdri") else None
        cells = (texts.get(metric, "") for texts in columns.values())
        table.add_row(METRICS[metric], *cells, style=style)
    console.print(table)


def print_table(console: Console, results: Mapping[str, Any], rows: Sequence[Mapping]) -> None:
    """Print the metrics and the utterance with the least improvement."""
    data, missing, columns = results["data"], results["num_unscored"], dict[str, Any]()
    for metric, found in (results["metrics_db"] | results["metrics"]).items():
        for name, value in found.items():
            columns.setdefault(name, {})[metric] = text_of(metric, *np.atleast_1d(value))
    del columns["std"]  # for the width of a terminal
    of_all = f" of {len(rows) + missing}" if missing else ""
    counts = f"{len(rows)}{of_all} utterances, {results['hours']:.2f} h"
    print_scores(console, f"{data['corpus']} {data['split']}: {counts}", columns)
    worst = min(rows, key=lambda row: row["si_snri"])
    console.print(
        f"worse than the mixture: {results['num_worse_than_mixture']}; "
        f"least SI-SNRi: {worst['id']} ({worst['si_snri']:.2f} dB)"
    )
