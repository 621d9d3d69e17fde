"""Run the stages of a pipeline in order, each on the results of earlier ones, and write its tables.

    output/pipeline.yaml               the pipeline as it was last started
    output/seed-0/<stage>/             run_dir (train), data set (shards) or output folder
    output/seed-0/<stage>/stage.json   the stage's whole config, written when it has finished
    output/table.md, table.json        results beside the paper's numbers; results=NAME renames them

A finished stage is not run again, nor where the output was moved or copied as a whole; an
interrupted training stage resumes from its checkpoint. In overrides, @stage means the folder of an
earlier stage: `data.train=@separated`. All stages are composed before the first one runs, so that a
mistake in the last one is found at once.
"""

import contextlib
import copy
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from sepdist import composing, config, storage
from sepdist.cluster import connected
from sepdist.config import ConfigError, EvaluateConfig, RecogniseConfig, ShardConfig, TrainConfig
from sepdist.data.sharding import write_data_set
from sepdist.data.shards import read_manifest
from sepdist.inference.estimation import evaluate_estimator
from sepdist.inference.evaluation import evaluate
from sepdist.inference.recognition import recognise
from sepdist.inference.switching import measure_switching
from sepdist.papers.figures import draw
from sepdist.papers.schema import FigureConfig, PipelineConfig, Stage, StageConfig
from sepdist.papers.tables import MARKER, NO_CELL, fill_tables, read_marker, to_markdown
from sepdist.reporting import to_json
from sepdist.training import run as training_run

_T = TypeVar("_T")

# Differences in these do not change the result of a finished stage.
FREE_TO_CHANGE = (
    *("cache", "cluster", "corpus.cache", "data.cache", "data.num_threads", "data.prefetch"),
    *("data_root", "engine.zero", "gpus_per_worker", "max_unscored", "num_workers", "use_gpu"),
)
# How many earlier stages a kind uses at least and at most (others: exactly one), and their kinds.
NUM_USED = {"train": (0, 1), "shards": (0, 0), "recognise": (0, 1), "figure": (1, math.inf)}
KINDS_USED = {"figure": ("train", "shards", "estimate")}  # others: train
WITH_NUMBERS = ("train", "evaluate", "estimate", "recognise")  # kinds that a table may show
RUNNERS: dict[str, Callable[[Any, Console], Any]] = {
    "train": training_run.run,
    "shards": write_data_set,
    "evaluate": evaluate,
    "estimate": evaluate_estimator,
    "recognise": recognise,
    "labels": measure_switching,
    "figure": draw,
}


def run(cfg: PipelineConfig, console: Console) -> None:
    """Run every stage that has not finished, for every seed, then write the tables.

    ConfigError if a stage does not compose, or a finished one had another config; DataError if a
    data set is missing.
    """
    stages = plan(cfg)
    to_run = [stage for stage in stages if not is_done(stage)]
    wanted = {url for stage in to_run for url in data_sets(stage)}
    for url in sorted(wanted - {stage.folder for stage in stages}):
        read_manifest(url)
    storage.put_bytes(storage.join(cfg.output, "pipeline.yaml"), config.to_yaml(cfg).encode())
    needed = max(map(num_cpus, to_run), default=0)
    with connected(needed, address=address(stages)) if needed else contextlib.nullcontext():
        for number, stage in enumerate(stages, start=1):
            title = f"stage {number} of {len(stages)}: {stage.name} ({stage.kind}, "
            title += f"seed {stage.seed})" + " has finished before" * (stage not in to_run)
            console.rule(title, align="left")
            if stage in to_run:
                began = time.monotonic()
                # A copy, because a program may complete its config.
                RUNNERS[stage.kind](copy.deepcopy(stage.config), console)
                mark_done(stage, time.monotonic() - began)
    if cfg.tables:
        results = fill_tables(cfg, stages)
        files = {"md": to_markdown(results), "json": to_json(results, indent=1)}
        for suffix, text in files.items():
            storage.put_bytes(storage.join(cfg.output, f"{cfg.results}.{suffix}"), text.encode())
        console.print(files["md"])
    console.print(f"results: {cfg.output}")


