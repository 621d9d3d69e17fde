"""Read a verb's configuration from the KEY=VALUE words of its command line."""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sepdist import config
from sepdist.config import ConfigError

_T = TypeVar("_T")


def read_config(name: str, schema: type[_T], doc: str | None) -> _T:
    """configs/<name>.yaml with the changes of the command line; --help prints `doc` and the keys.

    Raises:
        ConfigError: a word or key is unknown, a value has the wrong type or a mandatory one is
            missing.
    """
    words, groups = sys.argv[1:], choices(name)
    if {"-h", "--help"} & set(words):
        print(help_text(schema, groups, doc))
        sys.exit(0)
    fields = {one.name: one.type for one in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for word in words:
        key, equals, _ = word.partition("=")
        if key.startswith("-") or not equals:
            raise ConfigError(f"cannot read {word!r}: give KEY=VALUE; --help lists the keys")
        if re.split(r"[.@]", key.lstrip("+~"))[0] not in fields.keys() | groups.keys():
            raise ConfigError(f"no key {key!r}; --help lists the keys")
    # A field that is a string is a value. Hydra would take model=... for a file of configs/model/.
    values = [word for word in words if fields.get(word.partition("=")[0]) in (str, str | None)]
    config.register_schemas()
    try:
        with initialize_config_dir(config.config_dir(), version_base="1.3"):
            composed = compose(name, overrides=[word for word in words if word not in values])
        merged = OmegaConf.merge(composed, OmegaConf.from_dotlist(values))
    except (HydraException, OmegaConfBaseException) as error:
        lines = [str(one).split("full_key")[0] for one in (error, error.__cause__) if one]
        shown = " ".join(lines).split("Config search path")[0]
        raise ConfigError(" ".join(shown.split())) from error
    assert isinstance(merged, DictConfig)
    return config.typed(merged, schema)


def choices(name: str) -> dict[str, str | None]:
    """The config groups of configs/<name>.yaml, each with the file that it takes by default."""
    defaults = yaml.safe_load(Path(config.config_dir(), f"{name}.yaml").read_text())["defaults"]
    return {group: file for one in defaults if isinstance(one, dict) for group, file in one.items()}


def help_text(schema: type[Any], groups: dict[str, str | None], doc: str | None) -> str:
    """The usage, `doc`, and every key with its default and the comment in the schema's source."""
    source, rows = inspect.getsource(schema), []
    for field in dataclasses.fields(schema):
        found = re.search(rf"^    {field.name}:.*?(?=^    \w+:|\Z)", source, re.M | re.S)
        comment = " ".join(re.findall(r"# (.*)", found[0])) if found else ""
        default = groups.get(field.name) or getattr(schema(), field.name)
        shown = default if isinstance(default, str) else json.dumps(default)
        if field.name in groups and not comment:
            files = Path(config.config_dir(), field.name).glob("*.yaml")
            comment = f"one of {', '.join(sorted(file.stem for file in files))}"
        rows.append((f"{field.name}={shown}", comment))
    width = max(len(key) for key, _ in rows)
    keys = [f"  {key:{width}}  {comment}".rstrip() for key, comment in rows]
    usage = f"usage: {sys.argv[0]} KEY=VALUE ..."
    return "\n".join([usage, "", (doc or "").strip(), "", "Keys (??? is mandatory):", *keys])
