"""Measure word error rates of mixtures and of a separator's estimates.

Shapes: S sources, T samples.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
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
from sepdist.reporting import to_csv, versions

PACKAGES = ("torch", "numpy", "jiwer", "transformers", "faster-whisper", "ctranslate2")


@dataclass(frozen=True)
class Recognition:
    """The texts recognised in one utterance: of the mixture first, then of each estimate."""

    condition: str
    id: str
    length_seconds: float
    num_words: int
    reference: str
    texts: tuple[str, ...]
    errors: tuple[int, ...]  # word errors of each text


def recognise(cfg: RecogniseConfig, console: Console) -> dict[str, Any]:
    """Recognise every condition, write the output, print the table; returns results.json's content.

    ConfigError if model, corpus and recogniser do not fit each other, one cannot be loaded, or an
    utterance has no transcript; EvaluationError if one cannot be separated.
    """
    began = time.monotonic()
    slots.make_paths_absolute(cfg)
    corpus = slots.build("corpus", cfg.corpus)
    export = load_separator(cfg.model) if cfg.model else None
    check_fit(cfg, corpus, export)
    rows = scoring.run_on_data_set(recognise_each, cfg, plan(cfg, corpus), console)
    results = summarise(cfg, export, rows)
    results["run"] = {"seconds": round(time.monotonic() - began, 1), "num_workers": cfg.num_workers}
    names = ["mixture", *(f"output_{i}" for i in range(1, len(rows[0].texts)))]
    header = ["condition", "id", "length_seconds", "num_words", "reference"]
    header += itertools.chain(*((f"{name}_errors", name) for name in names))
    cells = [
        (*astuple(row)[:5], *itertools.chain(*zip(row.errors, row.texts, strict=True)))
        for row in rows
    ]
    print_table(console, cfg, results)
    scoring.write_results(console, cfg.output, {"utterances.csv": to_csv(header, cells)}, results)
    return results


def check_fit(cfg: RecogniseConfig, corpus: Any, export: Export | None) -> None:
    """Refuse, before anything is recognised, settings that cannot work together."""
    scoring.check_workers(cfg)
    if not cfg.conditions or len(set(cfg.conditions)) < len(cfg.conditions):
        raise ConfigError(
            f"conditions={list(cfg.conditions)}: name at least one split of the corpus, each once"
        )
    if cfg.limit < 0:
        raise ConfigError(f"limit={cfg.limit}: give 0 (all) or a number of utterances")
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
        for record in records:
            if not isinstance(record, Mixture) or not record.texts or not record.texts[0]:
                raise ConfigError(
                    f"corpus {corpus.name}, {record.id}: needs a mixture with a transcript"
                )
            found.append((condition, record))
    return found


def recognise_each(
    cfg: RecogniseConfig, utterances: Sequence[tuple[str, Mixture]]
) -> Iterator[Recognition]:
    """Recognise each utterance, given as (condition, record)."""
    device = scoring.device_of(cfg)
    recogniser = slots.build("recogniser", cfg.recogniser, device=str(device))
    model = load_export(cfg.model).model.to(device) if cfg.model else None
    for condition, record in utterances:
        yield recognise_one(condition, record, recogniser, model, device)


def recognise_one(
    condition: str, record: Mixture, recogniser: Any, model: nn.Module | None, device: torch.device
) -> Recognition:
    """Recognise one mixture and its estimates by `model`, each at the mixture's level."""
    waves, reference = record.load(), record.texts[0]
    batch = collate([Item(record.id, record.speakers, waves)], range(1))
    mixture_T = batch.mixture[0].numpy()
    estimates: list[np.ndarray] = []
    if model is not None:
        estimates_ST = scoring.separate_batch(model, batch, device).numpy()
        if not np.isfinite(estimates_ST).all():
            raise EvaluationError(f"{record.id}: the model's estimates hold NaN or infinity")
        estimates = [audio.at_level_of(mixture_T, wave_T) for wave_T in estimates_ST]
    texts = tuple(recogniser(wave_T, record.sample_rate) for wave_T in (mixture_T, *estimates))
    errors, num_words = zip(*(word_errors(reference, text) for text in texts), strict=True)
    seconds = mixture_T.size / record.sample_rate
    return Recognition(condition, record.id, seconds, num_words[0], reference, texts, errors)


def summarise(
    cfg: RecogniseConfig, export: Export | None, rows: Sequence[Recognition]
) -> dict[str, Any]:
    """The content of results.json, without the time that the recognition took."""
    wer: dict[str, dict[str, float]] = {}
    counts: dict[str, dict[str, int]] = {}
    for condition in cfg.conditions:
        own = [row for row in rows if row.condition == condition]
        num_words = [row.num_words for row in own]
        errors = {"mixture": [row.errors[0] for row in own]}
        if export is not None:  # LibriCSS counts the output with the fewest errors
            errors["separated"] = [min(row.errors[1:]) for row in own]
        wer[condition] = {name: error_rate(values, num_words) for name, values in errors.items()}
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
        table.add_row(name, *(f"{wer[condition][name]:.1f}" for condition in cfg.conditions))
    words = [str(counts[condition]["words"]) for condition in cfg.conditions]
    table.add_row("words", *words, style="dim")
    console.print(table)
