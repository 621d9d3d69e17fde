"""Word error rates of mixtures and of a separator's estimates."""

import csv
import io
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import sepdist
from sepdist import audio, config, storage
from sepdist.cluster import run_tasks
from sepdist.config import ConfigError, RecogniseConfig
from sepdist.console import progress_bar
from sepdist.data.dataset import Item, collate
from sepdist.data.records import Batch, Mixture
from sepdist.inference.export import Export, load_export
from sepdist.inference.scoring import EvaluationError, estimate, single_threaded
from sepdist.metrics.wer import error_rate, fewest, word_errors

PACKAGES = ("torch", "numpy", "jiwer", "transformers", "faster-whisper", "ctranslate2")


@dataclass(frozen=True)
class Job:
    """One utterance to recognise; light enough to be sent to another machine."""

    number: int
    condition: str
    record: Mixture


@dataclass(frozen=True)
class Heard:
    """What was heard in one utterance, and the word errors in it."""

    condition: str
    id: str
    length_seconds: float
    num_words: int
    reference: str
    mixture_errors: int
    mixture: str
    output_errors: tuple[int, ...] = ()  # none without a separator
    outputs: tuple[str, ...] = ()


def recognise(cfg: RecogniseConfig, console: Console) -> dict[str, Any]:
    """Recognise every condition, write the output folder, print the table; returns what results.json holds.

    Raises:
        ConfigError: the parts do not fit each other, or the recogniser cannot be loaded.
        ValueError: an utterance has no transcript, or cannot be separated.
    """
    began = time.monotonic()
    corpus = config.build(cfg.corpus)
    export = load_export(cfg.model) if cfg.model else None
    check_fit(cfg, corpus, export)
    jobs = plan(cfg, corpus)
    storage.remove(
        storage.join(cfg.output, "results.json")
    )  # an earlier one must not stand beside half of a new one
    heard: dict[int, Heard] = {}
    with progress_bar(console, "scoring", len(jobs)) as advance:
        num_tasks = min(cfg.num_workers, len(jobs))
        calls = [(cfg, jobs[part::num_tasks], os.getcwd()) for part in range(num_tasks)]
        for number, one in (
            run_tasks(recognise_in_task, calls, num_gpus=float(cfg.use_gpu))
            if calls
            else recognise_part(cfg, jobs)
        ):
            heard[number] = one
            advance()
    rows = [heard[job.number] for job in jobs]
    results = summarise(cfg, export, rows)
    results["run"] = {"seconds": round(time.monotonic() - began, 1), "num_workers": cfg.num_workers}
    storage.put_bytes(storage.join(cfg.output, "utterances.csv"), to_csv(rows).encode())
    storage.put_bytes(
        storage.join(cfg.output, "results.json"), json.dumps(results, indent=1).encode()
    )
    print_table(console, cfg, results)
    return results


def check_fit(cfg: RecogniseConfig, corpus: Any, export: Export | None) -> None:
    """Refuse, before anything is recognised, what cannot work together."""
    if not cfg.conditions or len(set(cfg.conditions)) < len(cfg.conditions):
        raise ConfigError(
            f"conditions={list(cfg.conditions)}: name at least one split of the corpus, each once"
        )
    if cfg.num_workers < 0 or cfg.limit < 0:
        raise ConfigError(
            f"num_workers={cfg.num_workers}, limit={cfg.limit}: neither may be negative"
        )
    if export is not None and export.sample_rate != corpus.sample_rate:
        raise ConfigError(
            f"{cfg.model} works at {export.sample_rate} Hz, the corpus gives {corpus.sample_rate} Hz: pass "
            f"corpus.sample_rate={export.sample_rate}"
        )
    if cfg.use_gpu and cfg.num_workers == 0 and not torch.cuda.is_available():
        raise ConfigError("use_gpu=true, but this machine has no GPU that torch can use")


def plan(cfg: RecogniseConfig, corpus: Any) -> list[Job]:
    """Every utterance of every condition; one without a transcript, or a condition without any, is an error."""
    jobs: list[Job] = []
    for condition in cfg.conditions:
        records = list(itertools.islice(corpus.records(condition), cfg.limit or None))
        if not records:
            raise ConfigError(f"corpus {corpus.name} has no utterances in condition {condition!r}")
        for record in records:
            if not isinstance(record, Mixture) or not record.texts or not record.texts[0]:
                raise ConfigError(
                    f"corpus {corpus.name}, {record.id}: needs a mixture with a transcript"
                )
            jobs.append(Job(len(jobs), condition, record))
    return jobs


