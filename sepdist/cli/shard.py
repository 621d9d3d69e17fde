"""Cut one split of a corpus into shards, check a data set, or describe it.

    sepdist shard write corpus=demo split=train output=demo/data/train num_workers=2
    sepdist shard write corpus=librimix corpus.generated=Libri2Mix split=dev output=s3://bucket/dev
    sepdist shard verify output=demo/data/train
    sepdist shard info output=demo/data/train

`write` puts shards, their indices, source.yaml (the settings) and, last, manifest.json. With
num_workers=N, N Ray tasks write at once, in the cluster of RAY_ADDRESS or else on this machine.
After an interruption the same command keeps the finished shards and makes the same bytes.
"""

import inspect
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from sepdist import config, storage
from sepdist.config import ConfigError, ShardConfig
from sepdist.data import shards
from sepdist.data.sharding import write_data_set
from sepdist.data.shards import MANIFEST, Manifest

_OUT = Console(soft_wrap=True, highlight=False, markup=False)
_ERR = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run write, verify or info; returns the exit status."""
    verb, *overrides = sys.argv[1:] if arguments is None else arguments or [""]
    if not verb or {"-h", "--help"} & {verb, *overrides}:
        print(help_text())
        return 0 if verb else 2
    verbs = {"write": run_write, "verify": run_verify, "info": run_info}
    if verb not in verbs:
        return fail(f"no verb {verb!r}: it is one of {', '.join(verbs)}; --help explains them")
    try:
        return verbs[verb](read_config(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        return fail(" ".join(line.strip() for line in str(error).splitlines()[:2]))
    except (ValueError, OSError) as error:
        return fail(str(error))


def help_text() -> str:
    """The module's docstring, the keys and the corpora."""
    corpora = sorted(path.stem for path in Path(config.config_dir(), "corpus").glob("*.yaml"))
    lines = inspect.getsource(ShardConfig).splitlines()
    keys = [line for line in lines if line.startswith("    ") and '"""' not in line]
    title = "Keys, given as key=value (corpus.KEY=value changes the corpus):"
    return "\n".join([__doc__ or "", title, *keys, "", f"Corpora: {', '.join(corpora)}"])


def fail(message: str) -> int:
    """Print an error in one line; returns the exit status of a failure."""
    _ERR.print(f"error: {message}")
    return 1


def read_config(overrides: Sequence[str]) -> ShardConfig:
    """Apply key=value to configs/shard.yaml; `corpus` and `split` may be missing."""
    for word in overrides:
        if word.startswith("-") or "=" not in word:
            todo = "give key=value pairs; --help lists the keys"
            raise ConfigError(f"cannot read {word!r} after the verb: {todo}")
    config.register_schemas()
    with initialize_config_dir(config.config_dir(), version_base="1.3"):
        composed = compose("shard", overrides=list(overrides))
    if OmegaConf.is_missing(composed, "output"):
        todo = "pass output=FOLDER or output=s3://bucket/prefix"
        raise ConfigError(f"no value given for output ({todo})")
    for key, nothing in (("corpus", None), ("split", "")):
        if OmegaConf.is_missing(composed, key) or composed[key] is None:
            composed[key] = nothing
    cfg = config.typed(composed, ShardConfig)
    cfg.output = storage.absolute(cfg.output)
    return cfg


def run_write(cfg: ShardConfig) -> int:
    """Write a data set, or finish it, and describe it."""
    before = signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's stop, treated as Ctrl-C
    try:
        written = write_data_set(cfg, _ERR)
    except KeyboardInterrupt:
        todo = "The same command continues; finished shards are kept"
        _ERR.print(f"stopped: {cfg.output} is not finished and has no {MANIFEST}. {todo}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    num_new = len(written.manifest.shards) - written.num_kept
    speed = f"{60 * num_new / written.seconds:.1f} ({num_new} in {written.seconds:.1f} s)"
    rows = {"shards kept from before": str(written.num_kept), "shards per minute": speed}
    describe(written.manifest, cfg.output, rows)
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_verify(cfg: ShardConfig) -> int:
    """Print every problem on a line of its own; exit status 1 if there is one."""
    manifest = shards.read_manifest(cfg.output)
    problems = shards.verify(cfg.output)
    for problem in problems:
        _OUT.print(problem)
    if problems:
        return fail(f"{cfg.output}: {len(problems)} problem(s); remove it and write it again")
    counts = f"{len(manifest.shards)} shards, {manifest.num_samples} samples"
    _OUT.print(f"intact: {counts}, digest {manifest.digest()}")
    return 0


def run_info(cfg: ShardConfig) -> int:
    """Print the contents of the manifest."""
    manifest = shards.read_manifest(cfg.output)
    describe(manifest, cfg.output, {"format version": str(manifest.format_version)})
    _OUT.print(f"digest {manifest.digest()}")
    return 0


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
