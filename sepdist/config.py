"""Configuration: the typed schema of the fixed parts, and `build`, which turns a `_target_` node into an object.

In: what Hydra composed from configs/ in the driver. Out: plain dataclasses (fixed parts) and plain dicts (pluggable
parts, whose constructor is their schema). Nothing below the programs ever sees an OmegaConf object, and every worker
reads the one frozen file that `freeze` wrote.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from sepdist import storage

ALLOWED_TARGETS = ("sepdist.", "torch.optim.")
_T = TypeVar("_T")


class ConfigError(ValueError):
    """The configuration names something that does not exist, is not allowed or does not fit."""


@dataclass
class ExtraConfig:
    """One more data set to train on: batches of it come between those of `data.train`, with its name on them."""

    name: str = MISSING
    url: str = MISSING
    num_sources: int = 1
    noise: bool = True
    weight: float | None = (
        None  # batches for each one of data.train; None = by its size, so that an epoch is one pass
    )


@dataclass
class DataConfig:
    """Where the samples come from and how they are cut into steps (`sepdist/data/`)."""

    train: str = MISSING  # folder or s3:// prefix that holds a manifest.json
    validation: str = MISSING
    num_sources: int = 2  # how many of s1, s2, ... enter the mixture and are targets
    noise: bool = False  # whether the noise of each sample is part of the mixture
    mixing: Any = None  # a node that makes new mixtures of data.train's first sources (configs/mixing); None = as stored
    extra: list[ExtraConfig] = field(
        default_factory=list
    )  # more data sets, for objectives of several tasks
    interleave: str = (
        "drawn"  # how their batches come between those of data.train: drawn (permuted) | even
    )
    crop_seconds: float = 3.0
    num_virtual_shards: int = (
        4  # V: fixes the data order and the reduction tree; world sizes 1..V can run it
    )
    micro_batch: int = (
        2  # samples per virtual shard and step; global batch = num_virtual_shards * micro_batch
    )
    cache_dir: str = "~/.cache/sepdist"  # verified local copies of shards
    cache_gigabytes: float = 50.0
    num_threads: int = 1  # decoding threads per worker
    prefetch_steps: int = 4
    max_damaged: int = (
        0  # damaged samples that may be replaced by the next position before the run stops
    )


@dataclass
class ValidationConfig:
    """Full-length utterances, always the same ones in the same order."""

    num_mixtures: int = 200  # the first so many of the validation set; 0 = all
    every_steps: int = 500
    num_listening: int = 3  # mixtures whose audio and spectrograms go to TensorBoard
    max_seconds: float = 30.0  # longer mixtures are cut, so that one never exhausts memory


@dataclass
class ScheduleConfig:
    """Warm-up, then halving on a plateau of the validation SI-SNR, as the papers train."""

    warmup_steps: int = 0
    factor: float = 0.5
    patience: int = 5  # validations without improvement before the rate is multiplied by `factor`
    min_lr: float = 1e-6
    decay_steps: int = 0  # the last steps before max_steps, in which the rate falls linearly to 0


@dataclass
class InitConfig:
    """Hand-off: weights of an earlier stage and the parameters that start afresh."""

    weights: str | None = (
        None  # a run_dir, an export folder or a .safetensors file; None = from scratch
    )
    part: str | None = None  # take only the weights below this prefix, without it; None = all
    reinit: list[str] = field(
        default_factory=list
    )  # parameter-name prefixes that keep their fresh values


@dataclass
class TrainingConfig:
    """The loop."""

    max_steps: int = MISSING
    log_every: int = 20
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: bool = True
    keep_every: int = 0  # steps; checkpoints at multiples of it are kept for good
    max_failed_checkpoints: int = 3  # in a row, that storage would not take, before the run ends
    early_stop_patience: int = 30  # validations without improvement; 0 = never
    spike_factor: float = (
        100.0  # skip a step whose gradient norm is so many times the median; 0 = only if not finite
    )
    max_skipped: int = 20  # skipped steps in a row that send the run back to its newest checkpoint, to go on without them
    max_rollbacks: int = 3


@dataclass
class ClusterConfig:
    """Ray Train: how many workers and what each gets."""

    num_workers: Any = 1  # a number, or [min, max]: as many of these as the cluster has room for, see `worker_range`
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    threads_per_worker: int = 1
    address: str | None = None  # None: the cluster of the job it runs in, else a local Ray
    max_failures: int = 5  # in a row, without a new checkpoint between them; preemptions do not count; -1 = no limit
    elastic_check_seconds: float = (
        60.0  # with [min, max]: how often a running group looks for room for more workers
    )
    preemption_check_steps: int = (
        10  # steps between two looks for a notice that a node is about to be taken away
    )
    collective_timeout_seconds: int = 600
    hang_seconds: float = 30.0  # a worker without progress for so long ends itself; more where steps are slow; 0 = never
    startup_seconds: float = (
        600.0  # the same for the first step and the first validation, which compile
    )
    verbose: bool = False  # show what Ray's processes print, where a local Ray is started


@dataclass
class TrainConfig:
    """`configs/train.yaml`: one training stage."""

    name: str = MISSING  # derives the run's identity; never from the time
    run_dir: str = MISSING
    seed: int = 0
    data_root: str = (
        "data"  # folder or s3:// prefix of the data sets, where an experiment names them by it
    )
    sample_rate: int = 8000
    num_speakers: int = 2
    model: Any = MISSING
    objective: Any = MISSING
    engine: Any = MISSING
    optim: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    init: InitConfig = field(default_factory=InitConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass
class StageConfig:
    """One stage of a pipeline; its folder is output/seed-<seed>/<its name>."""

    kind: str = "train"  # or shards, evaluate, judge, recognise, labels, figure
    experiment: str = ""  # train: a file of configs/experiment
    label: str = ""  # its name in a figure
    uses: list[str] = field(
        default_factory=list
    )  # earlier stages: initial weights, the model to score, what to draw
    overrides: list[str] = field(
        default_factory=list
    )  # key=value of its program; the value @stage is a stage's folder


@dataclass
class RowConfig:
    """One row of a pipeline's table."""

    label: str = MISSING
    stage: str = ""  # the evaluation; none where the paper quotes a number and nothing is run
    paper: list[float] = field(default_factory=list)  # SI-SNRi and SDRi in dB


