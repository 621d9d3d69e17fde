"""A corpus in, one finished data set out: its records, or a part of them, cut into shards, here or by Ray tasks.

`tools/shard_data.py write` and the stages of kind `shards` of a pipeline. Stopped and started again it keeps the shards
that are finished and makes the same bytes. Besides shards, indices and manifest (data/shards.py) it leaves source.yaml,
the settings that made them, so that shards of two never mix.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sepdist import config, storage
from sepdist.cluster import connected
from sepdist.config import ConfigError, ShardConfig
from sepdist.data import shards
from sepdist.data.members import split_members
from sepdist.data.records import Mixture, Utterance
from sepdist.data.shards import MANIFEST, Manifest, ShardInfo
from sepdist.seeding import rng

SOURCE = "source.yaml"


@dataclass(frozen=True)
class ShardJob:
    """One shard to write; light enough to be sent to another machine."""

    number: int
    name: str
    output: str
    records: tuple[Utterance | Mixture, ...]
    working_dir: str  # where the relative paths of the corpus start


@dataclass(frozen=True)
class Written:
    """What `write_data_set` did."""

    manifest: Manifest
    num_kept: int  # shards that were finished before this run
    seconds: float


def write_data_set(cfg: ShardConfig, console: Console | None = None) -> Written:
    """Write what is missing of the data set at `cfg.output`, its manifest last.

    Raises:
        ConfigError: a value is missing or wrong, or `cfg.output` holds a data set of other settings.
    """
    if cfg.corpus is None or not cfg.split:
        raise ConfigError(
            f"no value given for {'split' if cfg.corpus else 'corpus'} (write needs corpus=... split=...)"
        )
    if cfg.samples_per_shard < 1 or cfg.num_workers < -1 or cfg.limit < 0:
        raise ConfigError("needs samples_per_shard >= 1, num_workers >= -1 and limit >= 0")
    if len(cfg.subset) != 2 or not 0 <= cfg.subset[0] < cfg.subset[1] <= 1:
        raise ConfigError(f"subset={cfg.subset}: give two numbers with 0 <= first < second <= 1")
    start = time.monotonic()
    corpus = config.build(cfg.corpus)
    check_source(cfg, claim=False)
    if storage.exists(storage.join(cfg.output, MANIFEST)):
        manifest = shards.read_manifest(cfg.output)
        return Written(manifest, len(manifest.shards), time.monotonic() - start)
    jobs = plan(cfg, corpus)
    check_source(cfg, claim=True)
    there = set(
        storage.list_names(storage.join(cfg.output, "index"))
    )  # an index comes after its verified shard
    num_kept = sum(job.name.replace(".tar", ".json") in there for job in jobs)
    infos: dict[int, ShardInfo] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        bar = progress.add_task(f"{corpus.name} {cfg.split}", total=len(jobs))
        for number, info in write_shards(jobs, cfg):
            infos[number] = info
            progress.advance(bar)
    in_order = [infos[number] for number in range(len(jobs))]
    manifest = shards.write_manifest(
        cfg.output, corpus.name, cfg.split, corpus.sample_rate, in_order
    )
    return Written(manifest, num_kept, time.monotonic() - start)


def plan(cfg: ShardConfig, corpus: Any) -> list[ShardJob]:
    """The shards to write, as many records to each as `samples_per_shard` says, in the corpus's order."""
    records = part_of(
        list(itertools.islice(corpus.records(cfg.split), cfg.limit or None)), *cfg.subset
    )
    if not records:
        raise ConfigError(
            f"corpus {corpus.name} has no records in split {cfg.split!r}, or none in subset={cfg.subset}"
        )
    if cfg.mixtures_only:
        records = [without_sources(record) for record in records]
    starts = range(0, len(records), cfg.samples_per_shard)
    return [
        ShardJob(
            number=number,
            name=shards.shard_name(corpus.name, cfg.split, number),
            output=cfg.output,
            records=tuple(records[first : first + cfg.samples_per_shard]),
            working_dir=os.getcwd(),
        )
        for number, first in enumerate(starts)
    ]


