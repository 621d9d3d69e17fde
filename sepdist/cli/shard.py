"""Cut one split of a corpus into shards, check a data set, or describe it.

    sepdist shard write corpus=demo split=train output=demo/data/train num_workers=2
    sepdist shard write corpus=librimix corpus.generated=Libri2Mix split=dev output=s3://bucket/dev
    sepdist shard verify output=demo/data/train
    sepdist shard info output=demo/data/train

`write` puts shards, their indices, source.yaml (the settings) and, last, manifest.json. With
num_workers=N, N Ray tasks write at once, in the cluster of RAY_ADDRESS or else on this machine.
After an interruption the same command keeps the finished shards and makes the same bytes.
"""

import signal
import sys

from rich.console import Console
from rich.table import Table

from sepdist import storage
from sepdist.cli.compose import read_config
from sepdist.config import ConfigError, ShardConfig
from sepdist.console import user_console
from sepdist.data import shards
from sepdist.data.members import DataError
from sepdist.data.sharding import write_data_set
from sepdist.data.shards import MANIFEST, Manifest

_OUT = Console(soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Run write, verify or info."""
    verbs = {"write": write, "verify": verify, "info": info}
    with user_console() as console:
        verb, *words = sys.argv[1:] or [""]
        if verb in ("-h", "--help"):
            verb, words = "|".join(verbs), ["--help"]
        elif verb not in verbs:
            raise ConfigError(f"no verb {verb!r}: give {', '.join(verbs)}; --help explains them")
        sys.argv = [f"sepdist shard {verb}", *words]  # read by `read_config`
        cfg = read_config("shard", ShardConfig, __doc__)
        cfg.output = storage.absolute(cfg.output)
        verbs[verb](cfg, console)


def write(cfg: ShardConfig, console: Console) -> None:
    """Write a data set, or finish it, and describe it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop acts as Ctrl-C
    todo = "The same command continues; finished shards are kept"
    with user_console(stopped=f"{cfg.output} is not finished and has no {MANIFEST}. {todo}"):
        written = write_data_set(cfg, console)
    num_new = len(written.manifest.shards) - written.num_kept
    speed = f"{60 * num_new / written.seconds:.1f} ({num_new} in {written.seconds:.1f} s)"
    rows = {"shards kept from before": str(written.num_kept), "shards per minute": speed}
    describe(written.manifest, cfg.output, rows)


def verify(cfg: ShardConfig, console: Console) -> None:
    """Print every problem on a line of its own; DataError if there is one."""
    manifest = shards.read_manifest(cfg.output)
    problems = shards.verify(cfg.output)
    for problem in problems:
        _OUT.print(problem)
    if problems:
        todo = "remove it and write it again"
        raise DataError(f"{cfg.output}: {len(problems)} problem(s); {todo}")
    counts = f"{len(manifest.shards)} shards, {manifest.num_samples} samples"
    _OUT.print(f"intact: {counts}, digest {manifest.digest()}")


def info(cfg: ShardConfig, console: Console) -> None:
    """Print the contents of the manifest."""
    manifest = shards.read_manifest(cfg.output)
    describe(manifest, cfg.output, {"format version": str(manifest.format_version)})
    _OUT.print(f"digest {manifest.digest()}")


def describe(manifest: Manifest, output: str, more: dict[str, str]) -> None:
    """Print a table of the data set."""
    table = Table(title=output, show_header=False, title_justify="left")
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    members = f"{' + '.join(manifest.members)}, {manifest.sample_rate} Hz"
    rows = {
        "corpus, split": f"{manifest.corpus}, {manifest.split}",
        "samples": f"{manifest.num_samples} ({members})",
        "hours": f"{manifest.hours:.2f}",
        "speakers": str(manifest.num_speakers),
        "shards": str(len(manifest.shards)),
        "bytes": f"{num_bytes} ({num_bytes / 1e6:.1f} MB)",
    }
    for name, value in (rows | more).items():
        table.add_row(name, value)
    _OUT.print(table)
