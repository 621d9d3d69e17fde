"""A model on every mixture of a data set: shared by evaluation, SI-SNR estimation, label tables and recognition."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sepdist import storage
from sepdist.allocator import keep_freed_memory
from sepdist.config import ConfigError, EvaluateConfig
from sepdist.data.dataset import Dataset
from sepdist.data.records import Batch
from sepdist.inference.export import Export

NO_LIMIT_SECONDS = 1e6


class EvaluationError(ValueError):
    """An utterance has no score; the message names it and says why."""


def absolute_paths(cfg: EvaluateConfig) -> EvaluateConfig:
    """Workers have another working directory, so local paths are made absolute."""

    def absolute(path: str) -> str:
        return path if storage.is_remote(path) else str(Path(path).expanduser().resolve())

    return dataclasses.replace(
        cfg,
        model=absolute(cfg.model),
        data=absolute(cfg.data),
        output=absolute(cfg.output),
        cache_dir=absolute(cfg.cache_dir),
    )


def open_dataset(cfg: EvaluateConfig) -> Dataset:
    """The test set as the config reads it."""
    return Dataset(
        cfg.data,
        num_sources=cfg.num_sources,
        noise=cfg.noise,
        cache_dir=cfg.cache_dir,
        cache_gigabytes=cfg.cache_gigabytes,
    )


def check_fit(cfg: EvaluateConfig, export: Export, dataset: Dataset) -> None:
    """Refuse, before any scoring, a model and data that cannot be scored together."""
    if export.sample_rate != dataset.manifest.sample_rate:
        raise ConfigError(
            f"{cfg.model} works at {export.sample_rate} Hz, {cfg.data} has {dataset.manifest.sample_rate} Hz: "
            f"shard the corpus again at {export.sample_rate} Hz"
        )
    if cfg.num_sources == 1 and not cfg.noise:
        raise ConfigError(
            "num_sources=1 without noise: the mixture is the source itself; pass noise=true"
        )
    if cfg.num_workers < 0:
        raise ConfigError(
            f"num_workers={cfg.num_workers}: it is 0 (in this process) or a number of Ray tasks"
        )
    if cfg.use_gpu and cfg.num_workers == 0 and not torch.cuda.is_available():
        raise ConfigError("use_gpu=true, but this machine has no GPU that torch can use")


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for torch inside, because sums over threads round differently; and freed memory is kept."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_full(cfg: EvaluateConfig, dataset: Dataset, index: int) -> Batch:
    """One utterance whole, or its first `max_seconds`."""
    return dataset.full(index, cfg.max_seconds or NO_LIMIT_SECONDS)


def estimate(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """float32 [S, T] on the CPU from a batch of one mixture; too short a mixture is an error that names it."""
    num_samples, least = batch.mixture.shape[1], int(getattr(model, "min_length", 1))
    if num_samples < least:
        raise EvaluationError(
            f"{batch.ids[0]}: {num_samples} samples are fewer than the {least} that the model takes"
        )
    with torch.inference_mode():
        return model(batch.mixture.to(device))[0].float().cpu()
