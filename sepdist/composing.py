"""Compose a program's config from configs/, the user's own folders and KEY=VALUE words, with Hydra.

Only drivers need this: workers read the config that theirs has frozen.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sepdist.config import ConfigError, config_dir

# Of the user: folders laid out like configs/, or Hydra's file:// and pkg://. They come before it.
user_folders: list[str] = []


def compose(name: str, words: Sequence[str], schema: type) -> DictConfig:
    """Compose configs/<name>.yaml, or `schema` where there is none, with the changes KEY=VALUE.

    ConfigError if a word, key or option is unknown or a value has the wrong type.
    """
    import hydra
    from hydra.errors import ConfigCompositionException

    literals, overrides = divide(words, schema)
    with hydra_open(name, schema):
        try:
            composed = hydra.compose(name, overrides=overrides)
        except ConfigCompositionException as error:
            found = re.match(r"Could not override '((.+)\.[^.]+?)'", str(error))
            others = [one for one in overrides if not found or not one.startswith(f"{found[1]}=")]
            if not found or len(others) == len(overrides):
                raise
            known = OmegaConf.select(hydra.compose(name, overrides=others), found[2]) or ()
            names = [str(one) for one in known if one != "_target_"]
            message = f"no key {found[1]!r}: there are {', '.join(names)}"
            raise ConfigError(message) from error
        set_literals(composed, literals)
    return composed


@contextlib.contextmanager
def hydra_open(name: str, schema: type) -> Iterator[None]:
    """Let Hydra find the primary config `name`; its errors become ConfigErrors of one line."""
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    _let_hydra_see_user_folders()
    has_file = Path(config_dir(), f"{name}.yaml").exists()
    ConfigStore.instance().store(f"{name}_schema" if has_file else name, schema)
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        lines = [str(one).split("full_key")[0] for one in (error, error.__cause__) if one]
        shown = " ".join(lines).split("Config search path")[0]
        raise ConfigError(" ".join(shown.split())) from error


@functools.cache
def _let_hydra_see_user_folders() -> None:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class UserFolders(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in reversed(user_folders):
                search_path.prepend("user", folder)

    Plugins.instance().register(UserFolders)


def divide(
    words: Sequence[str], schema: type, sweeps: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Divide KEY=VALUE words into literal values and overrides in Hydra's grammar.

    A field that is a string takes its value as it stands: Hydra's grammar has no plain paths with
    =, a comma or parentheses, and takes model=... for a file of configs/model/. Other values that
    the grammar cannot read, such as paths in a corpus, are quoted. ConfigError if there is no such
    key, or without `sweeps` for a list of values to sweep over.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import OverrideParseException

    literals: dict[str, str] = {}
    overrides: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        is_text = key_type(schema, key.lstrip("+~")) in (str, str | None)
        parsed = None
        with contextlib.suppress(OverrideParseException):
            [parsed] = OverridesParser.create().parse_overrides([word])
        is_sweep = parsed is not None and parsed.is_sweep_override()
        literals.pop(key, None)  # the last word of a key counts, for all sweepers too
        overrides = [one for one in overrides if not one.startswith(f"{key}=")]
        if is_text and key[0] not in "+~" and not (sweeps and is_sweep):
            literals[key] = value
            continue
        if is_sweep and not sweeps and "/" not in value:
            raise ConfigError(f"{word}: a sweep over several values is for sepdist train -m")
        if not parsed or (is_sweep and not sweeps):
            word = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
        overrides.append(word)
    return literals, overrides


def key_type(schema: Any, key: str, within: str = "") -> Any:
    """The type of a nested field, None below a group; ConfigError if there is no such field."""
    types = {one.name: one.type for one in dataclasses.fields(schema)}
    head, _, rest = key.partition(".")
    if head not in types:
        if not within:  # a group, which the command has checked, or a key of hydra's
            return None
        raise ConfigError(f"no key {within + key!r}: there are {', '.join(types)}")
    found = types[head]
    if rest and dataclasses.is_dataclass(found):
        return key_type(found, rest, f"{within}{head}.")
    if rest and get_origin(found) is dict:
        value, (name, _, inner) = get_args(found)[1], rest.partition(".")
        if dataclasses.is_dataclass(value) and inner:
            return key_type(value, inner, f"{within}{head}.{name}.")
        return value if value is str else None
    return None if rest else found


def set_literals(composed: DictConfig, literals: Mapping[str, str]) -> None:
    """Set string fields; in a mapping of strings all that follows the first dot is one key."""
    with open_dict(composed):
        for key, text in literals.items():
            value = text[1:-1] if re.fullmatch(r"'[^']*'|\"[^\"]*\"", text) else text
            head, _, name = key.partition(".")
            node = composed[head] if name else None
            if isinstance(node, DictConfig) and node._metadata.element_type is str:
                node[name] = value
            else:
                OmegaConf.update(composed, key, None if text == "null" else value)


def keys(name: str, schema: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every field of a program: dotted name, default, and the comment in the schema's source."""
    source, file = inspect.getsource(schema), Path(config_dir(), f"{name}.yaml")
    given = yaml.safe_load(file.read_text()) if file.exists() and not prefix else {}
    for field in dataclasses.fields(schema):
        kind: Any = field.type
        if dataclasses.is_dataclass(kind):
            yield from keys(name, kind, f"{prefix}{field.name}.")
            continue
        found = re.search(rf"^    {field.name}:.*?(?=^    \w+:|\Z)", source, re.M | re.S)
        comment = " ".join(re.findall(r"# (.*)", found[0])) if found else ""
        default = given.get(field.name, getattr(schema(), field.name))
        shown = default if isinstance(default, str) else json.dumps(default)
        yield f"{prefix}{field.name}", shown, comment


def groups(name: str) -> dict[str, str | None]:
    """The config groups of configs/<name>.yaml, each with the option that it has by default."""
    file = Path(config_dir(), f"{name}.yaml")
    defaults = yaml.safe_load(file.read_text())["defaults"] if file.exists() else []
    pairs = [pair for one in defaults if isinstance(one, dict) for pair in one.items()]
    return {group: option for group, option in pairs if group.isidentifier()}


def files(name: str, group: str) -> dict[str, Path]:
    """The options of a group for the program `name`, the user's too, with their files."""
    found: dict[str, Path] = {}
    for url in [config_dir(), *reversed(user_folders)]:
        folder = Path(url.removeprefix("file://"), group)
        for file in folder.rglob("*.yaml"):
            # The parts of an option lie in a folder beside it: scale/mini/ of scale/mini.yaml.
            is_part = file.parent.with_suffix(".yaml").exists()
            has_stages = bool(re.search(rb"^stages:", file.read_bytes(), re.M))
            if not is_part and (group != "experiment" or has_stages == (name == "pipeline")):
                found[str(file.relative_to(folder).with_suffix(""))] = file
    return dict(sorted(found.items()))
