"""Build the parts of a config: what may stand in each slot, and the plug-ins that a user names.

A part is a mapping with `_target_`, the name of a class, and arguments of its constructor. Each
slot takes classes of one kind from one package of sepdist, or from a plug-in: a package that the
person at the keyboard names, by `plugins=[...]`, by SEPDIST_PLUGINS or by installing it with an
entry point in the group `sepdist.plugins`. A frozen config or a model cannot name one.
"""

import dataclasses
import functools
import importlib.util
import inspect
import os
import pkgutil
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from sepdist import storage
from sepdist.config import ConfigError

ENVIRONMENT = "SEPDIST_PLUGINS"  # package names, separated by commas
ENTRY_POINTS = "sepdist.plugins"
MAX_NAME = 200  # characters of a _target_; importing thousands of dots overflows the stack


@dataclass(frozen=True)
class Slot:
    """A place in a config: its packages, and the base class or the method that a class has."""

    packages: tuple[str, ...]
    base: str = ""
    method: str = ""
    function: str = ""  # one function that may stand here too

    def takes(self, found: Any) -> bool:
        """Whether `found` is a class of this slot's kind."""
        bases = inspect.getmro(found) if isinstance(found, type) else ()
        if self.base:
            return self.base in {f"{one.__module__}.{one.__qualname__}" for one in bases}
        return any(self.method in vars(one) for one in bases)


MODULE = "torch.nn.modules.module.Module"
TRAINED = "sepdist.inference.export.load_estimator"
SLOTS = {  # by the key under which a part stands in a config
    "model": Slot(("sepdist.models",), base=MODULE),
    "objective": Slot(("sepdist.objectives",), method="__call__"),
    "estimator": Slot(("sepdist.models",), base=MODULE, function=TRAINED),
    "engine": Slot(("sepdist.training.engine",), method="step"),
    "optim": Slot(("torch.optim",), base="torch.optim.optimizer.Optimizer"),
    "mixing": Slot(("sepdist.data.dynamic",), method="item"),
    "corpus": Slot(("sepdist.corpora", "sepdist.inference.separated"), method="records"),
    "recogniser": Slot(("sepdist.recognisers",), method="__call__"),
}
_named: list[str] = []  # plug-ins that this process was told to use


def use_plugins(names: Sequence[str]) -> None:
    """Import the packages that the user named; from now on their classes may stand in slots.

    A package that is not installed is looked for in the working directory.
    """
    for name in names:
        if not all(part.isidentifier() for part in str(name).split(".")):
            raise ConfigError(f"plugins: {name!r} is not the name of a Python package")
        try:
            if not importlib.util.find_spec(name.partition(".")[0]) and os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
            importlib.import_module(name)
        except ImportError as error:
            todo = "install it, or start in the folder that holds it, on every machine of the run"
            raise ConfigError(f"plugins: {name} cannot be imported ({error}); {todo}") from error
        if name not in _named:
            _named.append(name)


def named_plugins() -> list[str]:
    """The plug-ins that were named in this process, by the environment or by entry points."""
    listed = [name.strip() for name in os.environ.get(ENVIRONMENT, "").split(",")]
    return list(dict.fromkeys([*_named, *filter(None, listed), *_installed_plugins()]))


@functools.cache
def _installed_plugins() -> list[str]:
    return [one.value.partition(":")[0] for one in entry_points(group=ENTRY_POINTS)]


def resolve(slot: str, target: Any) -> Any:
    """The class that `target` names; ConfigError unless it is of the kind that the slot takes.

    The module that defines the class must belong to the same packages as the name, so that no
    alias leads elsewhere. A module of another package is not even imported.
    """
    kind = SLOTS[slot]
    if target == kind.function != "":
        return pkgutil.resolve_name(target)
    ours = _below(target, kind.packages)
    plugins = [] if ours else [one for one in named_plugins() if _below(target, (one,))]
    if not ours and not plugins:
        raise ConfigError(_refusal(slot, target))
    module_name, _, attribute = target.rpartition(".")
    use_plugins(plugins)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{slot}: _target_ {target!r} does not exist: {error}") from error
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if not kind.takes(found) or not _below(home, kind.packages if ours else plugins):
        raise ConfigError(_refusal(slot, target))
    return found