def recognise_in_task(
    cfg: RecogniseConfig, jobs: Sequence[Job], working_dir: str
) -> Iterator[tuple[int, Heard]]:
    """What a Ray task runs: it loads the models itself, so that only texts cross the network."""
    if os.path.isdir(
        working_dir
    ):  # Ray chooses a working directory of its own, and paths may be relative
        os.chdir(working_dir)
    yield from recognise_part(cfg, jobs)


def recognise_part(cfg: RecogniseConfig, jobs: Sequence[Job]) -> Iterator[tuple[int, Heard]]:
    """Number and result of each of `jobs`, one after the other."""
    device = torch.device("cuda" if cfg.use_gpu else "cpu")
    with single_threaded():
        recogniser = config.build(cfg.recogniser, device=str(device))
        model = load_export(cfg.model).model.to(device) if cfg.model else None
        for job in jobs:
            yield job.number, recognise_one(job, recogniser, model, device)


def recognise_one(
    job: Job, recogniser: Any, model: nn.Module | None, device: torch.device
) -> Heard:
    """Recognise one mixture and what `model` makes of it."""
    record, reference = job.record, job.record.texts[0]
    parts = record.load()
    batch = collate(
        [Item(record.id, record.speakers, parts)], range(1), len(next(iter(parts.values())))
    )
    mixture_T = batch.mixture[0].numpy()
    estimates = [] if model is None else separated(batch, model, device)
    mixture, *outputs = (
        recogniser(wave_T, record.sample_rate) for wave_T in (mixture_T, *estimates)
    )
    errors, num_words = word_errors(reference, mixture)
    return Heard(
        job.condition,
        record.id,
        mixture_T.size / record.sample_rate,
        num_words,
        reference,
        errors,
        mixture,
        tuple(word_errors(reference, output)[0] for output in outputs),
        tuple(outputs),
    )


def separated(batch: Batch, model: nn.Module, device: torch.device) -> list[np.ndarray]:
    """The model's estimates [T] from the whole mixture of a batch of one, each at the mixture's level."""
    estimates_ST = estimate(model, batch, device).numpy()
    if not np.isfinite(estimates_ST).all():
        raise EvaluationError(f"{batch.ids[0]}: the model's estimates hold NaN or infinity")
    return [audio.at_level_of(batch.mixture[0].numpy(), wave_T) for wave_T in estimates_ST]


def summarise(cfg: RecogniseConfig, export: Export | None, rows: Sequence[Heard]) -> dict[str, Any]:
    """What results.json holds, but for the time it took."""
    wer: dict[str, dict[str, float]] = {}
    counts: dict[str, dict[str, int]] = {}
    for condition in cfg.conditions:
        own = [row for row in rows if row.condition == condition]
        num_words = [row.num_words for row in own]
        errors = {"mixture": [row.mixture_errors for row in own]}
        if export is not None:
            errors["separated"] = [row.output_errors[fewest(row.output_errors)] for row in own]
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
        "versions": {name: found for name in PACKAGES if (found := _version(name))}
        | {"sepdist": sepdist.__version__, "python": platform.python_version()},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def to_csv(rows: Sequence[Heard]) -> str:
    """A header and one line per utterance, in the order of conditions and corpus; a column pair per output."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    fixed = [
        "condition",
        "id",
        "length_seconds",
        "num_words",
        "reference",
        "mixture_errors",
        "mixture",
    ]
    pairs = [[f"output_{i}_errors", f"output_{i}"] for i in range(1, len(rows[0].outputs) + 1)]
    writer.writerow([*fixed, *itertools.chain(*pairs)])
    for row in rows:
        values = asdict(row) | {"length_seconds": f"{row.length_seconds:.4f}"}
        heard = zip(row.output_errors, row.outputs, strict=True)
        writer.writerow([*(values[name] for name in fixed), *itertools.chain(*heard)])
    return stream.getvalue()


def print_table(console: Console, cfg: RecogniseConfig, results: Mapping[str, Any]) -> None:
    """The rates by condition, as paper 2's table 4 has them."""
    title = f"WER in %, by {results['recogniser']['_target_'].rpartition('.')[2]}"
    table = Table("", *cfg.conditions, title=title, title_justify="left")
    for name in next(iter(results["wer"].values())):
        table.add_row(
            name, *(f"{results['wer'][condition][name]:.1f}" for condition in cfg.conditions)
        )
    table.add_row(
        "words",
        *(str(results["counts"][condition]["words"]) for condition in cfg.conditions),
        style="dim",
    )
    console.print(table)
    console.print(
        f"results: {storage.join(cfg.output, 'results.json')}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