def part_of(records: list[Any], first: float, last: float) -> list[Any]:
    """The records that a shuffle, always the same, puts between two shares of them; in their own order."""
    places = np.argsort(rng(0, "part").bit_generator.random_raw(len(records)), kind="stable")
    return [
        records[i] for i in sorted(places[round(first * len(records)) : round(last * len(records))])
    ]


def without_sources(record: Utterance | Mixture) -> Mixture:
    """What one knows of a recording: the mixture, and neither who speaks nor what."""
    return Mixture(record.id, (), record.sample_rate, partial(load_mixture, record))


def load_mixture(record: Utterance | Mixture) -> Mapping[str, np.ndarray]:
    """The sum of a record's sources and noise, within full scale, as its only part."""
    loaded = record.load()
    waves = loaded if isinstance(loaded, Mapping) else {"s1": loaded}
    sources, _, rest = split_members(list(waves))
    return {"mix": np.clip(sum(waves[name] for name in (*sources, *rest)), -1.0, 1.0)}


def check_source(cfg: ShardConfig, *, claim: bool) -> None:
    """Refuse an output claimed for other settings, so that shards of two never mix; `claim` it if it is free."""
    url = storage.join(cfg.output, SOURCE)
    wanted = {
        "corpus": cfg.corpus,
        "split": cfg.split,
        "samples_per_shard": cfg.samples_per_shard,
        "limit": cfg.limit,
    }
    chosen = {"part": list(cfg.subset), "mixtures_only": cfg.mixtures_only}
    wanted |= {key: value for key, value in chosen.items() if value not in ([0.0, 1.0], False)}
    if claim:
        with contextlib.suppress(
            FileExistsError
        ):  # by an earlier start, or by another one a moment ago
            storage.put_bytes(
                url, yaml.safe_dump(wanted, sort_keys=True).encode(), create_only=True
            )
    if storage.exists(url):
        changed = config.differences(yaml.safe_load(storage.read_bytes(url)), wanted)
        if changed:
            raise ConfigError(
                f"{cfg.output} holds shards of other settings: {'; '.join(changed)}. Choose another output"
            )


def write_shards(jobs: Sequence[ShardJob], cfg: ShardConfig) -> Iterator[tuple[int, ShardInfo]]:
    """Write every shard; yields its number and description as each one is finished and verified."""
    if cfg.num_workers == 0:
        for job in jobs:
            yield job.number, write_one(job)
    else:
        yield from write_shards_with_ray(jobs, cfg.num_workers, cfg.gpus_per_worker)


def write_one(job: ShardJob) -> ShardInfo:
    """Write and verify one shard."""
    return shards.write_shard(job.records, job.output, job.name)


def write_shards_with_ray(
    jobs: Sequence[ShardJob], num_workers: int, num_gpus: float
) -> Iterator[tuple[int, ShardInfo]]:
    """The same as Ray tasks, at most `num_workers` at once; a task whose worker dies is run again."""
    import ray

    with connected(max(num_workers, 1)):
        at_once = (
            num_workers if num_workers > 0 else max(int(ray.cluster_resources().get("CPU", 1)), 1)
        )
        task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(_write_in_task)
        waiting = iter(jobs)
        running = {task.remote(job): job.number for job in itertools.islice(waiting, at_once)}
        try:
            while running:
                finished, _ = ray.wait(list(running), num_returns=1)
                for reference in finished:
                    number = running.pop(reference)
                    running |= {
                        task.remote(job): job.number for job in itertools.islice(waiting, 1)
                    }
                    yield number, ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError | OSError):
                raise error.cause from None
            raise
        except ray.exceptions.WorkerCrashedError as error:
            raise OSError(
                f"a worker died more than three times ({error}); the same command goes on"
            ) from error


def _write_in_task(job: ShardJob) -> ShardInfo:
    if os.path.isdir(job.working_dir):  # Ray chooses a working directory of its own
        os.chdir(job.working_dir)
    return write_one(job)
