"""Several stages in order, each handing its weights to the next: one config in; runs, scores, a table and figures out.

    python -m sepdist pipeline experiment=huang2021/table2_libri2mix data_root=s3://bucket/data seeds=[0,1]
    ray job submit --working-dir . -- python -m sepdist pipeline experiment=huang2021/table2_libri2mix ...

    output/pipeline.yaml               what was asked for last
    output/seed-0/<stage>/             run_dir of a `train` stage, data set of a `shards` stage, output of another kind
    output/seed-0/<stage>/stage.json   its whole config, put when it has finished; such a stage is not run again
    output/table.md, table.json        the paper's numbers beside ours (or another name, by results=...)

A `train` stage is an experiment of configs/experiment with changes. In changes, @stage means the folder of an earlier
stage: `data.train=@separated`. All stages are composed before the first one runs, so that a mistake in the last one
costs nothing. Stopped and started again, training goes on from its checkpoint.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from sepdist import config, storage
from sepdist.cluster import connected
from sepdist.config import (
    ConfigError,
    EvaluateConfig,
    FigureConfig,
    PipelineConfig,
    RecogniseConfig,
    ShardConfig,
    TrainConfig,
)
from sepdist.data.sharding import write_data_set
from sepdist.data.shards import read_manifest
from sepdist.inference.estimation import evaluate_estimator
from sepdist.inference.evaluation import evaluate
from sepdist.inference.recognition import recognise
from sepdist.inference.switching import measure_switching
from sepdist.papers.figures import draw
from sepdist.papers.tables import (
    MARKER,
    NO_CELL,
    Stage,
    read_marker,
    table,
    to_markdown,
)
from sepdist.training import run as training_run

_T = TypeVar("_T")


# What may differ from the config of a finished stage without making its result another one.
FREE_TO_CHANGE: tuple[str, ...] = (
    "cluster",
    "engine.zero",
    "data_root",
    "data.cache",
    "data.prefetch",
)


FREE_TO_CHANGE += (
    "data.num_threads",
    "num_workers",
    "use_gpu",
    "cache",
    "gpus_per_worker",
    "corpus.cache",
)


FEWEST_AND_MOST_USED = {
    "train": (0, 1),
    "shards": (0, 0),
    "recognise": (0, 1),
    "figure": (1, math.inf),
}  # else 1, 1


MAY_USE = {"figure": ("train", "shards", "judge")}  # other kinds use runs


def run(cfg: PipelineConfig, console: Console) -> None:
    """Run every stage that has not finished, for every seed, then write the table.

    Raises:
        ConfigError: a stage does not compose, or one that finished had another config.
        DataError: a data set is missing.
    """
    stages = plan(cfg)
    done = [is_done(stage) for stage in stages]
    wanted = {
        url
        for stage, skip in zip(stages, done, strict=True)
        if not skip
        for url in data_sets(stage)
    }
    for url in sorted(wanted - {stage.folder for stage in stages}):
        read_manifest(url)
    storage.put_bytes(storage.join(cfg.output, "pipeline.yaml"), config.to_yaml(cfg).encode())
    needed = max(
        (num_cpus(stage) for stage, skip in zip(stages, done, strict=True) if not skip), default=0
    )
    with connected(needed, address=address(stages)) if needed else contextlib.nullcontext():
        for number, (stage, skip) in enumerate(zip(stages, done, strict=True), start=1):
            title = (
                f"stage {number} of {len(stages)}: {stage.name} ({stage.kind}, seed {stage.seed})"
            )
            console.rule(f"{title}{' has finished before' if skip else ''}", align="left")
            if not skip:
                began = time.monotonic()
                RUNNERS[stage.kind](
                    copy.deepcopy(stage.config), console
                )  # a program may complete its config
                mark_done(stage, time.monotonic() - began)
    if cfg.table or cfg.grids:
        results = table(cfg, stages)
        markdown = to_markdown(results)
        storage.put_bytes(storage.join(cfg.output, f"{cfg.results}.md"), markdown.encode())
        storage.put_bytes(
            storage.join(cfg.output, f"{cfg.results}.json"), json.dumps(results, indent=1).encode()
        )
        console.print(markdown, markup=False, highlight=False, soft_wrap=True)
    console.print(f"results: {cfg.output}", markup=False, highlight=False, soft_wrap=True)


def plan(cfg: PipelineConfig) -> list[Stage]:
    """Every stage of every seed with its whole config, in the order in which they run."""
    if not cfg.stages or not cfg.seeds:
        raise ConfigError(
            "a pipeline has at least one stage and one seed; choose one with experiment=..."
        )
    for kind in cfg.overrides:
        if kind not in RUNNERS:
            raise ConfigError(f"overrides.{kind}: kinds of stages are {', '.join(RUNNERS)}")
    stages: list[Stage] = []
    for seed in cfg.seeds:
        earlier: dict[str, Stage] = {}
        for name in cfg.stages:
            folder = storage.join(cfg.output, f"seed-{seed}", name)
            try:
                earlier[name] = resolve(cfg, seed, name, folder, earlier)
            except (ValueError, HydraException, OmegaConfBaseException) as error:
                raise ConfigError(f"stage {name}: {' '.join(str(error).split())}") from error
        stages += earlier.values()
    for row in cfg.table:
        if row.stage and (row.stage not in cfg.stages or cfg.stages[row.stage].kind != "evaluate"):
            raise ConfigError(
                f"table: row {row.label!r} names {row.stage!r}, which is no stage of kind evaluate"
            )
    for grid in cfg.grids:
        for line in grid.rows:
            if not len(line.cells) == len(line.paper or line.cells) == len(grid.columns):
                raise ConfigError(
                    f"grids: {grid.title}: row {line.label!r} needs {len(grid.columns)} cells"
                )
            for cell in line.cells:
                name, colon, _ = cell.partition(":")
                if cell != NO_CELL and not (colon and name in cfg.stages):
                    raise ConfigError(
                        f"grids: {grid.title}: {cell!r} is not STAGE:NUMBER of a stage, nor {NO_CELL!r}"
                    )
    return stages


def resolve(
    cfg: PipelineConfig, seed: int, name: str, folder: str, earlier: dict[str, Stage]
) -> Stage:
    """The stage with its config as its program would have it; ValueError says what does not fit."""
    one = cfg.stages[name]
    if one.kind not in RUNNERS:
        raise ConfigError(f"kind={one.kind!r}: it is one of {', '.join(RUNNERS)}")
    fewest, most = FEWEST_AND_MOST_USED.get(one.kind, (1, 1))
    if not set(one.uses) <= earlier.keys() or not fewest <= len(one.uses) <= most:
        raise ConfigError(
            f"uses={one.uses}: a stage of kind {one.kind} uses {fewest} to {most} of {list(earlier)}"
        )
    kinds = MAY_USE.get(one.kind, ("train",))
    if any(earlier[used].kind not in kinds for used in one.uses):
        raise ConfigError(
            f"uses={one.uses}: a stage of kind {one.kind} uses stages of kind {', '.join(kinds)}"
        )
    uses = [earlier[used] for used in one.uses]
    overrides = [
        with_folders(change, earlier)
        for change in (*cfg.overrides.get(one.kind, []), *one.overrides)
    ]
    resolved: Any
    if one.kind == "train":
        fixed = {
            "name": f"{cfg.name}-{name}-{seed}",
            "run_dir": folder,
            "seed": seed,
            "data_root": cfg.data_root,
        }
        if uses:
            fixed["init.weights"] = uses[0].folder
        chosen = (
            [f"experiment={one.experiment}{cfg.variant}"] if one.experiment + cfg.variant else []
        )
        resolved = composed("train", [*chosen, *overrides], fixed, TrainConfig)
    elif one.kind == "shards":
        resolved = composed("shard", overrides, {"split": name, "output": folder}, ShardConfig)
    elif one.kind == "recognise":
        model = uses[0].folder if uses else None
        resolved = composed(
            "recognise", overrides, {"model": model, "output": folder}, RecogniseConfig
        )
    elif one.kind == "figure":
        runs = {cfg.stages[used.name].label or used.name: used.folder for used in uses}
        resolved = merged(
            FigureConfig(runs, storage.join(folder, "figure.png"), one.label), overrides
        )
    else:
        data = uses[0].config.data
        base = EvaluateConfig(
            uses[0].folder, cfg.test_data, folder, num_sources=data.num_sources, noise=data.noise
        )
        if one.kind == "labels":
            base.data = data.train
        resolved = merged(base, overrides)
    return Stage(seed, name, one.kind, folder, tuple(used.folder for used in uses), resolved)


def with_folders(change: str, earlier: dict[str, Stage]) -> str:
    """A key=value change with the folder of an earlier stage for each @stage."""

    def folder(found: re.Match[str]) -> str:
        if found[1] not in earlier:
            raise ConfigError(
                f"{change}: {found[0]} is none of the earlier stages {', '.join(earlier)}"
            )
        return earlier[found[1]].folder

    return re.sub(r"(?<!\w)@(\w+)", folder, change)


def merged(base: Any, overrides: Sequence[str]) -> Any:
    """A dataclass with key=value changes."""
    changed = OmegaConf.merge(OmegaConf.structured(base), OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(changed, DictConfig)
    return config.typed(changed, type(base))


def composed(name: str, overrides: Sequence[str], fixed: dict[str, Any], schema: type[_T]) -> _T:
    """A primary config with changes and fixed values."""
    with initialize_config_dir(config.config_dir(), version_base="1.3"):
        result = compose(name, overrides=list(overrides))
    for key, value in fixed.items():
        OmegaConf.update(result, key, value)
    return config.typed(result, schema)


RUNNERS: dict[str, Callable[[Any, Console], Any]] = {
    "train": training_run.run,
    "shards": write_data_set,
    "evaluate": evaluate,
    "judge": evaluate_estimator,
    "recognise": recognise,
    "labels": measure_switching,
    "figure": draw,
}


def data_sets(stage: Stage) -> list[str]:
    """Where the data sets are that the stage reads."""
    if isinstance(stage.config, TrainConfig):
        data = stage.config.data
        return [data.train, data.validation, *(one.url for one in data.extra)]
    if isinstance(stage.config, ShardConfig):
        return [stage.config.corpus["data"]] if "data" in stage.config.corpus else []
    return [stage.config.data] if isinstance(stage.config, EvaluateConfig) else []


def num_cpus(stage: Stage) -> int:
    """How many CPUs of a Ray started here the stage would take."""
    if isinstance(stage.config, TrainConfig):
        return math.ceil(
            config.worker_range(stage.config.cluster)[1] * stage.config.cluster.cpus_per_worker
        )
    return int(getattr(stage.config, "num_workers", 0))


def address(stages: Sequence[Stage]) -> str | None:
    """The Ray cluster that the training stages name; ConfigError where they name several, for it is joined once."""
    named = {
        stage.config.cluster.address for stage in stages if isinstance(stage.config, TrainConfig)
    }
    if len(named) > 1:
        raise ConfigError(
            f"the stages name several clusters: cluster.address is {', '.join(sorted(map(str, named)))}"
        )
    return next(iter(named), None)


def digest(values: dict[str, Any]) -> str:
    """sha256 of a config."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_done(stage: Stage) -> bool:
    """Whether the stage finished in an earlier start.

    Raises:
        ConfigError: it did, with another config.
    """
    if stage.kind == "figure" or not storage.exists(storage.join(stage.folder, MARKER)):
        return False  # a figure takes no time, and may have got another run to show
    marker, wanted = read_marker(stage), dataclasses.asdict(stage.config)
    had = dataclasses.asdict(
        config.from_yaml(json.dumps(marker["config"]), type(stage.config))
    )  # with younger keys
    changed = (
        []
        if marker["sha256"] == digest(wanted)
        else config.differences(had, wanted, FREE_TO_CHANGE)
    )
    if changed:
        raise ConfigError(
            f"stage {stage.name} has finished with another config: {'; '.join(changed)}. Choose another output, or "
            f"remove {stage.folder} and the folders of the stages that use it to run them afresh"
        )
    return True


def mark_done(stage: Stage, seconds: float) -> None:
    """Put the marker, after everything else of the stage."""
    values = dataclasses.asdict(stage.config)
    marker = {
        "stage": stage.name,
        "kind": stage.kind,
        "seed": stage.seed,
        "seconds": round(seconds, 1),
    }
    marker |= {"sha256": digest(values), "config": values}
    storage.put_bytes(storage.join(stage.folder, MARKER), json.dumps(marker, indent=1).encode())
