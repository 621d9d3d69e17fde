"""Run a model on every mixture of a data set, in this process or in Ray tasks; write CSV and JSON.

Shapes: S sources, T samples.
"""

import ctypes
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from sepdist import storage
from sepdist.allocator import keep_freed_memory
from sepdist.cluster import run_tasks
from sepdist.config import ConfigError, EvaluateConfig, RecogniseConfig
from sepdist.console import printable, progress_bar
from sepdist.data.dataset import Dataset
from sepdist.data.members import DataError
from sepdist.data.records import Batch
from sepdist.data.shards import Manifest, read_index
from sepdist.inference.export import Export, load_export
from sepdist.objectives.contract import speakers_of
from sepdist.reporting import to_csv, to_json

NO_LIMIT_SECONDS = 1e6
SAVE_SECONDS = 60.0  # between two writes of the table of utterances so far
NUM_SCORERS = 4  # processes that score while a device separates
_Cfg = TypeVar("_Cfg", EvaluateConfig, RecogniseConfig)
_Item = TypeVar("_Item")


class EvaluationError(ValueError):
    """An utterance has no score, or too many have none; the message says which and why."""


def check_workers(cfg: EvaluateConfig | RecogniseConfig) -> None:
    """Refuse a GPU where there is none."""
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


def check_data(
    cfg: EvaluateConfig, export: Export | None = None
) -> tuple[Manifest, list[dict[str, Any]]]:
    """The manifest and the `id` of each mixture to score; ConfigError if the model misfits."""
    check_workers(cfg)
    manifest = open_dataset(cfg).manifest
    if export and export.sample_rate != manifest.sample_rate:
        raise ConfigError(
            f"{cfg.model} works at {export.sample_rate} Hz, {cfg.data} has {manifest.sample_rate} "
            f"Hz: shard the corpus again at {export.sample_rate} Hz"
        )
    if cfg.num_sources == 1 and not cfg.noise and manifest.format_version == 1:
        raise ConfigError(
            "num_sources=1 without noise: the mixture is the source itself; pass noise=true"
        )
    ids: list[str] = []
    for shard in manifest.shards:
        try:
            ids += [sample.key for sample in read_index(cfg.data, shard)]
        except (DataError, FileNotFoundError):  # of an index: each of its mixtures will fail
            ids += [f"number {len(ids) + i}" for i in range(shard.num_samples)]
    return manifest, [{"id": one} for one in ids[: cfg.num_mixtures or None]]


def check_audible(name: str, estimates_ST: Tensor, sources_ST: Tensor) -> None:
    """EvaluationError if a wave is silent or not finite; ConfigError if the shapes differ."""
    if estimates_ST.shape != sources_ST.shape:
        raise ConfigError(
            f"{name}: the model gives estimates of shape {list(estimates_ST.shape)}, the sources "
            f"are of shape {list(sources_ST.shape)}; num_sources must be the number of its outputs"
        )
    for kind, waves in (("source", sources_ST), ("estimate", estimates_ST)):
        for number, wave in enumerate(waves.double(), start=1):
            finite = bool(torch.isfinite(wave).all())
            if not finite or (wave == wave[0]).all():
                what = "is silent" if finite else "holds NaN or infinity"
                raise EvaluationError(f"{name}: {kind} {number} {what}; no SI-SNR is defined")


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


