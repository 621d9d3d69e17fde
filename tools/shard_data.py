"""Cut one split of a corpus into shards, check a data set, or describe it.

    python tools/shard_data.py write corpus=demo split=train output=demo/data/train num_workers=2
    python tools/shard_data.py write corpus=librimix corpus.generated=/data/Libri2Mix split=test output=s3://bucket/test
    python tools/shard_data.py verify output=demo/data/train
    python tools/shard_data.py info output=demo/data/train

In: a corpus as published. Out: shards and their indices, source.yaml (the settings that made them) and, last,
manifest.json. With num_workers=N the shards are written by N Ray tasks at once, in the cluster of RAY_ADDRESS or else
on this machine. Stopped and started again it keeps the shards that are finished and makes the same bytes.
"""

import contextlib
import inspect
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sepdist import config, storage
from sepdist.cluster import connected
from sepdist.config import ConfigError, ShardConfig
from sepdist.data import shards
from sepdist.data.records import Mixture, Utterance
from sepdist.data.shards import Manifest, ShardInfo

SOURCE = "source.yaml"
MANIFEST = "manifest.json"
_OUT = Console(soft_wrap=True, highlight=False)
_ERR = Console(stderr=True, soft_wrap=True, highlight=False)


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


def main(arguments: Sequence[str]) -> int:
    """Run one verb; returns the exit status."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0 if arguments else 2
    verb, *overrides = arguments
    verbs = {"write": run_write, "verify": run_verify, "info": run_info}
    if verb not in verbs:
        return fail(f"no verb {verb!r}: the first word is one of {', '.join(verbs)}; --help explains them")
    try:
        return verbs[verb](read_config(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        return fail(" ".join(line.strip() for line in str(error).splitlines()[:2]))
    except (ValueError, OSError) as error:
        return fail(str(error))


def help_text() -> str:
    """The module's docstring, the keys and the corpora."""
    corpora = sorted(path.stem for path in Path(config.config_dir(), "corpus").glob("*.yaml"))
    keys = [line for line in inspect.getsource(ShardConfig).splitlines() if line.startswith("    ") and ":" in line]
    return "\n".join(
        [(__doc__ or "").strip(), "", "Keys, given as key=value (corpus.KEY=value changes the corpus):"]
        + [line for line in keys if '"""' not in line]
        + ["", f"Corpora: {', '.join(corpora)}"]
    )


def fail(message: str) -> int:
    """Say what is wrong in one line; the exit status of a failure."""
    _ERR.print(f"error: {message}", markup=False)
    return 1


def read_config(overrides: Sequence[str]) -> ShardConfig:
    """configs/shard.yaml with the command line's changes; what a verb does not need may be missing."""
    for word in overrides:
        if word.startswith("-") or "=" not in word:
            raise ConfigError(f"cannot read {word!r}: after the verb come key=value pairs; --help lists the keys")
    config.register_schemas()
    with initialize_config_dir(config.config_dir(), version_base="1.3"):
        composed = compose("shard", overrides=list(overrides))
    if OmegaConf.is_missing(composed, "output"):
        raise ConfigError("no value given for output (pass output=FOLDER or output=s3://bucket/prefix)")
    merged = {key: None if OmegaConf.is_missing(composed, key) else composed[key] for key in ("corpus", "split")}
    cfg = ShardConfig(
        corpus=None if merged["corpus"] is None else OmegaConf.to_container(merged["corpus"], resolve=True),
        split=merged["split"] or "",
        output=composed.output,
        samples_per_shard=composed.samples_per_shard,
        num_workers=composed.num_workers,
        limit=composed.limit,
    )
    if not storage.is_remote(cfg.output):
        cfg.output = str(Path(cfg.output).expanduser().resolve())
    return cfg


def run_write(cfg: ShardConfig) -> int:
    """The verb `write`."""
    before = signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's stop is a Ctrl-C
    try:
        written = write_data_set(cfg)
    except KeyboardInterrupt:
        _ERR.print(
            f"stopped: {cfg.output} is not finished and has no {MANIFEST}. The same command goes on; "
            "finished shards are kept",
            markup=False,
        )
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    num_new = len(written.manifest.shards) - written.num_kept
    describe(written.manifest, cfg.output, {
        "shards kept from before": str(written.num_kept),
        "shards per minute": f"{60 * num_new / written.seconds:.1f} ({num_new} in {written.seconds:.1f} s)",
    })  # fmt: skip
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_verify(cfg: ShardConfig) -> int:
    """The verb `verify`: every problem on its own line, status 1 if there is one."""
    manifest = shards.read_manifest(cfg.output)
    problems = shards.verify(cfg.output)
    for problem in problems:
        _OUT.print(problem, markup=False)
    if problems:
        return fail(f"{cfg.output}: {len(problems)} problem(s); remove it and write it again")
    _OUT.print(f"sound: {len(manifest.shards)} shards, {manifest.num_samples} samples, digest {manifest.digest()}")
    return 0


