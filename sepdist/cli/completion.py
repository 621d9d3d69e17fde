"""Let a shell complete verbs, keys, options of groups and file names at TAB.

    eval "$(sepdist completion bash)"               # in ~/.bashrc
    eval "$(sepdist completion zsh)"                # in ~/.zshrc, after compinit
    sepdist completion fish | source                # in ~/.config/fish/config.fish

The script asks `sepdist completion words WORD ...` for what the last of these words may become.
Where that is nothing, as after output=, the shell completes file names.
"""

import contextlib
import importlib
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sepdist import composing, config
from sepdist.cli import VERBS
from sepdist.cli.compose import OPTIONS, options, use_folders
from sepdist.papers.schema import FigureConfig, PipelineConfig

SCHEMAS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("evaluate", "estimate", "labels"), ("evaluate", config.EvaluateConfig)),
    "shard": ("shard", config.ShardConfig),
    "train": ("train", config.TrainConfig),
    "pipeline": ("pipeline", PipelineConfig),
    "recognise": ("recognise", config.RecogniseConfig),
    "audit": ("audit", config.AuditConfig),
    "plot": ("plot", FigureConfig),
}
FIRST = {"shard": ("write", "verify", "info"), "completion": ("bash", "zsh", "fish")}


def main() -> int | None:
    """Print a script, or the candidates for the last of `words`."""
    what, *words = sys.argv[1:] or [""]
    if what == "words":
        last = words[-1] if words else ""
        with contextlib.suppress(Exception):  # of a broken file, which the command itself will name
            print(
                *(f"{one}\n" for one in candidates(words) if one.startswith(last)), sep="", end=""
            )
        return None
    if what in FIRST["completion"]:
        print(Path(__file__).with_suffix(f".{what}").read_text(), end="")
        return None
    wanted = what in ("-h", "--help")
    text = f"usage: sepdist completion bash|zsh|fish\n\n{__doc__}"
    print(text, end="", file=sys.stdout if wanted else sys.stderr)
    return 0 if wanted else 2


def candidates(words: Sequence[str]) -> list[str]:
    """All that may stand in the place of the last of the words after `sepdist`."""
    if len(words) < 2:
        return list(VERBS)
    verb, *given = words
    current, before = given[-1], given[-2] if len(given) > 1 else ""
    if verb in FIRST and len(given) == 1:
        return list(FIRST[verb])
    if verb == "separate":
        return separate_candidates(current, before)
    if verb not in SCHEMAS or before == "--config-dir":
        return []
    if before == "--cfg":
        return ["job"]
    if current.startswith("-"):
        shown = " ".join(list(OPTIONS)[: 3 if verb == "train" else 2])
        return ["--help", *re.findall(r"--[\w-]+", shown)]
    name, schema = SCHEMAS[verb]
    folders = [one for flag, one in itertools.pairwise(given) if flag == "--config-dir"]
    folders += [one.partition("=")[2] for one in given if one.startswith("--config-dir=")]
    use_folders([one for one in folders if Path(one).expanduser().is_dir()], [])
    return key_candidates(name, schema, given)


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


def separate_candidates(current: str, before: str) -> list[str]:
    """The options of separate, which are argparse's, and the choices of the one before."""
    known = importlib.import_module("sepdist.cli.separate")._parser()._option_string_actions
    if before in known and known[before].choices:
        return list(known[before].choices)
    return list(known) if current.startswith("-") else []
