"""Let a shell complete verbs, keys, options of groups and file names at TAB.

    eval "$(sepdist completion bash)"               # in ~/.bashrc
    eval "$(sepdist completion zsh)"                # in ~/.zshrc, after compinit
    sepdist completion fish | source                # in ~/.config/fish/config.fish

The script asks `sepdist completion words WORD ...` for what the last of these words may become.
Where that is nothing, as after output=, the shell completes file names.
"""

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sepdist import composing, config
from sepdist.cli import VERBS
from sepdist.cli.compose import option_parser, options, use_folders
from sepdist.papers.schema import FigureConfig, PipelineConfig

SCHEMAS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("evaluate", "estimate", "labels"), ("evaluate", config.EvaluateConfig)),
    "shard": ("shard", config.ShardConfig),
    "train": ("train", config.TrainConfig),
    "pipeline": ("pipeline", PipelineConfig),
    "recognise": ("recognise", config.RecogniseConfig),
    "audit": ("audit", config.AuditConfig),
    "compare": ("compare", config.CompareConfig),
    "plot": ("plot", FigureConfig),
}
FIRST = {"shard": ("write", "verify", "info"), "completion": ("bash", "zsh", "fish")}


def main() -> int | None:
    """Print a script, or the candidates for the last of `words`."""
    what, *words = sys.argv[1:] or [""]
    if what == "words":
        last = words[-1] if words else ""
        with contextlib.suppress(Exception):  # of a broken file, which the command itself will name
            sys.stdout.writelines(f"{one}\n" for one in candidates(words) if one.startswith(last))
        return None
    if what in FIRST["completion"]:
        print(Path(__file__).with_suffix(f".{what}").read_text(), end="")
        return None
    wanted = what in ("-h", "--help")
    out = sys.stdout if wanted else sys.stderr
    print(f"usage: sepdist completion bash|zsh|fish\n\n{__doc__}", end="", file=out)
    return 0 if wanted else 2


def candidates(words: Sequence[str]) -> list[str]:
    """All that may stand in the place of the last of the words after `sepdist`."""
    if len(words) < 2:
        return list(VERBS)
    verb, *given = words
    current, before = given[-1], given[-2] if len(given) > 1 else ""
    if verb in FIRST and len(given) == 1:
        return list(FIRST[verb])
    if verb not in ("separate", *SCHEMAS):
        return []
    parser = option_parser(sweeps=verb == "train")
    if verb == "separate":
        parser = importlib.import_module("sepdist.cli.separate")._parser()
    known = parser._option_string_actions
    if before in known and known[before].nargs != 0:
        return list(known[before].choices or ())
    if verb == "separate" or current.startswith("-"):
        return list(known) if current.startswith("-") else []
    try:
        folders = parser.parse_known_args(given)[0].config_dir
    except argparse.ArgumentError:
        return []
    use_folders([one for one in folders if os.path.isdir(os.path.expanduser(one))], [])
    return key_candidates(*SCHEMAS[verb], given)


def key_candidates(name: str, schema: Any, given: Sequence[str]) -> list[str]:
    """KEY= at the depth of the last word, or the values of its key if they can be listed."""
    key, equals, _ = given[-1].partition("=")
    groups = composing.groups(name)
    defaults = {one: default for one, default, _ in composing.keys(name, schema)}
    if equals:
        values = options(name, key) if key in groups else []
        values += ["true", "false"] if defaults.get(key) in ("true", "false") else []
        return [f"{key}={value}" for value in values]
    found = [f"{one}=" for one in dict.fromkeys([*groups, *defaults])]
    group, dot, _ = key.partition(".")
    if dot and group in groups:
        chosen = dict(word.split("=", 1) for word in given if "=" in word)
        file = composing.files(name, group).get(chosen.get(group, groups[group] or ""))
        node = yaml.safe_load(file.read_text()) if file else {}
        found += [f"{group}.{one}=" for one in node if one not in ("_target_", "defaults")]
    depth = key.count(".") + 1
    cut = [re.match(rf"(?:[^.]*\.){{{depth}}}|.*", one) for one in found]
    return list(dict.fromkeys(one[0] for one in cut if one))