@dataclass
class GridRowConfig:
    """One row of a grid: what it measures for each column."""

    label: str = MISSING
    cells: list[str] = field(
        default_factory=list
    )  # stage:a.b is the number a.b in the results.json of that stage; "-"
    paper: list[Any] = field(
        default_factory=list
    )  # the same as the paper has it; null where it has none


@dataclass
class GridConfig:
    """One more table of a pipeline, of one measure."""

    title: str = MISSING
    columns: list[str] = field(default_factory=list)
    rows: list[GridRowConfig] = field(default_factory=list)
    digits: int = 2


@dataclass
class PipelineConfig:
    """`configs/pipeline.yaml`: python -m sepdist pipeline."""

    name: str = MISSING
    title: str = ""
    output: str = MISSING  # folder or s3:// prefix
    data_root: str = "data"  # folder or s3:// prefix of the data sets that the experiments name
    test_data: str = ""  # what evaluations score, where their overrides name nothing else
    vars: dict[str, Any] = field(
        default_factory=dict
    )  # what stages of this experiment name as ${vars.x}
    results: str = (
        "table"  # the name of the files with the tables, for experiments that share an output
    )
    variant: str = ""  # ends the name of every stage's experiment: _mini
    seeds: list[int] = field(default_factory=lambda: [0])
    stages: dict[str, StageConfig] = field(default_factory=dict)  # in the order in which they run
    overrides: dict[str, list[str]] = field(
        default_factory=dict
    )  # by kind, for all its stages, before their own
    table: list[RowConfig] = field(default_factory=list)
    grids: list[GridConfig] = field(default_factory=list)


