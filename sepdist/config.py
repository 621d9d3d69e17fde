"""The typed config of every program.

Hydra composes configs/ in the driver. The fixed parts become dataclasses, the pluggable ones plain
dicts, whose schema is the constructor that `_target_` names (sepdist/slots.py). Nothing below the
programs sees an OmegaConf object; every worker reads the config that the driver froze at
run_dir/config.yaml.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sepdist import storage

_T = TypeVar("_T")
SHAPES = ("plateau", "cosine", "linear", "constant")  # of the learning rate after its warm-up
NEWEST_ORDER = 2  # version of the data order (sepdist/data/order.py)
MOST = 2**31 - 1  # of a number, where its field names no other range
SEEDS = (0, 2**63 - 1)
MANY = 65_536  # workers, threads, samples of a batch
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class ConfigError(ValueError):
    """The configuration names something that does not exist, is not allowed or does not fit."""


def number(default: Any, least: float, most: float = MOST) -> Any:
    """A field for a number from `least` to `most`; one without this takes 0 to MOST."""
    return field(default=default, metadata={"range": (least, most)})


@dataclass
class ExtraConfig:
    """An additional training set, whose batches alternate with those of `data.train`."""

    path_arguments: ClassVar = ("url",)
    name: str = MISSING  # Batch.data_set of its batches
    url: str = MISSING
    num_sources: int = number(1, 1, 16)
    noise: bool = True
    weight: float | None = number(None, 1e-6, 1e6)  # per batch of data.train; null = one pass
    speeds: list[float] = field(default_factory=list)  # as in `data`


@dataclass
class DataConfig:
    """Training and validation data, and how they are cut into steps (sepdist/data/)."""

    path_arguments: ClassVar = ("train", "validation", "cache_dir")
    train: str = MISSING  # folder or s3:// prefix that holds a manifest.json
    validation: str = MISSING  # the same, to validate on
    num_sources: int = number(2, 1, 16)  # of s1, s2, ..., in the mixture and targets
    noise: bool = False  # whether the mixture includes each sample's noise
    mixing: Any = None  # a configs/mixing node that mixes data.train anew; null = as stored
    speeds: list[float] = field(default_factory=list)  # each source at one of them; [] = as stored
    extra: list[ExtraConfig] = field(default_factory=list)  # for objectives with several tasks
    interleave: str = "drawn"  # order of the data sets' batches: drawn (permuted) | even
    order: int | None = number(None, 1, NEWEST_ORDER)  # version; null = the run's, 2 if new
    crop_seconds: float = number(3.0, 0.001, 3600)  # length of a training example
    num_virtual_shards: int = number(4, 1, MANY)  # V: fixes the order of data; 1 to V workers
    micro_batch: int = number(2, 1, MANY)  # samples per virtual shard; a step has V times as many
    cache_dir: str = "~/.cache/sepdist"  # verified local copies of shards
    cache_gigabytes: float = 50.0  # most that they take
    num_threads: int = number(1, 1, 1024)  # decoding threads per worker
    prefetch_steps: int = number(4, 0, MANY)  # steps whose batches are read ahead
    max_damaged: int = 0  # damaged samples to replace by the next position before the run stops


@dataclass
class ValidationConfig:
    """Validation on full-length mixtures, the same ones in the same order each time."""

    num_mixtures: int = 200  # the first ones of the validation set; 0 = all
    every_steps: int = number(500, 1)  # steps from one validation to the next
    num_listening: int = 3  # mixtures whose audio and spectrograms go to TensorBoard
    max_seconds: float = number(30.0, 0.001)  # longer mixtures are cut, to bound memory


@dataclass
class ScheduleConfig:
    """The learning rate: warm-up and hold, then a fall."""

    warmup_steps: int = 0  # in which the learning rate rises linearly
    hold_steps: int = 0  # first ones, with the warm-up, in which nothing lowers the rate
    shape: str = field(default=SHAPES[0], metadata={"choices": SHAPES})
    # then: plateau (by the next two keys), cosine or linear (to 0 at max_steps) or constant
    factor: float = number(0.5, 0, 1)  # of the learning rate at a plateau
    patience: int = 5  # validations without improvement; one more multiplies the rate by `factor`
    min_lr: float = 1e-6  # no rate is lower
    decay_steps: int = 0  # the last steps before max_steps, in which the rate falls linearly to 0


@dataclass
class InitConfig:
    """Hand-off: initial weights from an earlier stage, and what to initialise anew."""

    path_arguments: ClassVar = ("weights",)
    weights: str | None = None  # a run_dir or an export folder; null = from scratch
    submodule: str | None = None  # take only the parameters below this prefix; None = all
    reinit: list[str] = field(default_factory=list)  # prefixes of parameters to initialise anew


@dataclass
class TrainingConfig:
    """Length of training, logging, checkpoints and skipped steps."""

    max_steps: int = number(MISSING, 1)  # length of the run
    log_every: int = number(20, 1)  # steps
    checkpoint_every: int | str = number(500, 1)  # steps; auto: by what one costs and the next key
    worker_mtbf_hours: float = number(50_000.0, 0.01)  # mean time between failures of one worker
    ema_decay: float = number(0.0, 0, 0.999999)  # of an average of the weights to export; 0 = none
    keep_last: int = number(2, 1)  # newest checkpoints to keep
    keep_best: bool = True  # keep the one with the best validation score too
    keep_every: int = 0  # keep every checkpoint whose step is a multiple of this; 0 = none
    storage_patience_seconds: float = 600.0  # for which storage may be away, or a disk full
    early_stop_patience: int = 30  # validations without improvement; 0 = never
    spike_factor: float = 100.0  # skip norms above this many medians; 0 = only if not finite
    max_skipped: int = 20  # skipped steps in a row at which the run ends with an error


@dataclass
class ClusterConfig:
    """Ray Train: the number of workers, their resources, and how faults are noticed."""

    num_workers: Any = 1  # a number, or [min, max] for an elastic run
    use_gpu: bool = False  # one GPU per worker
    cpus_per_worker: float = number(1.0, 0, MANY)  # logical CPUs that Ray reserves
    threads_per_worker: int = number(1, 1, 1024)  # of torch
    address: str | None = None  # null: the cluster of the Ray job, else a local Ray
    max_failures: int = number(5, -1)  # without a new checkpoint, preemptions apart; -1 = any
    elastic_check_seconds: float = number(60.0, 0.1)  # between two looks for more workers
    preemption_check_steps: int = number(10, 1)  # steps between looks for a notice
    stop_seconds: float = number(100.0, 0.1)  # after a signal, to end the step and commit it
    collective_timeout_seconds: int = number(600, 1)  # after which an all-reduce fails
    hang_seconds: float = 30.0  # a worker without progress ends itself; more if slow; 0 = never
    startup_seconds: float = number(600.0, 1)  # for the first step, validations and checkpoints
    verbose: bool = False  # show the output of a local Ray's processes


@dataclass
class TrainConfig:
    """`configs/train.yaml`: one training stage."""

    path_arguments: ClassVar = ("run_dir",)
    name: str = MISSING  # the run's identity; never derived from the time
    run_dir: str = MISSING  # folder or s3:// prefix of its logs and checkpoints
    seed: int = number(0, *SEEDS)  # of all that is random in the run
    data_root: str = "data"  # folder or s3:// prefix below which experiments name their data sets
    sample_rate: int = number(8000, 1, 384_000)  # Hz
    num_speakers: int = number(2, 1, 64)  # outputs of the model
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
    plugins: list[str] = field(default_factory=list)  # packages with models, corpora, ... to use


@dataclass
class ShardConfig:
    """`configs/shard.yaml`: sepdist shard and stages of kind `shards`."""

    path_arguments: ClassVar = ("output",)
    corpus: Any = None
    split: str = ""  # of the corpus, such as train
    output: str = MISSING  # folder or s3:// prefix of the data set to write, verify or describe
    samples_per_shard: int = number(200, 1)  # mixtures or utterances in a file
    num_workers: int = number(0, -1, MANY)  # Ray tasks; 0 = in this process, -1 = all CPUs
    limit: int = 0  # use only the first records; 0 = all
    subset: list[float] = field(default_factory=lambda: [0.0, 1.0])  # fractions of a fixed shuffle
    mixtures_only: bool = False  # store mixtures without their sources, as unlabelled data
    on_error: str = "fail"  # at records that cannot be stored; "skip" leaves them out
    gpus_per_worker: float = number(0.0, 0, 1024)  # for corpus=separated with corpus.device=cuda
    plugins: list[str] = field(default_factory=list)  # packages with models, corpora, ... to use


@dataclass
class EvaluateConfig:
    """`configs/evaluate.yaml`: sepdist evaluate."""

    path_arguments: ClassVar = ("model", "data", "output", "cache_dir", "estimates")
    model: str = MISSING  # a run_dir (its best checkpoint is taken) or an export folder
    data: str = MISSING  # folder or s3:// prefix of the test set; evaluate: [a,b] for several
    output: str = MISSING  # folder or s3:// prefix for results.json, utterances.csv, ...
    num_sources: int = number(2, 1, 16)  # of a mixture, s1, s2, ...
    noise: bool = False  # whether the mixture includes each sample's noise
    estimates: str | None = None  # evaluate: folder of another system's audio, not a model's
    metrics: list[str] = field(default_factory="si_snri sdri".split)
    # evaluate: of sdri, sir, sar, stoi, estoi, pesq; SI-SNR always
    num_mixtures: int = 0  # score only the first mixtures; 0 = all
    max_seconds: float = 0.0  # longer mixtures are cut to this; 0 = never
    num_listening: int = 3  # mixtures to save as audio and spectrograms
    max_unscored: int = number(0, -1)  # utterances without a score at exit status 0; -1 = any
    num_workers: int = number(1, 0, MANY)  # Ray tasks; 0 = in this process
    use_gpu: bool = False  # one GPU per worker
    cache_dir: str = "~/.cache/sepdist"  # verified local copies of shards
    cache_gigabytes: float = 50.0  # most that they take
    plugins: list[str] = field(default_factory=list)  # packages with models, corpora, ... to use


@dataclass
class RecogniseConfig:
    """`configs/recognise.yaml`: sepdist recognise."""

    path_arguments: ClassVar = ("model", "output")
    model: str | None = None  # a run_dir or an export folder; null = recognise the mixtures alone
    corpus: Any = MISSING  # yields mixtures with transcripts: libricss, overlap
    conditions: list[str] = field(default_factory="OV10 OV20 OV30 OV40".split)  # splits
    recogniser: Any = MISSING
    output: str = MISSING  # folder or s3:// prefix for results.json and utterances.csv
    limit: int = 0  # only the first utterances of each condition; 0 = all
    max_unscored: int = number(0, -1)  # utterances not recognised at exit status 0; -1 = any
    num_workers: int = number(1, 0, MANY)  # Ray tasks; 0 = in this process
    use_gpu: bool = False  # one GPU per worker, for separator and recogniser
    plugins: list[str] = field(default_factory=list)  # packages with models, corpora, ... to use


@dataclass
class CompareConfig:
    """The keys of sepdist compare."""

    path_arguments: ClassVar = ("a", "b", "output")
    a: str = MISSING  # output folder of an evaluation, or [a,b] of runs with different seeds
    b: str = MISSING  # that of another on the same data, or as many
    output: str | None = None  # folder or s3:// prefix for comparison.json


@dataclass
class AuditConfig:
    """The keys of sepdist audit."""

    path_arguments: ClassVar = ("run_dir",)
    run_dir: str = MISSING  # a folder or s3:// prefix
    json: bool = False  # print one JSON object, no table


def worker_range(cluster: ClusterConfig) -> tuple[int, int]:
    """Return the least and the greatest number of workers that `cluster.num_workers` allows."""
    value = cluster.num_workers
    pair = value if isinstance(value, list | tuple) else [value, value]
    if [type(one) for one in pair] != [int, int] or not 1 <= pair[0] <= pair[1] <= MANY:
        takes = f"a number of workers from 1 up to {MANY}, or [min, max] with 1 <= min <= max"
        raise ConfigError(f"cluster.num_workers={value!r}: give {takes}")
    return pair[0], pair[1]


def config_dir() -> str:
    """Return the folder of the YAML files: next to the package or, in a wheel, inside it."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "train.yaml").exists():
            return str(folder)
    raise ConfigError(f"{package}: no configs/ next to it or in it; the installation is incomplete")


