"""Compose a program's config from configs/, the user's own folders and KEY=VALUE words, with Hydra.

Only drivers need this: workers read the config that theirs has frozen.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import Container, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sepdist.config import ConfigError, allowed, config_dir, one_line

# Of the user, as file://: folders laid out like configs/. They come before it.
user_folders: list[str] = []


def compose(name: str, words: Sequence[str], schema: type) -> DictConfig:
    """Compose configs/<name>.yaml, or `schema` where there is none, with the changes KEY=VALUE.

    ConfigError if a word, key or option is unknown or a value has the wrong type.
    """
    import hydra
    from hydra.errors import ConfigCompositionException

    literals, overrides, doubtful = divide(words, schema)

    def before(key: str, changed: str) -> Any:
        others = [one for one in overrides if bare(one) != changed]
        return OmegaConf.select(hydra.compose(name, overrides=others), key)

    with hydra_open(name, schema):
        for key, wrong in doubtful.items():
            if isinstance(before(key, key), int | float | Container):
                raise ConfigError(wrong)
        try:
            composed = hydra.compose(name, overrides=overrides)
        except ConfigCompositionException as error:
            if not (found := re.match(r"Could not override '((.+)\.(.+?))'", str(error))):
                raise
            known = before(found[2], found[1])
            names = [str(one) for one in known] if isinstance(known, DictConfig) else []
            if found[3] in names:  # an error within its value
                raise
            there = ", ".join(one for one in names if one != "_target_") or "none below it"
            raise ConfigError(f"no key {found[1]!r}: there are {there}") from error
        set_literals(composed, literals)
    return composed


def bare(word: str) -> str:
    """The key of KEY=VALUE without the + or ~ before it."""
    return word.partition("=")[0].lstrip("+~")


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
        raise ConfigError(_explain(error, schema)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"a YAML file of the folders of configs is not UTF-8: {error}") from error


def _explain(error: Exception, schema: type) -> str:
    """An error of Hydra's in one line; for a value of the wrong type, what its key takes."""
    _, merging, word = str(error).partition("\n")[0].rpartition("Error merging override ")
    if merging and error.__cause__ and (field := key_field(schema, bare(word))):
        return f"{word}: give {allowed(field)}"
    text = " ".join(one_line(one) for one in (error, error.__cause__) if one and str(one))
    text = re.sub(r"Error merging override |\w+ raised while composing config: ", "", text)
    no_header = re.match(r"In '(\w+)/.*': Key '\1' not in", text)
    return text + ": begin the file with the line # @package _global_" * bool(no_header)


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
) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Divide KEY=VALUE words into literal values and overrides in Hydra's grammar.

    A field that is a string takes its value as it stands: Hydra's grammar has no plain paths with
    =, a comma or parentheses, and takes model=... for a file of configs/model/. Other values that
    the grammar cannot read, such as paths in a corpus, are quoted; the third result has, by key,
    the error to raise if it takes no text. ConfigError if there is no such key.
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    literals, overrides, doubtful = dict[str, str](), list[str](), dict[str, str]()
    for word in words:
        key, _, value = word.partition("=")
        name, field = bare(word), key_field(schema, bare(word))
        parsed, wrong = parse(word)
        literals.pop(name, None)  # the last word of a key counts, for all sweepers too
        doubtful.pop(name, None)
        is_sweep = parsed is not None and parsed.is_sweep_override()
        overrides = [one for one in overrides if not one.startswith(f"{key}=")]
        is_text = field and field.type in (str, str | None)
        if is_text and key[0] != "~" and not (sweeps and is_sweep):
            overrides = [one for one in overrides if bare(one) != name]
            literals[name] = value
            continue
        if field is None and word.endswith("="):
            raise ConfigError(f"{word}: it is empty; give a value, or null")
        if is_sweep and not sweeps:
            wrong = f"{word}: a sweep over several values is for sepdist train -m"
        if wrong:
            if "." not in name or (field and field.type is not Any):
                raise ConfigError(wrong)
            doubtful[name] = wrong
            word = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
            if parse(word)[1]:
                raise ConfigError(wrong)
        overrides.append(word)
    return literals, overrides, doubtful


def parse(word: str) -> tuple[Any, str]:
    """Hydra's override of a word or, if it cannot be read, None and the reason with its place."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_rule(word, "override"), ""
    except (HydraException, RecursionError) as error:
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        [place] = [one["column"] for one in frames if "column" in one][-1:] or [len(word)]
        at = f"character {place + 1}, {word[place]!r}" if place < len(word) else "its end"
        return None, f"cannot read {word!r} from {at} on; put quotes inside it around a text"


def key_field(schema: Any, key: str, within: str = "") -> dataclasses.Field | None:
    """The nested field `key`, None within a part; ConfigError if there is no such field.

    A list or mapping stands for its values: its field has their type.
    """
    known = {one.name: one for one in dataclasses.fields(schema)}
    head, _, rest = key.partition(".")
    if head not in known:
        if not within:  # a group, which the command has checked, or a key of hydra's
            return None
        raise ConfigError(f"no key {within + key!r}: there are {', '.join(known)}")
    found: Any = known[head]
    within += f"{head}."
    if rest and get_origin(found.type) in (dict, list):
        found, (name, _, rest) = copy.copy(found), rest.partition(".")
        found.type = get_args(found.type)[-1]
        if not dataclasses.is_dataclass(found.type):
            return found
        within += f"{name}."
    if rest and dataclasses.is_dataclass(found.type):
        return key_field(found.type, rest, within)
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