def plan(cfg: PipelineConfig) -> list[Stage]:
    """Compose every stage of every seed, in the order in which they run."""
    if not cfg.stages or not cfg.seeds:
        raise ConfigError("a pipeline has a stage and a seed; choose one with experiment=...")
    for kind in cfg.overrides:
        if kind not in RUNNERS:
            raise ConfigError(f"overrides.{kind}: kinds of stages are {', '.join(RUNNERS)}")
    stages: list[Stage] = []
    for seed in cfg.seeds:
        earlier: dict[str, Stage] = {}
        for name in cfg.stages:
            try:
                earlier[name] = resolve(cfg, seed, name, earlier)
            except (ValueError, OmegaConfBaseException) as error:
                raise ConfigError(f"stage {name}: {' '.join(str(error).split())}") from error
        stages += earlier.values()
    check_tables(cfg)
    return stages


def check_tables(cfg: PipelineConfig) -> None:
    """Raise ConfigError for a row of the wrong length or a cell that names no stage."""
    for table in cfg.tables:
        for row in table.rows:
            where = f"tables: {table.title}: row {row.title!r}"
            if not len(row.cells) == len(row.paper or row.cells) == len(table.columns):
                raise ConfigError(f"{where} needs {len(table.columns)} cells")
            for cell in row.cells:
                name, colon, _ = cell.partition(":")
                known = colon and name in cfg.stages and cfg.stages[name].kind in WITH_NUMBERS
                if cell != NO_CELL and not known:
                    what = f"STAGE:NUMBER of a stage of kind {', '.join(WITH_NUMBERS)}"
                    raise ConfigError(f"{where}: {cell!r} is not {what}, nor {NO_CELL!r}")


def resolve(cfg: PipelineConfig, seed: int, name: str, earlier: dict[str, Stage]) -> Stage:
    """Compose a stage's config as its program would; raise ValueError if it does not fit."""
    stage = cfg.stages[name]
    uses = used_stages(stage, earlier)
    folder = storage.join(cfg.output, f"seed-{seed}", name)
    overrides = [
        with_folders(change, earlier)
        for change in (*stage.settings, *cfg.overrides.get(stage.kind, []), *stage.overrides)
    ]
    fixed: dict[str, Any] = {"plugins": cfg.plugins, "output": folder}
    resolved: Any
    if stage.kind == "train":
        fixed = {"name": f"{cfg.name}-{name}-{seed}", "run_dir": folder, "seed": seed}
        fixed |= {"plugins": cfg.plugins, "data_root": cfg.data_root}
        fixed |= {"init.weights": uses[0].folder} if uses else {}
        chosen = {"experiment": stage.experiment, "scale": cfg.scale}
        choices = [f"{group}={option}" for group, option in chosen.items() if option]
        resolved = composed("train", [*choices, *overrides], fixed, TrainConfig)
    elif stage.kind == "shards":
        resolved = composed("shard", [f"split={name}", *overrides], fixed, ShardConfig)
    elif stage.kind == "recognise":
        fixed["model"] = uses[0].folder if uses else None
        resolved = composed("recognise", overrides, fixed, RecogniseConfig)
    elif stage.kind == "figure":
        runs = {cfg.stages[used.name].title or used.name: used.folder for used in uses}
        fixed = {"runs": runs, "output": storage.join(folder, "figure.png")}
        resolved = composed("plot", [f"title={stage.title}", *overrides], fixed, FigureConfig)
    else:
        data = uses[0].config.data
        scored = data.train if stage.kind == "labels" else cfg.test_data
        fixed["model"] = uses[0].folder
        words = [f"data={scored}", f"num_sources={data.num_sources}", f"noise={data.noise}"]
        resolved = composed("evaluate", [*words, *overrides], fixed, EvaluateConfig)
    return Stage(seed, name, stage.kind, folder, resolved)


def used_stages(stage: StageConfig, earlier: dict[str, Stage]) -> list[Stage]:
    """Look up the stages that `stage` uses; ConfigError if their number or kinds do not fit."""
    if stage.kind not in RUNNERS:
        raise ConfigError(f"kind={stage.kind!r}: it is one of {', '.join(RUNNERS)}")
    least, most = NUM_USED.get(stage.kind, (1, 1))
    kinds = KINDS_USED.get(stage.kind, ("train",))
    fitting = [name for name, one in earlier.items() if one.kind in kinds]
    if any(one not in fitting for one in stage.uses) or not least <= len(stage.uses) <= most:
        takes = f"a stage of kind {stage.kind} uses {least} to {most} of {fitting}"
        raise ConfigError(f"uses={stage.uses}: {takes} ({', '.join(kinds)})")
    return [earlier[used] for used in stage.uses]


