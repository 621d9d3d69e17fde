"""KEY=VALUE words that cannot be: numbers out of range, empty places, grammar; and odd paths."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sepdist import composing, config, storage
from sepdist.cli import compose
from sepdist.config import AuditConfig, ConfigError, EvaluateConfig, ShardConfig, TrainConfig
from sepdist.papers.schema import FigureConfig, PipelineConfig, TableConfig

TRAIN = ["name=n", "data.train=t", "data.validation=v", "training.max_steps=1"]
EVALUATE = ["model=m", "data=d", "output=o"]
SHARD = ["corpus=librispeech", "corpus.root=r", "split=test", "output=o"]
RECOGNISE = ["corpus=overlap", "corpus.root=s", "output=o"]
PROGRAMS: dict[str, tuple[Any, list[str]]] = {
    "train": (TrainConfig, TRAIN),
    "evaluate": (EvaluateConfig, EVALUATE),
    "shard": (ShardConfig, SHARD),
    "recognise": (config.RecogniseConfig, RECOGNISE),
    "pipeline": (PipelineConfig, ["name=n"]),
    "plot": (FigureConfig, ["output=o"]),
    "audit": (AuditConfig, ["run_dir=r"]),
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    def read(program: str, *words: str) -> Any:
        schema, needed = PROGRAMS[program]
        monkeypatch.setattr(sys, "argv", ["sepdist verb", *needed, *words])
        return compose.read_config(program, schema, "")

    yield read
    composing.user_folders.clear()


def refusal(read: Callable[..., Any], *words: str) -> str:
    with pytest.raises(ValueError) as caught:
        read(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nested(schema: Any, key: str, value: Any) -> Any:
    """A config whose other fields are as good as they need to be for `config.check`."""
    head, _, rest = key.partition(".")
    cfg = schema()
    setattr(cfg, head, value if not rest else nested(type(getattr(cfg, head)), rest, value))
    for field in dataclasses.fields(cfg):
        if field.name != head and getattr(cfg, field.name) == config.MISSING:
            setattr(cfg, field.name, 1 if field.type is int else "x")
    return cfg


# Bounds worked out from what each number counts; outside the second and third it has no meaning.
RANGES = [
    (TrainConfig, "seed", 0, 2**63 - 1),
    (TrainConfig, "sample_rate", 1, 384_000),
    (TrainConfig, "num_speakers", 1, 64),
    (TrainConfig, "data.micro_batch", 1, 65_536),
    (TrainConfig, "data.num_virtual_shards", 1, 65_536),
    (TrainConfig, "data.num_sources", 1, 16),
    (TrainConfig, "data.crop_seconds", 0.001, 3600),
    (TrainConfig, "data.num_threads", 1, 1024),
    (TrainConfig, "data.prefetch_steps", 0, 65_536),
    (TrainConfig, "data.cache_gigabytes", 0, 2**31 - 1),
    (TrainConfig, "data.max_damaged", 0, 2**31 - 1),
    (TrainConfig, "validation.num_mixtures", 0, 2**31 - 1),
    (TrainConfig, "validation.every_steps", 1, 2**31 - 1),
    (TrainConfig, "validation.max_seconds", 0.001, 2**31 - 1),
    (TrainConfig, "schedule.factor", 0, 1),
    (TrainConfig, "training.max_steps", 1, 2**31 - 1),
    (TrainConfig, "training.log_every", 1, 2**31 - 1),
    (TrainConfig, "training.checkpoint_every", 1, 2**31 - 1),
    (TrainConfig, "training.keep_last", 1, 2**31 - 1),
    (TrainConfig, "training.keep_every", 0, 2**31 - 1),
    (TrainConfig, "cluster.num_workers", 1, 65_536),
    (TrainConfig, "cluster.cpus_per_worker", 0, 65_536),
    (TrainConfig, "cluster.threads_per_worker", 1, 1024),
    (TrainConfig, "cluster.max_failures", -1, 2**31 - 1),
    (TrainConfig, "cluster.preemption_check_steps", 1, 2**31 - 1),
    (TrainConfig, "cluster.stop_seconds", 0.1, 2**31 - 1),
    (ShardConfig, "samples_per_shard", 1, 2**31 - 1),
    (ShardConfig, "num_workers", -1, 65_536),
    (ShardConfig, "limit", 0, 2**31 - 1),
    (ShardConfig, "gpus_per_worker", 0, 1024),
    (EvaluateConfig, "num_workers", 0, 65_536),
    (EvaluateConfig, "max_unscored", -1, 2**31 - 1),
    (EvaluateConfig, "num_mixtures", 0, 2**31 - 1),
    (EvaluateConfig, "max_seconds", 0, 2**31 - 1),
    (config.RecogniseConfig, "limit", 0, 2**31 - 1),
    (config.RecogniseConfig, "num_workers", 0, 65_536),
    (TableConfig, "digits", 0, 17),
]


@pytest.mark.parametrize(
    ("schema", "key", "least", "most"),
    RANGES,
    ids=[f"{row[0].__name__}-{row[1]}" for row in RANGES],
)
def test_a_number_is_taken_at_its_bounds_and_refused_beyond_them(
    schema: type, key: str, least: float, most: float
) -> None:
    step = 1 if isinstance(least, int) and isinstance(most, int) else 1e-4
    for value in (least, most):
        config.check(nested(schema, key, value))
    for value in (least - step, most + step, 2**70, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ConfigError, match=f"^{key}=.*: give ") as caught:
            config.check(nested(schema, key, value))
        assert str(most) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "word", "message"),
    [
        (
            "train",
            "data.micro_batch=2147483648",
            "data.micro_batch=2147483648: give a whole number",
        ),
        ("train", "validation.num_mixtures=-1", "validation.num_mixtures=-1: give a whole number"),
        (
            "train",
            "seed=1180591620717411303424",
            "seed=1180591620717411303424: give a whole number",
        ),
        ("train", "optim.lr=nan", "optim.lr=nan: give a finite number"),
        ("train", "+optim.betas=[0.9,inf]", "optim.betas.1=inf: give a finite number"),
        ("train", "cluster.num_workers=[3,1]", "cluster.num_workers=[3, 1]: give a number of"),
        ("train", "cluster.num_workers=", "cluster.num_workers='': give a number of workers"),
        ("train", "data.extra=[{name: a, url: b, weight: 0}]", "data.extra.0.weight=0.0: give a"),
        ("evaluate", "max_seconds=1e400", "max_seconds=inf: give a number from 0 to"),
        ("evaluate", "num_mixtures=1.5", "num_mixtures=1.5: give a whole number from 0 to"),
        ("evaluate", "use_gpu=maybe", "use_gpu=maybe: give true or false"),
        ("evaluate", "plugins=json", "plugins=json: give a list [a,b], each text"),
        ("recognise", "limit=null", "limit=null: give a whole number from 0 to 2147483647"),
        ("train", "data=1", "data=1: give a mapping {a: b}"),
        ("train", "data.extra=[1]", "data.extra=[1]: give a list [a,b], each a mapping {a: b}"),
        ("shard", "samples_per_shard=0", "samples_per_shard=0: give a whole number from 1 to"),
        ("pipeline", "seeds=[0,-1]", "seeds.1=-1: give a list [a,b], each a whole number from 0"),
        ("train", "run_dir=", "run_dir=: it is empty"),
        ("evaluate", "output= ", "output= : it is empty"),
        ("train", "init.weights=", "init.weights=: it is empty"),
        ("shard", "corpus.root=", "corpus.root=: it is empty; give a value, or null"),
        ("train", "run_dir=/", "run_dir=/: it is the root of all files"),
        ("pipeline", "output=//", "output=//: it is the root of all files"),
        ("plot", "output=/a/..", "output=/a/..: it is the root of all files"),
        ("audit", "run_dir=/.", "run_dir=/.: it is the root of all files"),
        ("train", "data.train=ftp://a", "ftp://a: ftp:// is not supported"),
        ("evaluate", "output=~no_such_user/x", "output=~no_such_user/x: there is no such home"),
        ("shard", "corpus.root=~no_such_user", "corpus.root=~no_such_user: there is no such home"),
        ("train", "+unknown=1", "no key '+unknown': there are name, run_dir, "),
        ("train", "++data.unknown=1", "no key 'data.unknown': there are train, "),
        ("train", "~run_dir", "~run_dir: only a part or a key of one can be removed"),
        ("train", "~optim.nosuch", "Could not delete from config. 'optim.nosuch' does not exist."),
        ("train", "~model", "~model: it is needed; there are conv_tasnet, "),
        ("train", "model=null", "model=null: it is needed; there are conv_tasnet, "),
        ("train", "model=", "no model '': there are conv_tasnet, "),
        ("train", "model=conv tasnet", "no model 'conv tasnet': there are conv_tasnet, "),
        ("train", "cluster=nosuch", "no cluster 'nosuch': there are gpu, local"),
        ("train", "experiment=[demo/finetune,x]", "no experiment 'x': there are dang2023/ctn, "),
        ("train", "model=dprnn,dptnet", "model=dprnn,dptnet: a sweep over several values"),
        ("train", "optim.lr.x=1", "no key 'optim.lr.x': there are none below it"),
        ("train", "optim.lr=[1,2", "cannot read 'optim.lr=[1,2' from its end on"),
        ("train", "optim.lr=(1", "cannot read 'optim.lr=(1' from character 10, '(' on"),
        ("train", "data.=1", "cannot read 'data.=1' from character 5, '.' on"),
        ("train", "optim.lr=${x}", "optim.lr: Interpolation key 'x' not found"),
        ("train", "name=${run_dir}", "name: Recursive interpolation detected"),
        ("train", "run_dir=a${", "run_dir: no viable alternative at input '${'"),
        ("train", "optim.lr=${oc.env:NO_SUCH}", "optim.lr: KeyError raised while resolving "),
        ("evaluate", "output=a\nb", r"cannot read 'output=a\nb': it has a line break or a control"),
        ("train", "optim.lr=1\r", r"cannot read 'optim.lr=1\r': it has a line break or a control"),
        ("shard", "corpus.root=a\x1b[1m", r"cannot read 'corpus.root=a\x1b[1m': it has a line"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_says_what_can(
    read, program: str, word: str, message: str
) -> None:
    assert refusal(read, program, word).startswith(message)


HOSTILE = [
    "a b=c,d [1]",
    "~/x=1",
    "{a: b} c",
    "[a",
    "(a",
    'it\'s "so"',
    "größe/日本",
    "a\\b",
    "#1; $x",
    "-",
]
HOSTILE += ["\udcff", "a\u202fb", "a:b", "null.wav", "x" * 300]
TEXTS = [("train", "run_dir"), ("train", "data.train"), ("evaluate", "model"), ("plot", "runs.a b")]
TEXTS += [("shard", "corpus.root"), ("recognise", "recogniser.folder"), ("plot", "title")]
TEXTS += [("train", "++run_dir"), ("train", "+init.weights"), ("shard", "++corpus.root")]


def taken(read: Callable[..., Any], program: str, key: str, value: str) -> Any:
    cfg = read(program, f"{key}={value}")
    for name in key.lstrip("+").split("."):
        cfg = cfg[name] if isinstance(cfg, dict) else getattr(cfg, name)
    return cfg


@pytest.mark.parametrize(("program", "key"), TEXTS)
def test_a_path_or_text_stands_for_itself_unquoted(read, program: str, key: str) -> None:
    value = '~/a b=c,d [1]/{e: (f)} it\'s "g"/größe\\h\udcff'
    assert taken(read, program, key, value) == value


@pytest.mark.slow
@pytest.mark.parametrize(("program", "key"), TEXTS)
def test_each_odd_text_stands_for_itself_unquoted(read, program: str, key: str) -> None:
    assert [taken(read, program, key, value) for value in HOSTILE] == HOSTILE


def test_the_last_word_of_a_key_counts_whatever_stands_before_it(read) -> None:
    assert read("evaluate", "++output=a b", "output=c", "+output=d").output == "d"
    assert read("train", "model=dprnn", "++model=dptnet").model["_target_"].endswith("DPTNet")
    assert read("train", "optim.lr=[1", "optim.lr=0.5").optim["lr"] == 0.5


def test_null_chooses_no_part_where_none_is_needed(read) -> None:
    words = ("experiment=null", "scale=null", "mixing=null")
    assert read("train", *words) == read("train")
    assert read("train", "mixing=dynamic", "mixing=null").data == read("train").data


@pytest.mark.parametrize(
    "text", ["1e5", "-2E-3", "1.e400", "12", "0x10", "true", "null ", "~", "=", "2026-11-26"]
)
def test_a_text_that_looks_like_another_value_comes_back_from_the_frozen_config(text: str) -> None:
    cfg = EvaluateConfig(model=text, data="d", output=text)
    assert config.from_yaml(config.to_yaml(cfg), EvaluateConfig) == cfg


def test_a_frozen_config_out_of_range_is_refused_too(read) -> None:
    cfg = read("train")
    cfg.training.log_every = 0
    with pytest.raises(ConfigError, match=r"^training.log_every=0: give a whole number from 1"):
        config.from_yaml(config.to_yaml(cfg), TrainConfig)


@pytest.mark.parametrize("lr", ["-1", "abc", "[0.1]"])
def test_a_rate_that_the_optimizer_refuses_ends_a_run_before_it_starts(
    read, lr: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    from rich.console import Console

    from sepdist.training.run import freeze

    data = [f"data.train={tiny_data['train']}", f"data.validation={tiny_data['dev']}"]
    cfg = read("train", *data, f"++optim.lr={lr}", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match=r"learning rate|optim: torch.optim.Adam cannot be built"):
        freeze(cfg, Console())
    assert not storage.exists(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"broken.yaml\", line 2, column 5$"),
        ("seed: 1\nseed: 2", "found duplicate key seed in .*broken.yaml"),
        ("defaults:\n  - /model: dprnn\n", "Multiple values for model. To override"),
        ("defaults: [nosuch]", "In 'experiment/broken': Could not load 'experiment/nosuch'"),
        ("data: {traiin: 1}", "^data.traiin: In 'experiment/broken': Key 'traiin' not in"),
        ("data: {micro_batch: x}", "^data.micro_batch: In 'experiment/broken': Value 'x'"),
        ("validation: {every_steps: 0}", "^validation.every_steps=0: give a whole number from 1"),
        ("name: ${", "^name: no viable alternative at input"),
        (b"name: \xff", "is not UTF-8"),
    ],
)
def test_a_mistake_in_a_file_of_the_users_is_one_line_with_its_place(
    read, tmp_path: Path, text: str | bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    contents = text if isinstance(text, bytes) else text.encode()
    file = tmp_path / "experiment" / "broken.yaml"
    file.write_bytes(b"# @package _global_\n" + contents)
    words = [f"--config-dir={tmp_path}", "experiment=broken"]
    needed = TRAIN[1:] if b"name" in contents else TRAIN
    monkeypatch.setitem(PROGRAMS, "train", (TrainConfig, needed))
    with pytest.raises(ConfigError, match=message) as caught:
        read("train", *words)
    assert "\n" not in str(caught.value)