def run_info(cfg: ShardConfig) -> int:
    """The verb `info`: what the manifest says."""
    manifest = shards.read_manifest(cfg.output)
    describe(manifest, cfg.output, {"format version": str(manifest.format_version)})
    _OUT.print(f"digest {manifest.digest()}")
    return 0


def describe(manifest: Manifest, output: str, more: dict[str, str]) -> None:
    """Print the summary table."""
    table = Table(title=output, show_header=False, title_justify="left")
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    rows = {
        "corpus, split": f"{manifest.corpus}, {manifest.split}",
        "samples": f"{manifest.num_samples} ({' + '.join(manifest.members)}, {manifest.sample_rate} Hz)",
        "hours": f"{manifest.hours:.2f}",
        "speakers": str(manifest.num_speakers),
        "shards": str(len(manifest.shards)),
        "bytes": f"{num_bytes} ({num_bytes / 1e6:.1f} MB)",
    }
    for name, value in (rows | more).items():
        table.add_row(name, value)
    _OUT.print(table)


def write_data_set(cfg: ShardConfig) -> Written:
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
    start = time.monotonic()
    corpus = config.build(cfg.corpus)
    check_source(cfg, claim=False)
    if storage.exists(storage.join(cfg.output, MANIFEST)):
        manifest = shards.read_manifest(cfg.output)
        return Written(manifest, len(manifest.shards), time.monotonic() - start)
    jobs = plan(cfg, corpus)
    check_source(cfg, claim=True)
    there = set(storage.list_names(storage.join(cfg.output, "index")))  # an index comes after its verified shard
    num_kept = sum(job.name.replace(".tar", ".json") in there for job in jobs)
    infos: dict[int, ShardInfo] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_ERR) as progress:
        bar = progress.add_task(f"{corpus.name} {cfg.split}", total=len(jobs))
        for number, info in write_shards(jobs, cfg.num_workers):
            infos[number] = info
            progress.advance(bar)
    in_order = [infos[number] for number in range(len(jobs))]
    manifest = shards.write_manifest(cfg.output, corpus.name, cfg.split, corpus.sample_rate, in_order)
    return Written(manifest, num_kept, time.monotonic() - start)


def plan(cfg: ShardConfig, corpus: Any) -> list[ShardJob]:
    """The shards to write, as many records to each as `samples_per_shard` says, in the corpus's order."""
    records = list(itertools.islice(corpus.records(cfg.split), cfg.limit or None))
    if not records:
        raise ConfigError(f"corpus {corpus.name} has no records in split {cfg.split!r}")
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


def check_source(cfg: ShardConfig, *, claim: bool) -> None:
    """Refuse an output claimed for other settings, so that shards of two never mix; `claim` it if it is free."""
    url = storage.join(cfg.output, SOURCE)
    wanted = {"corpus": cfg.corpus, "split": cfg.split, "samples_per_shard": cfg.samples_per_shard, "limit": cfg.limit}
    if claim:
        with contextlib.suppress(FileExistsError):  # by an earlier start, or by another one a moment ago
            storage.put_bytes(url, yaml.safe_dump(wanted, sort_keys=True).encode(), create_only=True)
    if storage.exists(url):
        changed = config.differences(yaml.safe_load(storage.read_bytes(url)), wanted)
        if changed:
            raise ConfigError(
                f"{cfg.output} holds shards of other settings: {'; '.join(changed)}. Choose another output"
            )


def write_shards(jobs: Sequence[ShardJob], num_workers: int) -> Iterator[tuple[int, ShardInfo]]:
    """Write every shard; yields its number and description as each one is finished and verified."""
    if num_workers == 0:
        for job in jobs:
            yield job.number, write_one(job)
    else:
        yield from write_shards_with_ray(jobs, num_workers)


def write_one(job: ShardJob) -> ShardInfo:
    """Write and verify one shard."""
    return shards.write_shard(job.records, job.output, job.name)


def write_shards_with_ray(jobs: Sequence[ShardJob], num_workers: int) -> Iterator[tuple[int, ShardInfo]]:
    """The same as Ray tasks, at most `num_workers` at once; a task whose worker dies is run again."""
    import ray

    with connected(max(num_workers, 1)):
        at_once = num_workers if num_workers > 0 else max(int(ray.cluster_resources().get("CPU", 1)), 1)
        task = ray.remote(num_cpus=1, max_retries=3)(_write_in_task)
        waiting = iter(jobs)
        running = {task.remote(job): job.number for job in itertools.islice(waiting, at_once)}
        try:
            while running:
                finished, _ = ray.wait(list(running), num_returns=1)
                for reference in finished:
                    number = running.pop(reference)
                    running |= {task.remote(job): job.number for job in itertools.islice(waiting, 1)}
                    yield number, ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError | OSError):
                raise error.cause from None
            raise
        except ray.exceptions.WorkerCrashedError as error:
            raise OSError(f"a worker died more than three times ({error}); the same command goes on") from error


def _write_in_task(job: ShardJob) -> ShardInfo:
    if os.path.isdir(job.working_dir):  # Ray chooses a working directory of its own
        os.chdir(job.working_dir)
    return write_one(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
