"""Measure word error rates of mixtures and of a separator's estimates.

Shapes: S sources, T samples.
"""

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sepdist import audio, slots
from sepdist.config import ConfigError, RecogniseConfig
from sepdist.data.dataset import Item, collate
from sepdist.data.records import Mixture
from sepdist.inference import scoring
from sepdist.inference.export import Export, load_export, load_separator
from sepdist.inference.scoring import EvaluationError
from sepdist.metrics.wer import error_rate, word_errors
from sepdist.reporting import versions

PACKAGES = ("torch", "numpy", "jiwer", "transformers", "faster-whisper", "ctranslate2")


def recognise(cfg: RecogniseConfig, console: Console) -> dict[str, Any]:
    """Recognise every condition, write the output, print the table; returns results.json's content.

    ConfigError if model, corpus and recogniser do not fit each other, one cannot be loaded, or no
    utterance has a transcript; EvaluationError, when the rest is written, if more than
    `max_unscored` utterances cannot be recognised.
    """
    began = time.monotonic()
    slots.make_paths_absolute(cfg)
    corpus = slots.build("corpus", cfg.corpus)
    export = load_separator(cfg.model) if cfg.model else None
    items = plan(cfg, corpus)
    check_fit(cfg, corpus, export)  # a CSV file's rate is known after it has been read
    names = [{"condition": condition, "id": record.id} for condition, record in items]
    found, unscored = scoring.run_on_data_set(reader, cfg, items, names, console)
    results = summarise(cfg, export, list(found.values())) | unscored
    results["run"] = {"seconds": round(time.monotonic() - began, 1), "num_workers": cfg.num_workers}
    print_table(console, cfg, results)
    scoring.write_results(console, cfg, {}, results)
    return results


def check_fit(cfg: RecogniseConfig, corpus: Any, export: Export | None) -> None:
    """Refuse, before anything is recognised, settings that cannot work together."""
    scoring.check_workers(cfg)
    if not cfg.conditions or len(set(cfg.conditions)) < len(cfg.conditions):
        raise ConfigError(
            f"conditions={list(cfg.conditions)}: name at least one split of the corpus, each once"
        )
    if export is not None and export.sample_rate != corpus.sample_rate:
        raise ConfigError(
            f"{cfg.model} works at {export.sample_rate} Hz, the corpus at {corpus.sample_rate} Hz: "
            f"pass corpus.sample_rate={export.sample_rate}"
        )


def plan(cfg: RecogniseConfig, corpus: Any) -> list[tuple[str, Mixture]]:
    """Every utterance with its condition; ConfigError if a transcript or utterances are missing."""
    found: list[tuple[str, Mixture]] = []
    for condition in cfg.conditions:
        records = list(itertools.islice(corpus.records(condition), cfg.limit or None))
        if not records:
            raise ConfigError(f"corpus {corpus.name} has no utterances in condition {condition!r}")
        if not any(isinstance(one, Mixture) and one.texts and one.texts[0] for one in records):
            raise ConfigError(
                f"corpus {corpus.name}, {records[0].id}: needs a mixture with a transcript"
            )
        found += [(condition, record) for record in records]
    return found


def reader(cfg: RecogniseConfig) -> Callable[[tuple[str, Mixture]], dict[str, Any]]:
    """A function that recognises an utterance, given as (condition, record)."""
    device = scoring.device_of(cfg)
    recogniser = slots.build("recogniser", cfg.recogniser, device=str(device))
    model = load_export(cfg.model).model.to(device) if cfg.model else None
    return lambda item: recognise_one(*item, recogniser, model, device)


def recognise_one(
    condition: str, record: Mixture, recogniser: Any, model: nn.Module | None, device: torch.device
) -> dict[str, Any]:
    """Recognise one mixture and its estimates by `model`, each at the mixture's level.

    Returns a line of utterances.csv, with word errors and text of the mixture and of each output.
    """
    waves, reference = record.load(), record.texts[0] if record.texts else ""
    batch = collate([Item(record.id, record.speakers, waves)], range(1))
    mixture_T = batch.mixture[0].numpy()
    named = {"mixture": mixture_T}
    if model is not None:
        estimates_ST = scoring.separate_batch(model, batch, device).numpy()
        if not np.isfinite(estimates_ST).all():
            raise EvaluationError(f"{record.id}: the model's estimates hold NaN or infinity")
        for number, wave_T in enumerate(estimates_ST, start=1):
            named[f"output_{number}"] = audio.at_level_of(mixture_T, wave_T)
    row: dict[str, Any] = {"condition": condition, "id": record.id}
    row |= {"length_seconds": mixture_T.size / record.sample_rate, "num_words": 0}
    row |= {"reference": reference}
    for name, wave_T in named.items():
        text = recogniser(wave_T, record.sample_rate)
        row[f"{name}_errors"], row["num_words"] = word_errors(reference, text)
        row[name] = text
    return row


def summarise(
    cfg: RecogniseConfig, export: Export | None, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of results.json, without the time that the recognition took."""
    wer: dict[str, dict[str, float | None]] = {}
    counts: dict[str, dict[str, int]] = {}
    for condition in cfg.conditions:
        own = [row for row in rows if row["condition"] == condition]
        num_words = [row["num_words"] for row in own]
        errors = {"mixture": [row["mixture_errors"] for row in own]}
        if export is not None:  # LibriCSS counts the output with the fewest errors
            kind = re.compile(r"output_\d+_errors")
            errors["separated"] = [min(row[key] for key in row if kind.match(key)) for row in own]
        wer[condition] = {
            name: error_rate(values, num_words) if own else None for name, values in errors.items()
        }
        counts[condition] = {"utterances": len(own), "words": sum(num_words)}
        counts[condition] |= {f"{name}_errors": sum(values) for name, values in errors.items()}
    return {
        "wer": wer,
        "counts": counts,
        "corpus": cfg.corpus,
        "limit": cfg.limit,
        "recogniser": cfg.recogniser,
        "model": None if export is None else {"url": export.url, "lineage": export.lineage},
        "versions": versions(*PACKAGES),
    }


def print_table(console: Console, cfg: RecogniseConfig, results: Mapping[str, Any]) -> None:
    """Print the rates by condition, in the layout of paper 2's table 4."""
    wer, counts = results["wer"], results["counts"]
    title = f"WER in %, by {results['recogniser']['_target_'].rpartition('.')[2]}"
    table = Table("", *cfg.conditions, title=title, title_justify="left")
    for name in wer[cfg.conditions[0]]:
        rates = [wer[condition][name] for condition in cfg.conditions]
        table.add_row(name, *("none" if rate is None else f"{rate:.1f}" for rate in rates))
    words = [str(counts[condition]["words"]) for condition in cfg.conditions]
    table.add_row("words", *words, style="dim")
    if missing := Counter(one["condition"] for one in results["unscored"]):
        table.add_row("not recognised", *(str(missing[one]) for one in cfg.conditions))
    console.print(table)