def mixture_separator(cfg: EvaluateConfig) -> Callable[[int], tuple[Tensor, Batch, Tensor]]:
    """A function that gives a separator's estimates [S, T] of a mixture, and its batch of one.

    Third are the outputs [M, T] that it chooses from, which are the estimates for most models.
    """
    device, dataset = device_of(cfg), open_dataset(cfg)
    model = load_export(cfg.model).model.to(device)
    num_loudest = getattr(model, "output_rules", {}).pop("num_loudest", 0)  # done here instead

    def separate(number: int) -> tuple[Tensor, Batch, Tensor]:
        batch = dataset.full(number, cfg.max_seconds or NO_LIMIT_SECONDS)
        outputs_MT = separate_batch(model, batch, device)
        return speakers_of(outputs_MT[None], num_loudest=num_loudest)[0], batch, outputs_MT

    return separate


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
    prepare: Callable[[_Cfg], Callable[[_Item], Any]],
    cfg: _Cfg,
    items: Sequence[_Item],
    names: Sequence[Mapping[str, Any]],
    console: Console,
    results_name: str = "results.json",
) -> tuple[dict[int, Any], dict[str, Any]]:
    """Return `prepare(cfg)(item)` by the item's number, and `unscored`, those that failed, and why.

    With `num_workers` above 0 each partition is a Ray task, which opens model and data itself. An
    earlier `results_name` is removed first, so that it never stands next to half of the new files.
    A line of utterances.csv is an item's `names`, its result (a dict, or an object's attributes),
    and the reason if it failed; the file is written once a minute and when the work ends, in any
    way. EvaluationError if all failed.
    """
    storage.remove(storage.join(cfg.output, results_name))
    num_partitions = max(1, min(cfg.num_workers, len(items)))
    numbered = list(enumerate(items))
    calls = [(prepare, cfg, numbered[k::num_partitions]) for k in range(num_partitions)]
    found = run_tasks(_run_partition, calls, cfg.num_workers, num_gpus=float(cfg.use_gpu))
    results: dict[int, Any] = {}
    rows: dict[int, dict[str, Any]] = {}

    def save() -> float:
        lines: list[dict[str, Any]] = [rows[number] for number in sorted(rows)]
        header = [*max(lines, key=len)]
        table = to_csv(header, [[line.get(name, "") for name in header] for line in lines])
        storage.put_bytes(storage.join(cfg.output, "utterances.csv"), table)
        return time.monotonic()

    saved = time.monotonic()
    try:
        with progress_bar(console, "scoring", len(items)) as advance:
            for number, result, reason in found:
                results |= {} if reason else {number: result}
                own = {} if reason else result if isinstance(result, dict) else vars(result)
                rows[number] = {**names[number], **own, "reason": reason}
                advance()
                saved = save() if time.monotonic() > saved + SAVE_SECONDS else saved
    finally:
        if rows:
            save()
        if 0 < len(rows) < len(items):
            console.print(f"{len(rows)} of {len(items)} were done and are kept in {cfg.output}")
    unscored = [rows[number] for number in sorted(rows) if rows[number]["reason"]]
    if not results:
        raise EvaluationError(f"none of {len(items)} has a score: {unscored[0]['reason']}")
    return dict(sorted(results.items())), {"num_unscored": len(unscored), "unscored": unscored}


def _run_partition(
    prepare: Callable[[Any], Callable[[Any], Any]], cfg: Any, items: Sequence[tuple[int, Any]]
) -> Iterator[tuple[int, Any, str]]:
    """The number, result and reason ("" with a result) of numbered items, in their order.

    Results may be partial functions still to be called, with `use_gpu` in a pool of processes.
    """
    with single_threaded():
        begin = prepare(cfg)
        if not cfg.use_gpu:
            yield from ((number, *_attempt(begin, item)) for number, item in items)
            return
        with ProcessPoolExecutor(NUM_SCORERS, get_context("spawn"), _start_scorer) as pool:

            def start(item: Any) -> Callable[[], tuple[Any, str]]:
                found, reason = _attempt(lambda: [begin(item)])  # in a list, not called
                if found and isinstance(found[0], partial):
                    # As bytes, because tensors would go through shared memory, which may be small.
                    return pool.submit(_attempt, pickle.loads, pickle.dumps(found[0])).result
                return lambda: (found and found[0], reason)

            started = ((number, start(item)) for number, item in items)
            running = deque(islice(started, 2 * NUM_SCORERS))
            while running:
                running.extend(islice(started, 1))
                number, end = running.popleft()
                yield number, *end()


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """The result, called if it is a partial function, and ""; or None and why there is none."""
    try:
        found = function(*arguments)
        return (found() if isinstance(found, partial) else found), ""
    except (ConfigError, storage.StorageError):  # concerns all
        raise
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: of torch
        return None, printable(str(error).partition("\n")[0]) or repr(error)


def _start_scorer() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: end with it even if it is killed
    torch.set_num_threads(1)
    keep_freed_memory()


def write_results(
    console: Console, cfg: _Cfg, files: dict[str, bytes], results: Any, name: str = "results.json"
) -> None:
    """Write `files` to the output folder, and `results` as JSON last, which marks them complete.

    EvaluationError, when all is written, if more than `max_unscored` utterances lack a score.
    """
    for file, data in (files | {name: to_json(results, indent=1).encode()}).items():
        storage.put_bytes(storage.join(cfg.output, file), data)
    console.print(f"results: {storage.join(cfg.output, name)}")
    unscored, incomplete = results["unscored"], results.get("incomplete", [])
    kinds = {"have no score and are in no mean": unscored, "lack some of their scores": incomplete}
    left_out = {f"{len(some)} {text}": some[0]["reason"] for text, some in kinds.items() if some}
    for text, first in left_out.items():
        console.print(f"{text} (see utterances.csv); the first: {first}")
    if 0 <= cfg.max_unscored < (number := len(unscored) + len(incomplete)):
        there = f"{' and '.join(left_out)} (see utterances.csv)"
        raise EvaluationError(f"{there}; max_unscored={number} accepts them")
