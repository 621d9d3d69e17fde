"""A slot takes classes of its kind alone, and a stranger's files run nothing and read nothing.

The attacks are those of a downloaded model or run: a model.yaml, a lineage.json or a frozen
config.yaml that names functions of sepdist, of Python or of torch, with arguments that would leave
a mark in the folder `home`.
"""

import importlib
import inspect
import itertools
import json
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import sepdist
from sepdist import config, slots
from sepdist.config import ConfigError, TrainConfig
from sepdist.inference.export import load_export, load_separator
from sepdist.training import loop
from sepdist.training.checkpoint import CheckpointError
from tests.support.exports import MODEL, write_export
from tests.support.runs import frozen, program

PUT = {"_target_": "sepdist.storage.put_bytes", "url": "~/mark", "data": "x"}


def public_names() -> list[str]:
    """The dotted names of everything callable that a module of sepdist defines or imports."""
    found = []
    for module in pkgutil.walk_packages(sepdist.__path__, "sepdist."):
        if not module.name.endswith("__main__"):
            contents = vars(importlib.import_module(module.name))
            found += [f"{module.name}.{name}" for name in contents if callable(contents[name])]
    assert len(found) > 1000
    return found


NAMES = public_names()


def kind_of(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("slot", slots.SLOTS)
def test_of_all_that_sepdist_contains_a_slot_takes_the_classes_of_its_package_alone(
    slot: str,
) -> None:
    places = {"estimator": "models", "mixing": "data.dynamic", "recogniser": "recognisers"}
    places |= {"engine": "training.engine", "corpus": "corpora"}
    own = f"sepdist.{places.get(slot, f'{slot}s')}."
    allowed = set()
    for target in NAMES:
        try:
            slots.resolve(slot, target)
        except ConfigError as error:
            assert f"{slot}: _target_ {target!r} is not allowed" in str(error)
        else:
            allowed.add(target)
    exceptions = {
        "corpus": {"sepdist.inference.separated.Separated"},  # of the package inference
        "estimator": {"sepdist.inference.export.load_estimator"},  # a function
    }
    for target in allowed - exceptions.get(slot, set()):
        found = kind_of(target)
        assert f"{found.__module__}.".startswith(own)
        assert isinstance(found, type), f"{target} is a function"
        assert issubclass(found, nn.Module) == (slot in ("model", "estimator"))
    assert exceptions.get(slot, set()) <= allowed
    assert len(allowed) >= (0 if slot == "optim" else 1)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "sepdist.storage.os.system",
        "builtins.eval",
        "torch.hub.load",
        "torch.load",
        "torch.optim.Adam",
        "torch.nn.Linear",
        "sepdistx.evil",
        "sepdist",
        "sepdist.models",
        "sepdist.models.conv_tasnet",
        "sepdist.models.conv_tasnet.ConvTasNet.forward",
        "sepdist.models.conv_tasnet.nn.Linear",
        "sepdist.models..conv_tasnet.ConvTasNet",
        "sepdist.models.nosuch.Model",
        "sepdist.models.frames.cut_frames",
        "sepdist.objectives.separation.Separation",
        "",
        None,
        7,
        ["sepdist.models.conv_tasnet.ConvTasNet"],
        {"_target_": "sepdist.models.conv_tasnet.ConvTasNet"},
    ],
)
def test_the_model_slot_takes_no_other_name(target: Any) -> None:
    with pytest.raises(ConfigError, match="model: _target_"):
        slots.build("model", {"_target_": target})


@pytest.mark.parametrize("value", ["text", [], None, {"num_speakers": 2}])
def test_a_part_is_a_mapping_with_a_target(value: Any) -> None:
    with pytest.raises(ConfigError, match="has no _target_"):
        slots.build("model", value)


@pytest.mark.parametrize("slot", ["objective", "optim", "corpus", "recogniser", "engine", "mixing"])
def test_no_slot_but_the_models_takes_a_model(slot: str) -> None:
    with pytest.raises(ConfigError, match=f"{slot}: _target_"):
        slots.build(slot, MODEL)


CLASSES = {
    "model": MODEL["_target_"],
    "estimator": MODEL["_target_"],
    "objective": "sepdist.objectives.separation.Separation",
    "engine": "sepdist.training.engine.DeepSpeedEngine",
    "optim": "torch.optim.Adam",
    "mixing": "sepdist.data.dynamic.DynamicMixing",
    "corpus": "sepdist.corpora.demo.DemoCorpus",
    "recogniser": "sepdist.recognisers.transformers_ctc.TransformersCtc",
}


