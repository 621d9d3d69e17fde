"""Run a sweep of training runs with Hydra's sweepers, each run in its own folder of run_dir."""

import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence

from omegaconf import DictConfig

from sepdist import composing, storage
from sepdist.cli.compose import finish
from sepdist.config import TrainConfig
from sepdist.console import user_console

# Hydra would otherwise log, and leave the folders multirun/ and .hydra/ where it was started.
_QUIET = ("hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null")
_MAX_NAME_BYTES = 150


def run_sweep(words: Sequence[str], train: Callable[[TrainConfig], float | None]) -> int:
    """Train each run of the sweep that the words of a command line describe, and print a table.

    A run whose training fails has no score; other errors end the sweep. The same command goes on.
    Returns the exit status: 1 if every run failed.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    literals, overrides, _ = composing.divide(words, TrainConfig, sweeps=True)
    if "hydra/sweeper=optuna" in overrides:  # its own default is to minimise
        overrides = ["hydra.sweeper.direction=maximize", *overrides]
    parsed = OverridesParser.create().parse_overrides(overrides)
    varied = {one.get_key_element() for one in parsed if one.is_sweep_override()}
    fixed = {one.get_key_element() for one in parsed} - varied
    runs: list[tuple[str, float, str]] = []
    failed: list[str] = []

    def job(composed: DictConfig) -> float:
        task = HydraConfig.get().overrides.task
        swept = [one for one in task if one.partition("=")[0] not in fixed]
        composing.set_literals(composed, literals)
        with user_console():  # exits: Hydra would print more of an error than its line
            cfg = finish(composed, TrainConfig)
        if swept:
            folder = folder_name(swept)
            cfg.run_dir, cfg.name = storage.join(cfg.run_dir, folder), f"{cfg.name},{folder}"
        try:
            score = train(cfg)
        except SystemExit as error:  # after a message
            from sepdist.training.launch import TrainingFailedError

            if not isinstance(error.__context__, TrainingFailedError):
                raise
            score = None
            failed.append(cfg.run_dir)
        runs.append((" ".join(swept), -math.inf if score is None else score, cfg.run_dir))
        return runs[-1][1]

    with composing.hydra_open("train", TrainConfig), tempfile.TemporaryDirectory() as scratch:
        quiet = [*_QUIET, f"hydra.sweep.dir={scratch}", "hydra.sweep.subdir=."]
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun("train", job, [*quiet, *overrides, "hydra.mode=MULTIRUN"])
    print(to_table(runs))
    return int(len(failed) == len(runs))


def folder_name(swept: Iterable[str]) -> str:
    """A folder's name for a run's values, with a digest where it cannot hold them as they are."""
    wanted = ",".join(one.lstrip("+") for one in swept)
    name = re.sub(r"[^\w.=,+-]+", "_", wanted).encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    return name if name == wanted else f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"


def to_table(runs: Sequence[tuple[str, float, str]]) -> str:
    """The runs with their best validation scores; the best of all is marked."""
    best = max((score for _, score, _ in runs if math.isfinite(score)), default=None)
    lines = [("values", "score", "run_dir", "")]
    for values, score, run_dir in runs:
        shown = f"{score:.3f}" if math.isfinite(score) else "-"
        lines.append((values, shown, run_dir, "<- best" if score == best else ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
