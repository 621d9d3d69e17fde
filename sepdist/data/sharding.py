"""Write one split of a corpus, or a subset of it, as a data set, in this process or in Ray tasks.

Started again after an interruption, it keeps finished shards and makes the same bytes. Besides the
files of data/shards.py it writes source.yaml, the settings of the data set, so that shards of
different settings never mix.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from sepdist import config, slots, storage
from sepdist.cluster import run_tasks
from sepdist.config import ConfigError, ShardConfig
from sepdist.console import progress_bar
from sepdist.data import shards
from sepdist.data.members import split_members
from sepdist.data.records import Mixture, Utterance
from sepdist.data.shards import MANIFEST, Manifest, ShardInfo
from sepdist.seeding import rng

SOURCE = "source.yaml"


@dataclass(frozen=True)
class Written:
    """The result of `write_data_set`; `num_kept` shards were finished by an earlier run."""

    manifest: Manifest
    num_kept: int
    seconds: float


def write_data_set(cfg: ShardConfig, console: Console | None = None) -> Written:
    """Write what is missing of the data set at `cfg.output`; ConfigError if its settings differ."""
    if cfg.corpus is None or not cfg.split:
        missing = "split" if cfg.corpus else "corpus"
        raise ConfigError(f"no value given for {missing} (write needs corpus=... split=...)")
    if "/" in cfg.split or "\\" in cfg.split:
        raise ConfigError(f"split={cfg.split}: shards are named after it, so it has no slash")
    if cfg.samples_per_shard < 1 or cfg.num_workers < -1 or cfg.limit < 0:
        raise ConfigError("needs samples_per_shard >= 1, num_workers >= -1 and limit >= 0")
    if len(cfg.subset) != 2 or not 0 <= cfg.subset[0] < cfg.subset[1] <= 1:
        raise ConfigError(f"subset={cfg.subset}: give two numbers with 0 <= first < last <= 1")
    start = time.monotonic()
    corpus = slots.build("corpus", cfg.corpus)
    check_source(cfg, claim=False)
    if storage.exists(storage.join(cfg.output, MANIFEST)):
        manifest = shards.read_manifest(cfg.output)
        return Written(manifest, len(manifest.shards), time.monotonic() - start)
    calls = plan(cfg, corpus)
    check_source(cfg, claim=True)
    # An index is written after its shard was verified, so it marks a finished one.
    finished = set(storage.list_names(storage.join(cfg.output, "index")))
    num_kept = sum(name.replace(".tar", ".json") in finished for *_, name in calls)
    infos: list[ShardInfo] = []
    title = f"{corpus.name} {cfg.split}"
    with progress_bar(console or Console(stderr=True), title, len(calls)) as advance:
        for info in run_tasks(write_job, calls, cfg.num_workers, cfg.gpus_per_worker):
            infos.append(info)
            advance()
    infos.sort(key=lambda info: info.name)  # tasks finish in any order
    manifest = shards.write_manifest(cfg.output, corpus.name, cfg.split, corpus.sample_rate, infos)
    return Written(manifest, num_kept, time.monotonic() - start)


def plan(cfg: ShardConfig, corpus: Any) -> list[tuple[Any, ...]]:
    """List the arguments of `write_job`, `samples_per_shard` records each, in corpus order."""
    records = list(itertools.islice(corpus.records(cfg.split), cfg.limit or None))
    records = subset_of(records, *cfg.subset)
    if not records:
        where = f"split {cfg.split!r}, or none in subset={cfg.subset}"
        raise ConfigError(f"corpus {corpus.name} has no records in {where}")
    if cfg.mixtures_only:  # without sources, speakers and texts
        records = [Mixture(r.id, (), r.sample_rate, partial(load_mixture, r)) for r in records]
    size = cfg.samples_per_shard
    blocks = [records[first : first + size] for first in range(0, len(records), size)]
    return [
        (block, cfg.output, shards.shard_name(corpus.name, cfg.split, number))
        for number, block in enumerate(blocks)
    ]


def subset_of(records: list[Any], first: float, last: float) -> list[Any]:
    """A fixed random subset: fractions [first, last) of a seeded shuffle, in corpus order."""
    # "part" was once the name of a subset; another purpose would draw other subsets.
    keys = rng(0, "part").bit_generator.random_raw(len(records))
    shuffled = np.argsort(keys, kind="stable")
    chosen = shuffled[round(first * len(records)) : round(last * len(records))]
    return [records[i] for i in sorted(chosen)]


def load_mixture(record: Utterance | Mixture) -> Mapping[str, np.ndarray]:
    """Sum a record's sources and noise, clipped to full scale, as the only member."""
    loaded = record.load()
    waves = loaded if isinstance(loaded, Mapping) else {"s1": loaded}
    sources, _, rest = split_members(list(waves))
    return {"mix": np.clip(sum(waves[name] for name in (*sources, *rest)), -1.0, 1.0)}


def check_source(cfg: ShardConfig, *, claim: bool) -> None:
    """Raise ConfigError if the output has other settings; with `claim`, write those of `cfg`."""
    url = storage.join(cfg.output, SOURCE)
    names = ["corpus", "split", "samples_per_shard", "limit"]
    names += ["subset"] * (list(cfg.subset) != [0.0, 1.0]) + ["mixtures_only"] * cfg.mixtures_only
    wanted = {name: getattr(cfg, name) for name in names}
    if claim:
        text = yaml.safe_dump(wanted, sort_keys=True)
        with contextlib.suppress(FileExistsError):  # by an earlier or a concurrent start
            storage.put_bytes(url, text.encode(), create_only=True)
    if storage.exists(url):
        found = yaml.safe_load(storage.read_bytes(url))
        if "part" in found:  # the key of older versions
            found["subset"] = found.pop("part")
        if changed := config.differences(found, wanted):
            settings = "; ".join(changed)
            raise ConfigError(
                f"{cfg.output} holds shards of other settings: {settings}. Choose another output"
            )


def write_job(
    records: Sequence[Utterance | Mixture], output: str, name: str
) -> Iterator[ShardInfo]:
    """Write and verify one shard; a generator, as `run_tasks` needs."""
    yield shards.write_shard(records, output, name)