def with_folders(change: str, earlier: dict[str, Stage]) -> str:
    """Replace each @stage in a key=value by the folder of that earlier stage."""
    if not isinstance(change, str):
        raise ConfigError(f"{change}: give KEY=VALUE, a text")
    name = r"(?<![\w/])@(\w+)"
    if unknown := [one for one in re.findall(name, change) if one not in earlier]:
        raise ConfigError(f"{change}: @{unknown[0]} is none of the earlier stages {[*earlier]}")
    return re.sub(name, lambda found: earlier[found[1]].folder, change)


def composed(name: str, overrides: Sequence[str], fixed: dict[str, Any], schema: type[_T]) -> _T:
    """Compose a primary config with overrides, then set the fixed values."""
    result = composing.compose(name, overrides, schema)
    for key, value in fixed.items():
        OmegaConf.update(result, key, value, force_add=True)
    return config.typed(result, schema)


def data_sets(stage: Stage) -> list[str]:
    """The data sets that a stage reads."""
    if stage.kind == "train":
        data = stage.config.data
        return [data.train, data.validation, *(one.url for one in data.extra)]
    if stage.kind == "shards":
        return [corpus["data"]] if "data" in (corpus := stage.config.corpus or {}) else []
    return config.listed(stage.config.data) if isinstance(stage.config, EvaluateConfig) else []


def num_cpus(stage: Stage) -> int:
    """The number of CPUs that the stage takes of a Ray started here."""
    if stage.kind == "train":
        cluster = stage.config.cluster
        return math.ceil(config.worker_range(cluster)[1] * cluster.cpus_per_worker)
    return int(getattr(stage.config, "num_workers", 0))


def address(stages: Sequence[Stage]) -> str | None:
    """The Ray cluster of the training stages; ConfigError if they name several."""
    named = {stage.config.cluster.address for stage in stages if stage.kind == "train"}
    if len(named) > 1:
        several = f"the stages name {', '.join(sorted(map(str, named)))}"
        raise ConfigError(f"cluster.address: a pipeline joins one cluster, but {several}")
    return next(iter(named), None)


def is_done(stage: Stage) -> bool:
    """Whether the stage finished in an earlier start; ConfigError if it did with another config."""
    # A figure takes no time and may have new curves to show, so it is always drawn again.
    place = storage.join(stage.folder, MARKER)
    if stage.kind == "figure" or not storage.exists(place):
        return False
    # Reading against the schema gives keys that are younger than the marker their defaults. YAML
    # does not join the escapes by which JSON writes an emoji.
    try:
        known = read_marker(stage)["config"]
        # The output may have been moved, and in it the stages that this one names.
        places = (known["run_dir" if stage.kind == "train" else "output"], stage.folder)
        old, new = (str(one).rpartition("/")[0] + "/" for one in places)
        text = json.dumps(known, ensure_ascii=False).replace(old, new)
        had = config.from_yaml(text, type(stage.config))
    except (OmegaConfBaseException, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{place}: is no marker of this version of sepdist ({reason}); remove it to run the "
            "stage again, or choose another output"
        ) from error
    before, after = dataclasses.asdict(had), dataclasses.asdict(stage.config)
    training_run.fill_in(before, after)
    unset = isinstance(stage.config, TrainConfig) and stage.config.data.order is None
    free = FREE_TO_CHANGE + ("data.order",) * unset  # it has that of its run
    if changed := config.differences(before, after, free):
        raise ConfigError(
            f"stage {stage.name} has finished with another config: {'; '.join(changed)}. Choose "
            f"another output, or move {stage.folder} and the folders of the stages that use it "
            "elsewhere to run them afresh"
        )
    return True


def mark_done(stage: Stage, seconds: float) -> None:
    """Write the marker of a stage; it comes after all other files of the stage."""
    marker = {"stage": stage.name, "kind": stage.kind, "seed": stage.seed}
    marker |= {"seconds": round(seconds, 1), "config": dataclasses.asdict(stage.config)}
    storage.put_bytes(storage.join(stage.folder, MARKER), to_json(marker, indent=1).encode())
