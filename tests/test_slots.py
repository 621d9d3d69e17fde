"""A slot takes classes of its kind alone, of sepdist or of a plug-in that the user has named."""

import importlib
import inspect
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sepdist
from sepdist import slots
from sepdist.config import ConfigError
from sepdist.inference.export import load_separator
from tests.support.exports import MODEL, PUT, stranger
from tests.support.runs import program


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