@pytest.mark.parametrize("slot", slots.SLOTS)
def test_nothing_that_sepdist_contains_runs_as_the_value_of_an_argument(slot: str) -> None:
    for target in NAMES:
        inner = {"_target_": target, "url": "~/mark", "data": "x"}
        for value in (inner, [{"a": inner}]):
            with pytest.raises(ConfigError, match=rf"{slot}\.x(\.a)?: no part may stand here"):
                slots.build(slot, {"_target_": CLASSES[slot], "x": value})


@pytest.mark.parametrize(
    ("slot", "node"),
    [
        ("model", MODEL | {"kernel_size": [PUT]}),
        ("model", MODEL | {"kernel_size": {"a": {"b": [[PUT]]}}}),
        ("optim", {"_target_": "torch.optim.Adam", "params": PUT}),
        ("optim", {"_target_": "torch.optim.Adam", "betas": [PUT, PUT]}),
        ("corpus", {"_target_": "sepdist.corpora.demo.DemoCorpus", "seed": PUT}),
        ("objective", {"_target_": "sepdist.objectives.separation.Separation", "x": PUT}),
        (
            "objective",
            {"_target_": "sepdist.objectives.semisupervised.SemiSupervised", "estimator": PUT},
        ),
        (
            "objective",
            {
                "_target_": "sepdist.objectives.semisupervised.SemiSupervised",
                "estimator": {"_target_": "sepdist.inference.export.load_estimator", "url": PUT},
            },
        ),
        ("model", {"_target_": "sepdist.models.context.ContextModel", "separator": PUT}),
        (
            "model",
            {
                "_target_": "sepdist.models.context.ContextModel",
                "separator": MODEL | {"num_hidden": PUT},
            },
        ),
    ],
)
def test_a_nested_part_is_refused_where_no_part_belongs_and_checked_where_one_does(
    slot: str, node: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="_target_"):
        slots.build(slot, node)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typo": 1}, r"typo.*it takes .*num_speakers"),
        ({"num_filters": "64"}, r"model\.num_filters='64': it must be of type int"),
        ({"num_filters": 64.5}, r"num_filters=64\.5"),
        ({"num_filters": True}, "num_filters=True"),
        ({"num_filters": None}, "num_filters=None"),
        ({"compile": "yes"}, r"compile='yes': it must be of type bool"),
        ({"num_filters": [64]}, r"num_filters=\[64\]"),
    ],
)
def test_a_wrong_argument_is_named_with_what_the_class_takes(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        slots.build("model", MODEL | change)


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, float, True),
        (1.0, int, False),
        (False, int, False),
        (None, int | None, True),
        ("a", int | None, False),
        ([0.9, 0.99], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        (["a", 1], list[str], False),
        ("ab", list[str], False),
        ({"a": 1}, dict[str, int], True),
        (3, dict[str, int], False),
        (object(), nn.Module, True),
        (object(), Any, True),
    ],
)
def test_values_are_compared_with_annotations(value: Any, hint: Any, good: bool) -> None:
    assert slots.fits(value, hint) == good


# What a stranger may write into a model.yaml.

