"""Cut one split of a corpus into shards, check a data set, or describe it.

    sepdist shard write corpus=demo split=train output=demo/data/train num_workers=2
    sepdist shard write corpus=librimix corpus.generated=Libri2Mix split=dev output=s3://bucket/dev
    sepdist shard verify output=demo/data/train
    sepdist shard info output=demo/data/train

`write` puts shards, their indices, source.yaml (the settings) and, last, manifest.json. With
num_workers=N, N Ray tasks write at once, in the cluster of RAY_ADDRESS or else on this machine.
After an interruption the same command keeps the finished shards and makes the same bytes. It lists
all records that cannot be stored; with on_error=skip it leaves them out (skipped.jsonl).
"""

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sepdist import storage
from sepdist.cli.compose import read_config
from sepdist.config import ShardConfig
from sepdist.console import printable, user_console

if TYPE_CHECKING:  # it imports torch
    from sepdist.data.shards import Manifest

_OUT = Console(soft_wrap=True, highlight=False, markup=False)


def main() -> int | None:
    """Run write, verify or info."""
    actions = {"write": write, "verify": verify, "info": info}
    action, *words = sys.argv[1:] or [""]
    if action in ("-h", "--help"):
        action, words = "|".join(actions), ["--help"]
    elif action not in actions:
        wrong = f"error: no action {action!r}: give write, verify or info\n\n" if action else ""
        usage = "usage: sepdist shard write|verify|info KEY=VALUE ..."
        print(f"{wrong}{usage}\n\n{__doc__}", file=sys.stderr, end="")
        return 2
    sys.argv = [f"sepdist shard {action}", *words]  # read by `read_config`
    with user_console() as console:
        cfg = read_config("shard", ShardConfig, __doc__)
        cfg.output = storage.absolute(cfg.output)
        actions[action](cfg, console)
    return None


def write(cfg: ShardConfig, console: Console) -> None:
    """Write a data set, or finish it, and describe it."""
    from sepdist.data.sharding import num_short, write_data_set
    from sepdist.data.shards import MANIFEST

    todo = "The same command continues; finished shards are kept"
    with user_console(stopped=f"{cfg.output} is not finished and has no {MANIFEST}. {todo}"):
        written = write_data_set(cfg, console)
    num_new = len(written.manifest.shards) - written.num_kept
    speed = f"{60 * num_new / written.seconds:.1f} ({num_new} in {written.seconds:.1f} s)"
    rows = {"shards kept from before": str(written.num_kept), "shards per minute": speed}
    if short := num_short(cfg.output, written.manifest):
        rows["shorter than 0.4 s"] = f"{short} (dynamic mixing needs 0.4 s for a loudness)"
    describe(written.manifest, cfg.output, rows)


def verify(cfg: ShardConfig, console: Console) -> None:
    """Print every problem on a line of its own; DataError if there is one."""
    from sepdist.data import shards
    from sepdist.data.members import DataError

    manifest = shards.read_manifest(cfg.output)
    problems = shards.verify(cfg.output)
    for problem in problems:
        _OUT.print(printable(problem))
    if problems:
        todo = "remove it and write it again"
        raise DataError(f"{cfg.output}: {len(problems)} problem(s); {todo}")
    counts = f"{len(manifest.shards)} shards, {manifest.num_samples} samples"
    _OUT.print(f"intact: {counts}, digest {manifest.digest()}")


def info(cfg: ShardConfig, console: Console) -> None:
    """Print the contents of the manifest."""
    from sepdist.data import shards

    manifest = shards.read_manifest(cfg.output)
    describe(manifest, cfg.output, {"format version": str(manifest.format_version)})
    _OUT.print(f"digest {manifest.digest()}")


def describe(manifest: "Manifest", output: str, more: dict[str, str]) -> None:
    """Print a table of the data set."""
    from sepdist.data.sharding import SKIPPED, num_skipped

    table = Table(title=output, show_header=False, title_justify="left")
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    members = " + ".join(manifest.members).replace(" + mix", ", mix")  # mix is no sum of theirs
    members += f", {manifest.sample_rate} Hz"
    rows = {
        "corpus, split": f"{manifest.corpus}, {manifest.split}",
        "samples": f"{manifest.num_samples} ({members})",
        "hours": f"{manifest.hours:.2f}",
        "speakers": str(manifest.num_speakers),
        "shards": str(len(manifest.shards)),
        "bytes": f"{num_bytes} ({num_bytes / 1e6:.1f} MB)",
    }
    if skipped := num_skipped(output):
        rows["records left out"] = f"{skipped} (listed in {SKIPPED})"
    for name, value in (rows | more).items():
        table.add_row(name, printable(value))
    _OUT.print(table)