def typed(composed: DictConfig, schema: type[_T]) -> _T:
    """Return a composed config as dataclasses; ConfigError names a mandatory value left at ???."""
    if composed.get("estimates") and OmegaConf.is_missing(composed, "model"):
        composed.model = composed.estimates  # what is scored instead of a model's
    values = leaves(OmegaConf.to_container(composed))  # others may refer to missing ones
    if missing := sorted(name for name, value in values if value == MISSING):
        names = ", ".join(missing)
        raise ConfigError(f"no value given for {names} (pass {missing[0]}=... on the command line)")
    try:
        result = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(result, schema), type(result)
    check(result)
    return result


def one_line(error: BaseException) -> str:
    """Return an error of Hydra or OmegaConf in one line, after the key that it is about."""
    text, _, rest = str(error).partition("full_key:")
    key = rest.partition("\n")[0].strip()
    text = " ".join(re.split("Config search path|See https:|To append to", text)[0].split())
    return text if key in text else f"{key}: {text}"


def check(value: Any, key: str = "", owner: dataclasses.Field | None = None) -> None:
    """Raise ConfigError for a number out of range, an empty text or an impossible folder within.

    `owner` is the field that holds `value`. Numbers of parts are only required to be finite.
    """
    if dataclasses.is_dataclass(value):
        if isinstance(value, ClusterConfig):
            worker_range(value)
        for one in dataclasses.fields(value):
            name, inner = f"{key}.{one.name}".lstrip("."), getattr(value, one.name)
            check(inner, name, one)
            if inner and one.name in getattr(value, "path_arguments", ()):
                check(inner, name)  # a path, as those of parts may be
                if any(storage.absolute(one) == "/" for one in listed(inner)):
                    raise ConfigError(f"{name}={inner}: it is the root of all files; give a folder")
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for index, inner in items:
            check(inner, f"{key}.{index}", None if isinstance(value, Mapping) else owner)
    elif isinstance(value, str):
        if owner and value not in owner.metadata.get("choices", [value]):
            raise ConfigError(f"{key}={value}: give {allowed(owner)}")
        if owner and owner.default != "" and owner.type in (str, str | None) and not value.strip():
            raise ConfigError(f"{key}={value}: it is empty")
        if owner and int in get_args(owner.type) and value != "auto":
            raise ConfigError(f"{key}={value}: give {allowed(owner)}")
        if not owner and value.startswith("~") and os.path.expanduser(value) == value:
            raise ConfigError(f"{key}={value}: there is no such home; ./~ begins a plain name")
    elif isinstance(value, int | float):
        least, most = number_range(owner)
        if not (least <= value <= most and math.isfinite(value)):
            takes = allowed(owner) if owner and least > -math.inf else "a finite number"
            raise ConfigError(f"{key}={value}: give {takes}")