SYSTEM = "!!python/object/apply:os.system ['touch ~/mark']"
SSQP = {"_target_": "sepdist.models.ssqp.SSQPNet"}
SANDGLASSET = {"_target_": "sepdist.models.sandglasset.Sandglasset"}
ATTACKS: dict[str, Any] = {
    "a put nested": {"model": MODEL | {"num_filters": PUT}},
    "a put with binary data": yaml.safe_dump(
        {"model": MODEL | {"num_filters": PUT | {"data": b"x"}}}
    ),
    "a put as the model": {"model": PUT},
    "a put as the rate": {"model": MODEL, "sample_rate": PUT},
    "a put beside the model": {"model": MODEL, "num_loudest": PUT},
    "put_file": {"model": MODEL | {"stride": PUT | {"_target_": "sepdist.storage.put_file"}}},
    "remove": {"model": MODEL | {"stride": {"_target_": "sepdist.storage.remove", "url": "~"}}},
    "os.system": {"model": {"_target_": "os.system", "command": "touch ~/mark"}},
    "subprocess.run": {"model": {"_target_": "subprocess.run", "args": ["touch", "~/mark"]}},
    "a python tag": f"model: {SYSTEM}\nsample_rate: 8000\n",
    "a python tag nested": f"model: {{_target_: x, a: [{SYSTEM}]}}\nsample_rate: 8000\n",
    "a python name": "model: !!python/name:os.system ''\nsample_rate: 8000\n",
    "an alias bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\nmodel: {_target_: x}\n",
    "a merge key": "a: &a {_target_: x}\nmodel: {<<: *a}\nsample_rate: 8000\n",
    "a deep nest": "model: " + "[" * 100_000,
    "a number without digits": "model: {_target_: x, a: !!int ''}\nsample_rate: 8000\n",
    "a boolean in words": "model: {_target_: x, a: !!bool maybe}\nsample_rate: 8000\n",
    "a time of many digits": f"model: {{_target_: x, a: {'59:' * 9000}59.5}}\nsample_rate: 8000\n",
    "a deep module": {"model": {"_target_": "sepdist.models." + "x." * 9000}},
    "a large text": "model: {_target_: x}\n#" + "x" * 1_000_000,
    "a date": "model: {_target_: x, a: 2020-01-01}\nsample_rate: 8000\n",
    "nothing": "",
    "a list": "- model\n",
    "a text": "model",
    "not text": b"\xff\xfe\x00",
    "no sample rate": "model: {_target_: x.y}\n",
    "a rate in words": {"model": MODEL, "sample_rate": "8000"},
    "a rate of 0": {"model": MODEL, "sample_rate": 0},
    "a boolean rate": {"model": MODEL, "sample_rate": True},
    "an infinite rate": {"model": MODEL, "sample_rate": float("inf")},
    "a rate of 10 GHz": {"model": MODEL, "sample_rate": 10**10},
    "no target": {"model": {"num_speakers": 2}},
    "a wrong type": {"model": MODEL | {"num_filters": "many"}},
    "a wrong name": {"model": MODEL | {"num_filterz": 4}},
    "a zero size": {"model": MODEL | {"stride": 0}},
    "a negative size": {"model": MODEL | {"num_filters": -4}},
    "a huge size": {"model": MODEL | {"num_filters": 10**15}},
    "a large size": {"model": MODEL | {"num_filters": 900_000, "num_hidden": 900_000}},
    "a large number of blocks": {"model": MODEL | {"num_repeats": 1_000_000}},
    "a long stride": {"model": MODEL | {"stride": 10**9, "kernel_size": 10**9}},
    "a distant tap": {"model": MODEL | {"num_blocks": 29}},
    "many taps": {"model": MODEL | {"num_taps": 999_999}},
    "frames upon frames": {"model": MODEL | {"stride": 1, "kernel_size": 999_999}},
    "a coarse block": {"model": SANDGLASSET | {"num_blocks": 1_000_000}},
    "a long chunk": {"model": {"_target_": "sepdist.models.dptnet.DPTNet", "chunk_size": 999_998}},
    "many outputs": {"model": MODEL, "num_extra_outputs": 10**9},
    "an objective": {"model": {"_target_": "sepdist.objectives.separation.Separation"}},
    "an optimizer": {"model": {"_target_": "torch.optim.Adam"}},
    "a corpus": {"model": {"_target_": "sepdist.corpora.demo.DemoCorpus"}},
    "another model's weights": {
        "model": {"_target_": "sepdist.inference.export.load_estimator", "url": "~"}
    },
    "weights from a folder": {"model": SSQP | {"pretrained": "~"}},
    "weights from the hub": {"model": SSQP | {"pretrained": "someone/something"}},
    "code from the hub": {
        "model": SSQP
        | {"encoder": {"model_type": "wav2vec2", "_attn_implementation": "someone/kernel"}}
    },
    "another encoder": {"model": SSQP | {"encoder": {"model_type": "llama"}}},
    "a method": {"model": SSQP | {"encoder": {"model_type": "wav2vec2", "to_dict": 1}}},
    "a plug-in": {"model": {"_target_": "antigravity.Model"}},
}


