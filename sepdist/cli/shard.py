"""Cut one split of a corpus into shards, check a data set, or describe it.

    python tools/shard_data.py write corpus=demo split=train output=demo/data/train num_workers=2
    python tools/shard_data.py write corpus=librimix corpus.generated=/data/Libri2Mix split=test output=s3://bucket/test
    python tools/shard_data.py verify output=demo/data/train
    python tools/shard_data.py info output=demo/data/train

In: a corpus as published. Out: shards and their indices, source.yaml (the settings that made them) and, last,
manifest.json. With num_workers=N the shards are written by N Ray tasks at once, in the cluster of RAY_ADDRESS or else
on this machine. Stopped and started again it keeps the shards that are finished and makes the same bytes.
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

_OUT = Console(soft_wrap=True, highlight=False)
_ERR = Console(stderr=True, soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0 if arguments else 2
    verb, *overrides = arguments
    verbs = {"write": run_write, "verify": run_verify, "info": run_info}
    if verb not in verbs:
        return fail(
            f"no verb {verb!r}: the first word is one of {', '.join(verbs)}; --help explains them"
        )
    try:
        return verbs[verb](read_config(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        return fail(" ".join(line.strip() for line in str(error).splitlines()[:2]))
    except (ValueError, OSError) as error:
        return fail(str(error))


def help_text() -> str:
    """The module's docstring, the keys and the corpora."""
    corpora = sorted(path.stem for path in Path(config.config_dir(), "corpus").glob("*.yaml"))
    keys = [
        line
        for line in inspect.getsource(ShardConfig).splitlines()
        if line.startswith("    ") and ":" in line
    ]
    return "\n".join(
        [
            (__doc__ or "").strip(),
            "",
            "Keys, given as key=value (corpus.KEY=value changes the corpus):",
        ]
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
            raise ConfigError(
                f"cannot read {word!r}: after the verb come key=value pairs; --help lists the keys"
            )
    config.register_schemas()
    with initialize_config_dir(config.config_dir(), version_base="1.3"):
        composed = compose("shard", overrides=list(overrides))
    if OmegaConf.is_missing(composed, "output"):
        raise ConfigError(
            "no value given for output (pass output=FOLDER or output=s3://bucket/prefix)"
        )
    for key, nothing in (("corpus", None), ("split", "")):
        if OmegaConf.is_missing(composed, key) or composed[key] is None:
            composed[key] = nothing
    cfg = config.typed(composed, ShardConfig)
    if not storage.is_remote(cfg.output):
        cfg.output = str(Path(cfg.output).expanduser().resolve())
    return cfg


def run_write(cfg: ShardConfig) -> int:
    """The verb `write`."""
    before = signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's stop is a Ctrl-C
    try:
        written = write_data_set(cfg, _ERR)
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
    _OUT.print(
        f"sound: {len(manifest.shards)} shards, {manifest.num_samples} samples, digest {manifest.digest()}"
    )
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


if __name__ == "__main__":
    sys.exit(main())