def listed(text: str) -> list[str]:
    """The items of a text [a,b], or the text alone."""
    found = re.fullmatch(r"\[(.+)\]", text)
    return [one.strip(" '\"") for one in found[1].split(",")] if found else [text]


def number_range(owner: dataclasses.Field | None) -> tuple[float, float]:
    """Return the least and the greatest number that a field takes."""
    if owner is None or not {int, float} & {owner.type, *get_args(owner.type)}:
        return -math.inf, math.inf
    return owner.metadata.get("range", (0, MOST))


def allowed(owner: dataclasses.Field) -> str:
    """What a field of a config takes, such as "a whole number from 1 to 9"."""
    if choices := owner.metadata.get("choices"):
        return f"one of {', '.join(choices)}"
    types: tuple[Any, ...] = (owner.type, *get_args(owner.type))
    text = next((text for kind, text in KINDS.items() if kind in types), "a mapping {a: b}")
    if text.endswith("number"):
        text += " from {} to {}".format(*number_range(owner))
    text = f"a list [a,b], each {text}" if get_origin(owner.type) is list else text
    text += ", or auto" if {int, str} <= {*types} else ""
    return text + (", or null" if type(None) in types else "")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value with its dotted name."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def to_yaml(config: Any) -> str:
    """Return a dataclass as YAML that `from_yaml` reads back."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_PlainDumper, sort_keys=False)


_PLAIN = {f"tag:yaml.org,2002:{one}" for one in ("str", "int", "float", "bool", "null", "seq")}
_PLAIN.add("tag:yaml.org,2002:map")


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags, timestamps and aliases: a few aliases can stand for terabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        if node is not None and node.tag not in _PLAIN:
            raise yaml.MarkedYAMLError(problem=f"a {node.tag}", problem_mark=node.start_mark)
        return node


class _PlainDumper(yaml.SafeDumper):
    """Quotes the texts that _PlainLoader would take for numbers."""


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")  # 1e-5, in YAML 1.1 a string
for _kind in (_PlainLoader, _PlainDumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def parse_plain(text: str | bytes) -> Any:
    """A stranger's YAML; ConfigError if it is damaged or has tags, timestamps or aliases."""
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, LookupError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"not plain YAML: {reason}") from error