def stranger(folder: Path, card: Any) -> Path:
    """An export with sound weights and the model.yaml `card`."""
    write_export(folder)
    if isinstance(card, dict):
        card = yaml.safe_dump({"sample_rate": 8000} | card)
    data = card if isinstance(card, bytes) else card.encode()
    (folder / "model.yaml").write_bytes(data)
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_model_is_refused_in_one_line_and_leaves_no_mark(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = stranger(tmp_path / "model", ATTACKS[name]), tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_separator(str(folder))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert any(word in message for word in ("model", "pretrained", "encoder", "Conv")), message
    assert os.listdir(home) == []


def test_an_encoder_cannot_choose_code_from_the_hub_in_a_config_either() -> None:
    node = ATTACKS["code from the hub"]["model"]
    with pytest.raises(ValueError, match="no _attn_implementation"):
        slots.build("model", node)


def test_the_command_refuses_a_strangers_model_with_one_line(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "model", ATTACKS["a put nested"])
    words = ("separate", "--model", str(folder), "--output", str(tmp_path / "out"), "a.wav")
    shown = program("-m", "sepdist", *words, expect=1, HOME=str(tmp_path))
    assert shown.startswith("error: model.num_filters: no part may stand here")
    assert len(shown.splitlines()) == 1 and not (tmp_path / "mark").exists()


def test_a_lineage_is_shown_and_never_acted_on(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "model", {"model": MODEL})
    lineage = {"parent": PUT, "estimator": PUT | {"url": str(tmp_path / "mark")}, "run": "${x}"}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    assert load_export(str(folder)).lineage == lineage
    for text in ("[]", "3", '{"a": ', "[" * 100_000, "\xff"):
        (folder / "lineage.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"lineage\.json"):
            load_export(str(folder))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "url", ["https://host/model", "file:///etc/passwd", "ftp://host/x", "/etc/passwd", "~", ""]
)
def test_the_url_of_an_estimator_names_a_folder_or_a_prefix_alone(url: str) -> None:
    with pytest.raises((ValueError, OSError)):
        slots.build("objective", guided(url))


@pytest.mark.parametrize("name", ["a put nested", "os.system", "code from the hub", "a plug-in"])
def test_a_strangers_model_is_refused_as_an_estimator_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = stranger(tmp_path / "model", ATTACKS[name])
    with pytest.raises((CheckpointError, ConfigError)):
        slots.build("objective", guided(str(folder)))
    assert not (tmp_path / "mark").exists()


def guided(url: str) -> dict[str, Any]:
    """A semi-supervised objective guided by the estimator at `url`."""
    estimator = {"_target_": "sepdist.inference.export.load_estimator", "url": url}
    target = "sepdist.objectives.semisupervised.SemiSupervised"
    node: dict[str, Any] = {"_target_": target, "estimator": estimator}
    return node | {"epoch_samples": 10, "labelled_share": 0.5}


# A run_dir of a stranger: its frozen config is read by `loop`, by `plot` and by resuming.

SLOTS_OF_A_RUN = ["model", "objective", "engine", "optim", "data.mixing"]


@pytest.mark.parametrize("key", [*SLOTS_OF_A_RUN, "objective.estimator", "model.num_filters"])
def test_a_frozen_config_runs_no_function(
    key: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(frozen(tiny_data, tmp_path / "run", "training.max_steps=1"))
    values = yaml.safe_load(path.read_text())
    inner = values
    *outer, last = key.split(".")
    for name in outer:
        inner = inner[name]
    inner[last] = PUT | {"url": str(tmp_path / "mark"), "lr": 0.1}
    path.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["loop", str(path)])
    with pytest.raises(ConfigError, match="_target_"):
        loop.main()
    assert not (tmp_path / "mark").exists()


BOMB = "a: &a [1, 2]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefg")
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "[" * 100_000, "- a", "3", "a: &a [*a]", f"name: {SYSTEM}", "seed: !!int ''", "a: \0"],
)
def test_a_frozen_config_is_plain_yaml(text: str) -> None:
    with pytest.raises(ConfigError, match=r"plain YAML|a mapping") as caught:
        config.from_yaml(text, TrainConfig)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["${oc.env:SECRET}", "a${oc.env:SECRET}", '"\\x24{oc.env:SECRET}"']
)
def test_a_frozen_config_reads_no_environment(
    value: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "key")
    path = Path(frozen(tiny_data, tmp_path / "run", "training.max_steps=1"))
    text = path.read_text().replace("name: demo-finetune", f"name: {value}")
    assert "SECRET" in text
    with pytest.raises(ConfigError, match="reference"):
        config.from_yaml(text, TrainConfig)


