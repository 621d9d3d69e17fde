"""Seeded random command lines of every verb end in order: status 0, 1 or 2, and at most one line.

Nothing heavy starts: what a valid line would run is replaced by the checks of its config.
"""

import dataclasses
import functools
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sepdist import cli, composing, config, slots
from sepdist.cli import completion, compose, shard, train
from sepdist.papers import pipeline

NEEDED = {
    "train": ["name=n", "data.train=t", "data.validation=v", "training.max_steps=1"],
    "pipeline": ["name=n"],
    "shard": ["corpus=librispeech", "corpus.root=r", "output=o"],
    "recognise": ["corpus=overlap", "corpus.root=r", "output=o"],
    "audit": ["run_dir=r"],
    "plot": ["output=o"],
    "compare": ["a=x", "b=y"],
    "import": ["asteroid", "m.pth", "--output", "o"],
    "export": ["m", "--format", "torch", "--output", "o.pt2"],
    "push": ["m", "o", "--licence", "mit"],
    **{verb: ["model=m", "data=d", "output=o"] for verb in ("evaluate", "estimate", "labels")},
}
PART_KEYS = ["optim.lr", "model.num_filters", "model._target_", "corpus.root", "hydra.run.dir"]
PART_KEYS += ["objective.estimator.url", "data.extra.0.url", "runs.a b", "vars.x", "stages.a.kind"]
VALUES = ["", "0", "-1", "1e400", "nan", "-inf", "2147483648", str(2**70), "1.5", "true", "null"]
VALUES += [
    "/",
    "~",
    "~nobody/x",
    "s3://",
    "s3://b/c",
    "http://x",
    "a b",
    "a=b",
    "a,b",
    "[1,2",
    "][",
]
VALUES += [
    "{a:1}",
    "{{{{a",
    "[" * 300,
    "'",
    '"',
    "a\\",
    "${x}",
    "${",
    "${oc.env:X}",
    "???",
    "!!int",
]
VALUES += ["a\nb", "\x1b[2J", "\udcff\udc80", "größe", "日本", "\u2028", "x" * 5000, "choice(1,2)"]
VALUES += ["range(1,", "json.loads", "os.system", "[a,b]", "{", "@x", "#", "dprnn", "demo/finetune"]
LETTERS = "aé=[]{}(),'\"\\$~+.:/@!-#% \t0189\udcff"


@functools.cache
def keys_of(verb: str) -> list[str]:
    """Keys of parts, which no verb or another may have, and those of the verb."""
    if verb not in completion.SCHEMAS:
        return PART_KEYS
    name, schema = completion.SCHEMAS[verb]
    own = [key for key, _, _ in composing.keys(name, schema)]
    return [*PART_KEYS, *own, *own, *composing.groups(name)]


def command_line(seed: int) -> list[str]:
    """A verb with its needed words, and up to four hostile ones among them."""
    draw = random.Random(seed)
    verb = draw.choice([*NEEDED, "separate", "completion", "nosuch"])
    words = list(NEEDED.get(verb, ()))
    keys = keys_of(verb)
    for _ in range(draw.randint(1, 4)):
        noise = "".join(draw.choices(LETTERS, k=draw.randint(0, 12)))
        word = f"{draw.choice(['', '', '', '+', '++', '~'])}{draw.choice(keys)}"
        word += draw.choice(["=", "=", "=", "=", "", "=="]) + draw.choice([*VALUES, noise])
        options = ["--cfg", "-m", "--config-dir=/nosuch", "--output", "-cd", "--help", "-h"]
        other = [noise, draw.choice(options), f"{noise}={noise}"]
        words.insert(draw.randint(0, len(words)), draw.choice([word, word, word, word, *other]))
    action = [draw.choice(["write", "verify", "info", "", "nosuch"])] if verb == "shard" else []
    return [verb, *action, *words]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., tuple[object, str]]]:
    """Run a command line; returns its status and what it printed on stderr."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError("a hang")

    def checked(cfg: Any, *_: object) -> None:
        if dataclasses.is_dataclass(cfg):  # the workers can read what the driver would write
            assert config.from_yaml(config.to_yaml(cfg), type(cfg)) == cfg

    def run(line: list[str]) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["sepdist", *line])
        signal.setitimer(signal.ITIMER_REAL, 60)
        try:
            status = cli.run(line[0])
        except SystemExit as error:
            status = error.code
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return status or 0, capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEPDIST_PLUGINS", "")
    monkeypatch.setattr(slots, "_named", [])
    monkeypatch.setattr(compose.pkgutil, "resolve_name", lambda name: checked)
    monkeypatch.setattr(train, "train", checked)
    monkeypatch.setattr(pipeline, "run", checked)
    for action in ("write", "verify", "info"):
        monkeypatch.setattr(shard, action, checked)
    before = signal.signal(signal.SIGALRM, stop)
    yield run
    signal.signal(signal.SIGALRM, before)
    composing.user_folders.clear()


def ends_in_order(line: list[str], status: object, shown: str) -> bool:
    """Whether a failure told in one line, or in the usage of a program that found no verb."""
    usage = "usage:" in shown
    return status in (0, 1, 2) and "Traceback" not in shown and (usage or shown.count("\n") <= 1)


@pytest.mark.parametrize("seed", range(25))
def test_a_hostile_command_line_ends_in_order(run, seed: int) -> None:
    line = command_line(seed)
    assert ends_in_order(line, *run(line)), line


@pytest.mark.slow
def test_two_hundred_hostile_command_lines_end_in_order(run) -> None:
    wrong = []
    for seed in range(1000, 1200):
        line = command_line(seed)
        if not ends_in_order(line, *(shown := run(line))):
            wrong.append((line, shown))
    assert wrong == []


def test_the_lines_are_of_every_verb() -> None:
    assert {command_line(seed)[0] for seed in range(1000, 1200)} == {*cli.VERBS, "nosuch"}
