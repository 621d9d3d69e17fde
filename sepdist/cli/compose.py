"""Read a research verb's config from its command line: KEY=VALUE words and a few options."""

import argparse
import dataclasses
import os
import pkgutil
import re
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from sepdist import composing, config, slots
from sepdist.config import ConfigError
from sepdist.console import user_console

WIDTH = 100
OPTIONS = {
    "--config-dir=DIR": "your own folder of experiments, models, ..., laid out like configs/",
    "--cfg=job": "print the composed config as YAML and exit",
    "--multirun, -m": "run a sweep: KEY=A,B,... or hydra/sweeper=optuna (the extra `optuna`)",
}
_T = TypeVar("_T")


def read_config(
    name: str,
    schema: type[_T],
    doc: str | None,
    sweep: Callable[[Sequence[str]], int] | None = None,
) -> _T:
    """configs/<name>.yaml with the changes of the command line; --help prints `doc` and the keys.

    With `sweep`, a command line that asks for one runs it instead and exits with its status.
    ConfigError for an unknown word, key or option, a wrong value or a missing one.
    """
    for word in sys.argv[1:]:
        if any(unicodedata.category(one) == "Cc" for one in word):
            raise ConfigError(f"cannot read {word!r}: it has a line break or a control character")
    try:
        given, words = option_parser(sweep is not None).parse_known_args()
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    use_folders(given.config_dir, words)
    if given.help:
        print(help_text(name, schema, doc, list(OPTIONS.items())[: 3 if sweep else 2]))
        sys.exit(0)
    words = check(name, schema, doc, words)
    asked = any(re.match(r"hydra([/.]sweeper|\.mode=M)", word) for word in words)
    if sweep and (asked or given.multirun):
        if given.cfg:
            raise ConfigError("--cfg shows one run: leave out -m, and give each key one value")
        sys.exit(sweep(words))
    composed = composing.compose(name, words, schema)
    if given.cfg:
        try:
            print(OmegaConf.to_yaml(composed, resolve=True), end="")
        except InterpolationToMissingValueError:  # a value that others refer to is not given
            print(OmegaConf.to_yaml(composed), end="")
        except OmegaConfBaseException as error:
            raise ConfigError(config.one_line(error)) from error
        sys.exit(0)
    return finish(composed, schema)


@dataclass(frozen=True)
class Program:
    """A verb that reads a config and passes it, with the console, to one function."""

    name: str
    schema: type[Any]
    doc: str | None
    function: str  # MODULE:NAME; imported when the command line is right, as it may import torch

    def __call__(self) -> None:
        """Run the verb; exit status 1 and one line after an error of the user."""
        with user_console() as console:
            cfg = read_config(self.name, self.schema, self.doc)
            pkgutil.resolve_name(self.function)(cfg, console)


def finish(composed: DictConfig, schema: type[_T]) -> _T:
    """Return a composed config as dataclasses, its plug-ins imported."""
    cfg: Any = config.typed(composed, schema)
    slots.use_plugins(getattr(cfg, "plugins", ()))
    return cfg


def option_parser(sweeps: bool) -> argparse.ArgumentParser:
    """The options that may stand among KEY=VALUE words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-cd", "--config-dir", action="append", default=[])
    parser.add_argument("-c", "--cfg", choices=["job"])
    if sweeps:
        parser.add_argument("-m", "--multirun", action="store_true")
    return parser


def use_folders(folders: Sequence[str], words: list[str]) -> None:
    """Let all that is composed find the folders of --config-dir and of hydra.searchpath=[...]."""
    found = list(folders)
    for word in [one for one in words if one.startswith("hydra.searchpath=")]:
        words.remove(word)
        found += [part.strip(" '\"") for part in word.partition("=")[2].strip("[]").split(",")]
    composing.user_folders.clear()
    for url in found:
        folder = Path(os.path.expanduser(url.removeprefix("file://"))).absolute()
        if not folder.is_dir():
            raise ConfigError(f"{url}: there is no such folder of configs")
        composing.user_folders.append(f"file://{folder}")


def check(name: str, schema: type[Any], doc: str | None, words: Sequence[str]) -> list[str]:
    """Return the words to compose; ConfigError if one changes no known key or names no option."""
    groups = composing.groups(name)
    known = [*dict.fromkeys([*(one.name for one in dataclasses.fields(schema)), *groups])]
    checked = []
    for word in words:
        key, equals, option = word.partition("=")
        if key.startswith("-") or not (equals or key.startswith("~")):
            [usage, *_] = re.findall(r"^    sepdist (?:.*\\\n)*.*", doc or "", re.M) or [""]
            example = " ".join(usage.replace("\\\n", "").split())
            raise ConfigError(f"cannot read {word!r}: give KEY=VALUE, as in: {example}")
        bare = composing.bare(word)
        head = re.split(r"[./@]", bare)[0]
        if head not in known and head != "hydra":
            raise ConfigError(f"no key {key!r}: there are {', '.join(known)}")
        field = composing.key_field(schema, bare)
        if key.startswith("~") and bare not in groups and field and field.type is not Any:
            raise ConfigError(f"{word}: only a part or a key of one can be removed")
        if bare not in groups:
            checked.append(word)
            continue
        there = options(name, bare)
        chosen = option.strip("[]") if bare == "experiment" else option
        for one in chosen.split(",") if equals and not re.match(r"\w*[{(]", option) else ():
            if one.strip(" '\"") not in (*there, "null"):
                raise ConfigError(f"no {bare} {one!r}: there are {', '.join(there)}")
        if equals and option != "null":
            checked.append(f"{bare}={option}")
        elif field and field.default == MISSING:
            raise ConfigError(f"{word}: it is needed; there are {', '.join(there)}")
        elif groups[bare] or bare == "mixing":
            checked.append(f"~{bare}")
    return checked


def options(name: str, group: str) -> list[str]:
    """The options of a group for the program `name`; the papers' pipelines are functions."""
    found = list(composing.files(name, group))
    if (name, group) == ("pipeline", "experiment"):
        from sepdist.papers import PIPELINES

        found = [*PIPELINES, *found]
    return found


def help_text(
    name: str, schema: type[Any], doc: str | None, line_options: Sequence[tuple[str, str]]
) -> str:
    """The usage, `doc`, the groups with their options, and every key with default and comment."""
    groups, keys = composing.groups(name), composing.keys(name, schema)
    sections = {
        "Options": dict(line_options),
        "Parts (files of configs/ or of DIR)": {
            f"{one}={option or 'null'}": ", ".join(options(name, one))
            for one, option in groups.items()
        },
        "Keys (??? is mandatory)": {f"{k}={v}": text for k, v, text in keys if k not in groups},
    }
    lines = [f"usage: {sys.argv[0]} KEY=VALUE ...", "", (doc or "").strip()]
    for title, table in sections.items():
        lines += ["", f"{title}:"] if table else []
        column = max(map(len, table), default=0) + 4
        for key, text in table.items():
            wrapped = textwrap.wrap(text, WIDTH - column, break_on_hyphens=False) or [""]
            lines.append(f"  {key}".ljust(column) + wrapped[0])
            lines += [" " * column + one for one in wrapped[1:]]
    return "\n".join(line.rstrip() for line in lines)