# Plug-ins.

PLUGIN = '''"""A separator of somebody else."""

import torch
from torch import nn


class Halves(nn.Module):
    """Gives each speaker a share of the mixture."""

    min_length = 1

    def __init__(self, num_speakers: int = 2) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.full((num_speakers,), 1 / num_speakers))

    def forward(self, mixture_BT):
        return self.shares[None, :, None] * mixture_BT[:, None]


def function(**_):
    raise AssertionError
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the package `somebody`, the working directory of this test."""
    monkeypatch.setattr(slots, "_named", [])
    slots._installed_plugins.cache_clear()
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [one for one in sys.modules if one.split(".")[0] == "somebody"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "work" / "somebody"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os\nopen('imported', 'w').close()\n")
    (package / "models.py").write_text(PLUGIN)
    monkeypatch.chdir(package.parent)
    importlib.invalidate_caches()
    return package.parent


HALVES = {"_target_": "somebody.models.Halves"}


def test_a_plug_in_is_not_even_imported_until_somebody_names_it(plugin: Path) -> None:
    with pytest.raises(ConfigError, match=r"plugins=\[somebody\] or SEPDIST_PLUGINS=somebody"):
        slots.build("model", HALVES)
    assert not (plugin / "imported").exists()
    slots.use_plugins(["somebody"])
    assert slots.build("model", HALVES | {"num_speakers": 3}).shares.shape == (3,)
    for target in ("somebody.models.function", "somebody.models.nn.Linear", "somebody.os.system"):
        with pytest.raises(ConfigError, match=r"not allowed|not exist"):
            slots.build("model", {"_target_": target})
    with pytest.raises(ConfigError, match="corpus: _target_"):
        slots.build("corpus", HALVES)


def test_the_environment_and_an_entry_point_name_plug_ins(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPDIST_PLUGINS", " other, somebody ,")
    assert slots.named_plugins()[:2] == ["other", "somebody"]
    assert isinstance(slots.build("model", HALVES), nn.Module)
    monkeypatch.delenv("SEPDIST_PLUGINS")
    monkeypatch.setattr(slots, "_named", [])
    slots._installed_plugins.cache_clear()
    info = plugin / "somebody-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sepdist.plugins]\nanything = somebody\n")
    assert "somebody" in slots.named_plugins()
    assert isinstance(slots.build("model", HALVES), nn.Module)


@pytest.mark.parametrize("name", ["nosuch", "some body", "some/body", "", "../x", "nosuch.inner"])
def test_a_plug_in_that_cannot_be_imported_is_an_error_that_says_what_to_do(
    name: str, plugin: Path
) -> None:
    with pytest.raises(ConfigError, match="plugins: "):
        slots.use_plugins([name])


def test_an_export_of_a_plug_in_is_refused_until_the_plug_in_is_named(
    plugin: Path, tmp_path: Path
) -> None:
    folder = stranger(tmp_path / "model", {"model": HALVES | {"num_speakers": 2}})
    slots.use_plugins(["somebody"])
    save_file(slots.build("model", HALVES).state_dict(), folder / "model.safetensors")
    assert load_separator(str(folder)).model(torch.ones(1, 4)).sum() == 4
    (plugin / "imported").unlink()
    words = ("separate", "--model", str(folder), "--output", str(tmp_path / "out"), "a.wav")
    environment = {"PYTHONPATH": f"{plugin}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    shown = program("-m", "sepdist", *words, expect=1, **environment)
    assert "plugins=[somebody]" in shown and not (plugin / "imported").exists()


class Nested:
    """For the test of parts: an objective around another."""

    parts: ClassVar = {"inner": "objective"}

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def __call__(self) -> None: ...


def test_a_class_says_which_of_its_arguments_are_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPDIST_PLUGINS", "tests")
    node = {"_target_": f"{__name__}.Nested"}
    built = slots.build("objective", node | {"inner": node | {"inner": node}})
    assert isinstance(built.inner.inner, Nested) and inspect.isclass(type(built))
    with pytest.raises(ConfigError, match="objective: _target_"):
        slots.build("objective", node | {"inner": MODEL})
