"""Run a model on every mixture of a data set, in this process or in Ray tasks; write CSV and JSON.

Shapes: S sources, T samples.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from sepdist import storage
from sepdist.allocator import keep_freed_memory
from sepdist.cluster import run_tasks
from sepdist.config import ConfigError, EvaluateConfig, RecogniseConfig
from sepdist.console import progress_bar
from sepdist.data.dataset import Dataset
from sepdist.data.records import Batch
from sepdist.data.shards import Manifest
from sepdist.inference.export import Export, load_export
from sepdist.reporting import to_json

NO_LIMIT_SECONDS = 1e6
_Cfg = TypeVar("_Cfg", EvaluateConfig, RecogniseConfig)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EvaluationError(ValueError):
    """An utterance has no score; the message names it and says why."""


def check_workers(cfg: EvaluateConfig | RecogniseConfig) -> None:
    """Refuse a negative number of workers, or a GPU where there is none."""
    if cfg.num_workers < 0:
        raise ConfigError(
            f"num_workers={cfg.num_workers}: give 0 (in this process) or the number of Ray tasks"
        )
    if cfg.use_gpu and cfg.num_workers == 0 and not torch.cuda.is_available():
        raise ConfigError("use_gpu=true, but this machine has no GPU that torch can use")


def open_dataset(cfg: EvaluateConfig) -> Dataset:
    """The data set with the members that the config chooses."""
    return Dataset(
        cfg.data,
        num_sources=cfg.num_sources,
        noise=cfg.noise,
        cache_dir=cfg.cache_dir,
        cache_gigabytes=cfg.cache_gigabytes,
    )


def check_data(cfg: EvaluateConfig, export: Export) -> tuple[Manifest, range]:
    """The manifest and the numbers of the mixtures to score; ConfigError if the model misfits."""
    check_workers(cfg)
    manifest = open_dataset(cfg).manifest
    if export.sample_rate != manifest.sample_rate:
        raise ConfigError(
            f"{cfg.model} works at {export.sample_rate} Hz, {cfg.data} has {manifest.sample_rate} "
            f"Hz: shard the corpus again at {export.sample_rate} Hz"
        )
    if cfg.num_sources == 1 and not cfg.noise:
        raise ConfigError(
            "num_sources=1 without noise: the mixture is the source itself; pass noise=true"
        )
    return manifest, range(min(cfg.num_mixtures or manifest.num_samples, manifest.num_samples))


def read_batches(cfg: EvaluateConfig, numbers: Sequence[int]) -> Iterator[Batch]:
    """Batches of one mixture each, whole or cut to `max_seconds`."""
    dataset = open_dataset(cfg)
    for number in numbers:
        yield dataset.full(number, cfg.max_seconds or NO_LIMIT_SECONDS)


def device_of(cfg: EvaluateConfig | RecogniseConfig) -> torch.device:
    """The device that models run on."""
    return torch.device("cuda" if cfg.use_gpu else "cpu")


def separate_batch(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Separate a batch of one mixture, float32 [S, T]; EvaluationError if it is too short."""
    num_samples, least = batch.mixture.shape[1], int(getattr(model, "min_length", 1))
    if num_samples < least:
        raise EvaluationError(
            f"{batch.ids[0]}: {num_samples} samples are fewer than the {least} that the model takes"
        )
    with torch.inference_mode():
        return model(batch.mixture.to(device))[0].float().cpu()


def separate_mixtures(
    cfg: EvaluateConfig, numbers: Sequence[int]
) -> Iterator[tuple[Batch, Tensor]]:
    """Each mixture as a batch of one, with the separator's estimates [S, T]."""
    device = device_of(cfg)
    model = load_export(cfg.model).model.to(device)
    for batch in read_batches(cfg, numbers):
        yield batch, separate_batch(model, batch, device)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Limit torch to one thread, because sums over threads round differently; keep freed memory."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_on_data_set(
    work: Callable[[_Cfg, Sequence[_Item]], Iterator[_Result]],
    cfg: _Cfg,
    items: Sequence[_Item],
    console: Console,
    results_name: str = "results.json",
) -> list[_Result]:
    """The results of `work(cfg, partition)`, one per item, in the order of `items`.

    With `num_workers` above 0 each partition is a Ray task, which opens model and data itself, so
    that only items and results cross the network. An earlier file `results_name` is removed first:
    it must not stand next to half of the new ones.
    """
    storage.remove(storage.join(cfg.output, results_name))
    num_partitions = max(1, min(cfg.num_workers, len(items)))
    numbered = list(enumerate(items))
    calls = [(work, cfg, numbered[k::num_partitions]) for k in range(num_partitions)]
    found = run_tasks(_run_partition, calls, cfg.num_workers, num_gpus=float(cfg.use_gpu))
    results: dict[int, _Result] = {}
    with progress_bar(console, "scoring", len(items)) as advance:
        for number, result in found:
            results[number] = result
            advance()
    return [results[number] for number in range(len(items))]


def _run_partition(
    work: Callable[[Any, Any], Iterator[Any]], cfg: Any, items: Sequence[Any]
) -> Iterator[tuple[int, Any]]:
    """The numbered results of numbered items."""
    numbers, own = zip(*items, strict=True)
    with single_threaded():
        # A generator expression, because Ray calls `send`, which a zip does not have.
        yield from (pair for pair in zip(numbers, work(cfg, own), strict=True))


def write_results(
    console: Console, output: str, files: dict[str, bytes], results: Any, name: str = "results.json"
) -> None:
    """Write `files` to the output folder, and `results` as JSON last, which marks them complete."""
    for file, data in (files | {name: to_json(results, indent=1).encode()}).items():
        storage.put_bytes(storage.join(output, file), data)
    console.print(f"results: {storage.join(output, name)}")