@dataclass
class FigureConfig:
    """What sepdist/plot.py draws."""

    runs: dict[str, str] = field(default_factory=dict)  # label -> run_dir
    output: str = MISSING  # the PNG file, local or s3://
    title: str = ""
    kind: str = "figure2"  # or gap: predicted beside true SI-SNR of semi-supervised runs


@dataclass
class ShardConfig:
    """`configs/shard.yaml`: tools/shard_data.py and stages of kind `shards`."""

    corpus: Any = MISSING
    split: str = MISSING
    output: str = MISSING  # folder or s3:// prefix of the one data set to write, verify or describe
    samples_per_shard: int = 200
    num_workers: int = (
        0  # Ray tasks at once; 0 = in this process, -1 = as many as the cluster has CPUs
    )
    limit: int = 0  # only the first so many records; 0 = all
    part: list[float] = field(
        default_factory=lambda: [0.0, 1.0]
    )  # of them, shuffled always alike: two shares of 0..1
    mixtures_only: bool = (
        False  # store the mixture alone, as of recordings whose sources nobody knows
    )
    gpus_per_worker: float = 0.0  # for corpus=separated with corpus.device=cuda


@dataclass
class EvaluateConfig:
    """`configs/evaluate.yaml`: python -m sepdist evaluate."""

    model: str = MISSING  # a run_dir (its best checkpoint is taken) or an export folder
    data: str = MISSING  # folder or s3:// prefix of the test set
    output: str = MISSING  # folder or s3:// prefix for results.json, utterances.csv, histogram.png, listening/
    num_sources: int = 2
    noise: bool = False
    num_mixtures: int = 0  # the first so many; 0 = all
    max_seconds: float = 0.0  # longer mixtures are cut to this; 0 = never
    num_listening: int = 3  # mixtures whose audio and spectrograms are put out too
    num_workers: int = 1  # Ray tasks; 0 = in this process
    use_gpu: bool = False  # one GPU per worker
    cache_dir: str = "~/.cache/sepdist"
    cache_gigabytes: float = 50.0


@dataclass
class RecogniseConfig:
    """`configs/recognise.yaml`: python -m sepdist recognise."""

    model: str | None = (
        None  # a run_dir (its best checkpoint is taken) or an export folder; None = mixtures alone
    )
    corpus: Any = MISSING  # gives mixtures with transcripts: libricss, overlap
    conditions: list[str] = field(
        default_factory=lambda: ["OV10", "OV20", "OV30", "OV40"]
    )  # splits of the corpus
    recogniser: Any = MISSING
    output: str = MISSING  # folder or s3:// prefix for results.json and utterances.csv
    limit: int = 0  # only the first so many utterances of each condition; 0 = all
    num_workers: int = 1  # Ray tasks; 0 = in this process
    use_gpu: bool = False  # one GPU per worker, for separator and recogniser


def worker_range(cluster: ClusterConfig) -> tuple[int, int]:
    """The least and the greatest number of workers that `cluster.num_workers` allows; equal where it is one number."""
    value = cluster.num_workers
    pair = value if isinstance(value, list | tuple) else [value, value]
    if (
        len(pair) != 2
        or any(type(number) is not int for number in pair)
        or not 1 <= pair[0] <= pair[1]
    ):
        raise ConfigError(
            f"cluster.num_workers={value!r}: give a number of workers from 1 up, or [min, max] with 1 <= min <= max"
        )
    return pair[0], pair[1]


def register_schemas() -> None:
    """Give Hydra the schemas; the primary configs name them first in their defaults."""
    store = ConfigStore.instance()
    for name, node in (
        ("train_schema", TrainConfig),
        ("shard_schema", ShardConfig),
        ("evaluate_schema", EvaluateConfig),
        ("recognise_schema", RecogniseConfig),
        ("pipeline_schema", PipelineConfig),
    ):
        store.store(name=name, node=node)