def _below(target: Any, packages: Sequence[str]) -> bool:
    """Whether `target` is a dotted name, of a sane length, below one of the packages."""
    if not isinstance(target, str) or len(target) > MAX_NAME:
        return False
    if not all(part.isidentifier() for part in target.split(".")):
        return False
    return target.startswith(tuple(f"{package}." for package in packages))


def _refusal(slot: str, target: Any) -> str:
    kind = SLOTS[slot]
    has = f"a subclass of {kind.base}" if kind.base else f"a class with {kind.method}"
    text = f"{slot}: _target_ {target!r:.{MAX_NAME}} is not allowed: it must be {has} in "
    text += f"{' or '.join(kind.packages)}, or in a plug-in that you have named"
    root = str(target).partition(".")[0]
    if _below(target, (root,)) and root not in ("sepdist", "torch", *sys.stdlib_module_names):
        text += f" (if you trust the package {root}: plugins=[{root}] or {ENVIRONMENT}={root})"
    return text


def build(slot: str, node: Any, **runtime: Any) -> Any:
    """Call the class that `node` names with the node's other keys and `runtime`.

    A class names arguments that are parts themselves, with their slots, in its attribute `parts`.
    """
    target, arguments = bind(slot, node, **runtime)
    try:
        return target(**arguments | runtime)
    except (TypeError, RuntimeError, ArithmeticError, MemoryError) as error:  # of wrong values
        reason = " ".join(str(error).split("\n")[:1]) or type(error).__name__
        raise ConfigError(f"{slot}: {node['_target_']} cannot be built: {reason}") from error


def bind(slot: str, node: Any, **runtime: Any) -> tuple[Any, dict[str, Any]]:
    """The class that `node` names and its arguments, checked by name and type, its parts built."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{slot}: {node!r} is no part: it has no _target_")
    target = resolve(slot, node["_target_"])
    parts = getattr(target, "parts", {})
    arguments = {}
    for name, value in node.items():
        if name in parts and isinstance(value, Mapping):
            arguments[name] = build(parts[name], value)
        elif name != "_target_":
            _refuse_parts(f"{slot}.{name}", value)
            arguments[name] = value
    signature = inspect.signature(target)
    try:
        signature.bind(**arguments | runtime)
    except TypeError as error:
        known = ", ".join(signature.parameters)
        raise ConfigError(f"{node['_target_']}: {error}; it takes {known}") from error
    for name in arguments.keys() & signature.parameters.keys() - parts.keys() - runtime.keys():
        hint = signature.parameters[name].annotation
        if not fits(arguments[name], hint):
            wanted = getattr(hint, "__name__", hint) if isinstance(hint, type) else hint
            raise ConfigError(f"{slot}.{name}={arguments[name]!r}: it must be of type {wanted}")
    return target, arguments


def _refuse_parts(name: str, value: Any) -> None:
    """Raise ConfigError if there is a `_target_` in a value that is not a part."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            raise ConfigError(f"{name}: no part may stand here, but _target_ names one")
        for key, inner in value.items():
            _refuse_parts(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_parts(name, inner)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config is of an annotated type; types that no config holds fit."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    if kind in (int, float):
        return isinstance(value, kind | int) and not isinstance(value, bool)
    if not isinstance(kind, type) or not issubclass(kind, Mapping | Sequence):
        return True
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if not isinstance(value, list | tuple):
        return False
    if kind is tuple and inner and inner[-1] is not ...:
        return len(value) == len(inner) and all(map(fits, value, inner))
    return all(fits(one, inner[0]) for one in value) if inner else True


def make_paths_absolute(part: Any, slot: str = "") -> None:
    """Make the paths in a config absolute, in place: workers have another working directory.

    A config class lists its path fields in `path_arguments`, and so does the class of a part.
    """
    fields: dict[Any, Any] = {}
    owner, inner = part, {name: name for name in SLOTS}
    if isinstance(part, list):
        fields = dict(enumerate(part))
    elif dataclasses.is_dataclass(part):
        fields = vars(part)
    elif isinstance(part, dict) and slot and "_target_" in part:
        fields, owner = part, resolve(slot, part["_target_"])
        inner = getattr(owner, "parts", {})
    for name in getattr(owner, "path_arguments", ()):
        if fields.get(name):
            fields[name] = storage.absolute(fields[name])
    for name, value in fields.items():
        make_paths_absolute(value, inner.get(name, ""))
