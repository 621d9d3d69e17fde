"""Write one split of a corpus, or a subset of it, as a data set, in this process or in Ray tasks.

Started again after an interruption, it keeps finished shards and makes the same bytes. Besides the
files of data/shards.py it writes source.yaml, the settings of the data set, so that shards of
different settings never mix, and skipped.jsonl, the records that on_error=skip left out, with why.
"""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from sepdist import config, slots, storage
from sepdist.audio import MIN_LOUDNESS_SECONDS
from sepdist.cluster import run_tasks
from sepdist.config import ConfigError, ShardConfig
from sepdist.console import progress_bar
from sepdist.data import inputs, shards
from sepdist.data.manifest import MANIFEST, SHARD, Manifest
from sepdist.data.members import DataError, misfits, split_members
from sepdist.data.records import Mixture, Utterance
from sepdist.seeding import rng

logger = logging.getLogger(__name__)

SOURCE = "source.yaml"
SKIPPED = "skipped.jsonl"
MAX_SHOWN = 50  # bad records


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
    if len(cfg.subset) != 2 or not 0 <= cfg.subset[0] < cfg.subset[1] <= 1:
        raise ConfigError(f"subset={cfg.subset}: give two numbers with 0 <= first < last <= 1")
    if cfg.on_error not in ("fail", "skip"):
        raise ConfigError(f"on_error={cfg.on_error}: give fail or skip")
    start = time.monotonic()
    corpus = slots.build("corpus", cfg.corpus)
    if not SHARD.fullmatch(f"{(name := shards.shard_name(corpus.name, cfg.split, 0))} {'0' * 64}"):
        raise ConfigError(f"{name!r} cannot name a shard: no slash, control character or first dot")
    check_source(cfg, claim=False)
    if storage.exists(storage.join(cfg.output, MANIFEST)):
        manifest = shards.read_manifest(cfg.output)
        require_same_inputs(cfg, corpus, {shard.name for shard in manifest.shards})
        return Written(manifest, len(manifest.shards), time.monotonic() - start)
    calls, bad = plan(cfg, corpus)
    require_none(bad, cfg.on_error == "skip" and bool(calls))
    check_source(cfg, claim=True)
    outcomes: list[shards.Outcome] = []
    title = f"{corpus.name} {cfg.split}"
    with progress_bar(console or Console(stderr=True), title, len(calls)) as advance:
        for outcome in run_tasks(write_job, calls, cfg.num_workers, cfg.gpus_per_worker):
            outcomes.append(outcome)
            advance()
    bad += sorted(line for outcome in outcomes for line in outcome.bad)  # tasks have any order
    infos = [one.shard for one in outcomes if one.shard and one.shard.num_samples]
    require_none(bad, cfg.on_error == "skip" and bool(infos))
    infos.sort(key=lambda info: info.name)
    place = storage.join(cfg.output, SKIPPED)
    if bad or storage.exists(place):
        text = "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in bad)
        storage.put_bytes(place, text.encode(errors="backslashreplace"))  # as `shards.dump`
    manifest = shards.write_manifest(cfg.output, corpus.name, cfg.split, corpus.sample_rate, infos)
    return Written(manifest, sum(one.kept for one in outcomes), time.monotonic() - start)