def register_evaluate() -> None:
    """Give Hydra the config of the scoring programs.

    Hydra must not look into configs/ itself for them: there it takes model=... and data=... for choices in the groups
    model/ and data/, and refuses a path.
    """
    ConfigStore.instance().store("evaluate", OmegaConf.load(Path(config_dir(), "evaluate.yaml")))


def config_dir() -> str:
    """The absolute folder of the shipped YAML: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "train.yaml").exists():
            return str(folder)
    raise ConfigError(f"no configs/ beside or inside {package}: the installation is incomplete")


def typed(composed: DictConfig, schema: type[_T]) -> _T:
    """The composed config as real dataclasses; a mandatory value left at ??? is an error that names it."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(
            f"no value given for {', '.join(missing)} (pass {missing[0]}=... on the command line)"
        )
    result = OmegaConf.to_object(composed)
    if not isinstance(result, schema):
        raise TypeError(f"expected a {schema.__name__}, got {type(result).__name__}")
    return result


def to_yaml(config: Any) -> str:
    """A dataclass as the YAML text that `from_yaml` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_yaml(text: str, schema: type[_T]) -> _T:
    """Read what `to_yaml` wrote, against the schema."""
    merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(text))
    assert isinstance(merged, DictConfig)
    return typed(merged, schema)


def differences(before: Any, after: Any, free: tuple[str, ...] = (), name: str = "") -> list[str]:
    """The leaves in which two nested dictionaries differ, as "split was dev, is test"; not those named `free`..."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        inner = [
            differences(before.get(key), after.get(key), free, f"{name}.{key}".lstrip("."))
            for key in sorted(before.keys() | after.keys())
        ]
        return [line for lines in inner for line in lines]
    return [] if before == after or name.startswith(free) else [f"{name} was {before}, is {after}"]


def load_frozen(url: str) -> TrainConfig:
    """The frozen config of a run, from a folder or s3://."""
    return from_yaml(storage.read_bytes(url).decode(), TrainConfig)


def _allowed(name: str) -> bool:
    return name.startswith(ALLOWED_TARGETS) or any(
        name + "." == prefix for prefix in ALLOWED_TARGETS
    )


def resolve(target: str) -> Any:
    """The callable that `_target_` names, if it is defined where targets are allowed to live.

    The name and the place of definition are both checked, so an alias reached through an allowed module is refused.
    """
    refusal = f"_target_ {target!r} is not allowed: targets live under {', '.join(ALLOWED_TARGETS)}"
    if not target.startswith(ALLOWED_TARGETS):
        raise ConfigError(refusal)
    module_name, _, attribute = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"_target_ {target!r} does not exist: {error}") from error
    if not callable(found) or not _allowed(getattr(found, "__module__", "") or ""):
        raise ConfigError(refusal)
    return found


def build(node: Mapping[str, Any], **runtime: Any) -> Any:
    """Call the node's `_target_` with its other keys and `runtime`; nested `_target_` nodes are built first."""
    if "_target_" not in node:
        raise ConfigError(f"cannot build {dict(node)!r}: it has no _target_")
    target = resolve(str(node["_target_"]))
    arguments = {
        key: _build_nested(value) for key, value in node.items() if key != "_target_"
    } | runtime
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(target).parameters)
        raise ConfigError(f"{node['_target_']}: {error}; it takes {known}") from error
    return target(**arguments)


def _build_nested(value: Any) -> Any:
    if isinstance(value, Mapping):
        return (
            build(value)
            if "_target_" in value
            else {key: _build_nested(item) for key, item in value.items()}
        )
    if isinstance(value, list | tuple):
        return [_build_nested(item) for item in value]
    return value