def from_yaml(text: str, schema: type[_T]) -> _T:
    """Read what `to_yaml` wrote; ConfigError for a ${reference}: it could read the environment."""
    given = parse_plain(text)
    if not isinstance(given, dict) or "${" in str(given):
        raise ConfigError("a frozen config is a mapping of values, without any ${reference}")
    if schema is TrainConfig and isinstance(given.get("data"), dict):
        given["data"].setdefault("order", 1)  # a run from before there was another
    merged = OmegaConf.merge(OmegaConf.structured(schema), given)
    assert isinstance(merged, DictConfig)
    return typed(merged, schema)


def differences(before: Any, after: Any, free: tuple[str, ...] = (), name: str = "") -> list[str]:
    """List the leaves in which two nested dictionaries differ, as "split was dev, is test".

    Names that begin with one of `free` are not compared.
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        inner = [
            differences(before.get(key), after.get(key), free, f"{name}.{key}".lstrip("."))
            for key in sorted(before.keys() | after.keys())
        ]
        return [line for lines in inner for line in lines]
    return [] if before == after or name.startswith(free) else [f"{name} was {before}, is {after}"]


def load_frozen(url: str) -> TrainConfig:
    """Read a run's frozen config; `run_dir` is where it lies. ConfigError if of another version."""
    try:
        cfg = from_yaml(storage.read_bytes(url).decode(), TrainConfig)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{url} was written by another version of sepdist ({reason}): the run cannot go on; "
            "start another run_dir, with init.weights set to this one to keep its weights"
        ) from error
    cfg.run_dir = storage.absolute(url.rpartition("/")[0] or ".")  # wherever the run was moved
    return cfg