def plan(cfg: ShardConfig, corpus: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
    """List the arguments of `write_job`, by shard in corpus order, and records of unusable ids.

    Such a record counts among the `samples_per_shard` of its shard, so the others stay the same.
    """
    records = list(itertools.islice(corpus.records(cfg.split), cfg.limit or None))
    records = subset_of(records, *cfg.subset)
    if not records:
        where = f"split {cfg.split!r}, or none in subset={cfg.subset}"
        raise ConfigError(f"corpus {corpus.name} has no records in {where}")
    if cfg.mixtures_only:  # without sources, speakers and texts
        records = [Mixture(r.id, (), r.sample_rate, partial(load_mixture, r)) for r in records]
    size, bad = cfg.samples_per_shard, misfits(records)
    identity = corpus.identity() if hasattr(corpus, "identity") else ""
    calls = []
    for number, first in enumerate(range(0, len(records), size)):
        name = shards.shard_name(corpus.name, cfg.split, number)
        block = [r for at, r in enumerate(records[first : first + size], first) if at not in bad]
        calls += [(block, cfg.output, name, identity, cfg.on_error == "skip")] * bool(block)
    return calls, list(bad.values())


def require_none(bad: list[str], skip: bool) -> None:
    """Raise DataError that lists the records that cannot be stored, unless they are left out."""
    if bad and not skip:
        todo = "on_error=skip leaves such records out"
        title = [f"{len(bad)} records cannot be stored ({todo}):"] * (len(bad) > 1)
        more = [f"and {len(bad) - MAX_SHOWN} more"] * (len(bad) > MAX_SHOWN)
        raise DataError("\n".join([*title, *bad[:MAX_SHOWN], *more]))


def num_skipped(url: str) -> int:
    """Return the number of records that a data set was written without."""
    place = storage.join(url, SKIPPED)
    return storage.read_bytes(place).count(b"\n") if storage.exists(place) else 0


def num_short(url: str, manifest: Manifest) -> int:
    """Return the number of utterances that are too short to have a loudness."""
    least = MIN_LOUDNESS_SECONDS * manifest.sample_rate
    utterances = manifest.shards if manifest.members == ("s1",) else ()
    return sum(one.num_samples < least for s in utterances for one in shards.read_index(url, s))


def require_same_inputs(cfg: ShardConfig, corpus: Any, finished: set[str]) -> None:
    """Raise DataError if the `finished` shards of a data set were made of other inputs."""
    changed, unknown = list[str](), set[str]()
    try:
        calls = plan(cfg, corpus)[0]
    except (OSError, ValueError) as error:  # it is gone, which makes nothing wrong
        calls, finished, unknown = [], set(), {str(error)}
    for block, _, name, identity, _ in calls:
        before, now = shards.read_inputs(cfg.output, name), inputs.describe(block, identity)
        if before and now:
            changed += config.differences(before["inputs"], now["inputs"])
            unknown.update(config.differences(before["versions"], now["versions"]))
        elif name in finished:
            unknown.add("nothing was noted, by an older version or for a `load` like a lambda")
        else:
            changed.append(f"{name} is new")
        finished.discard(name)
    changed += [f"{name} has no records any more" for name in sorted(finished)]
    if changed:
        shown = "; ".join(changed[:3]) + f"; and {len(changed) - 3} more" * (len(changed) > 3)
        raise DataError(f"{cfg.output} was made of other inputs: {shown}. Choose another output")
    if unknown:
        what = "is finished; whether its audio would be the same now is not known"
        logger.warning("%s %s: %s", cfg.output, what, "; ".join(sorted(unknown)))


def subset_of(records: list[Any], first: float, last: float) -> list[Any]:
    """A fixed random subset: fractions [first, last) of a seeded shuffle, in corpus order."""
    # "part" was once the name of a subset; another purpose would draw other subsets.
    keys = rng(0, "part").bit_generator.random_raw(len(records))
    shuffled = np.argsort(keys, kind="stable")
    chosen = shuffled[round(first * len(records)) : round(last * len(records))]
    return [records[i] for i in sorted(chosen)]


def load_mixture(record: Utterance | Mixture) -> Mapping[str, np.ndarray]:
    """The mixture as the only member: `mix`, or sources and noise summed, clipped to full scale."""
    loaded = record.load()
    waves = loaded if isinstance(loaded, Mapping) else {"s1": loaded}
    if "mix" in waves:
        return {"mix": waves["mix"]}
    sources, _, rest = split_members(list(waves))
    return {"mix": np.clip(sum(waves[name] for name in (*sources, *rest)), -1.0, 1.0)}


def check_source(cfg: ShardConfig, *, claim: bool) -> None:
    """Raise ConfigError if the output has other settings; with `claim`, write those of `cfg`."""
    url = storage.join(cfg.output, SOURCE)
    names = ["corpus", "split", "samples_per_shard", "limit"]
    names += ["subset"] * (list(cfg.subset) != [0.0, 1.0]) + ["mixtures_only"] * cfg.mixtures_only
    names += ["on_error"] * (cfg.on_error != "fail")
    wanted = {name: getattr(cfg, name) for name in names}
    text = yaml.safe_dump(wanted, sort_keys=True).encode()
    if claim:
        with contextlib.suppress(FileExistsError):  # by an earlier or a concurrent start
            storage.put_bytes(url, text, create_only=True)
    if storage.exists(url):
        found = yaml.safe_load(storage.read_bytes(url))
        if "part" in found:  # the key of older versions
            found["subset"] = found.pop("part")
        if found | {"on_error": "skip"} == wanted:  # only bad records are missing, which it allows
            return storage.put_bytes(url, text) if claim else None
        if changed := config.differences(found, wanted):
            settings = "; ".join(changed)
            raise ConfigError(
                f"{cfg.output} holds shards of other settings: {settings}. Choose another output"
            )


def write_job(*arguments: Any) -> Iterator[shards.Outcome]:
    """`shards.try_shard` as a generator, which `run_tasks` needs."""
    yield shards.try_shard(*arguments)
