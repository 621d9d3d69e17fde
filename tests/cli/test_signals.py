"""Ctrl-C and SIGTERM at any moment of any verb, imports and Ray's start included: one line."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sepdist import cli
from sepdist.cli import VERBS
from sepdist.console import Stopped, user_console
from tests.support.runs import ROOT

START = "import sepdist.cli as c; print('started', flush=True); c.main()"
MODEL = ["model=m", "data=d", "output=o"]
WORDS = {
    "train": ["experiment=demo/finetune", "data.train=t", "data.validation=v", "run_dir=r"],
    "pipeline": ["experiment=huang2021/table1", "scale=mini"],
    "shard": ["write", "corpus=demo", "split=train", "output=o", "num_workers=2"],
    "recognise": ["corpus=overlap", "corpus.root=s", "output=o"],
    "separate": ["--model", "m", "--output", "o", "a.wav"],
    "audit": ["run_dir=r"],
    "plot": ["runs.a=r", "output=o"],
    "completion": ["words", "train", "model="],
    "compare": ["a=x", "b=y"],
    "import": ["asteroid", "m.pth", "--output", "o"],
    "export": ["m", "--format", "torch", "--output", "o.pt2"],
    "push": ["m", "o", "--licence", "mit"],
    **{verb: MODEL for verb in ("evaluate", "estimate", "labels")},
}


def interrupted(verb: str, number: int, seconds: float, folder: Path) -> tuple[int, str]:
    """Send a signal some seconds after the start; returns the status and what stderr holds."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, verb, *WORDS[verb]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(seconds)
    process.send_signal(number)
    try:
        return process.wait(60), process.communicate()[1]
    finally:
        process.kill()


def assert_one_line(status: int, shown: str, number: int) -> None:
    """Killed by the signal is what a shell reports as 128 and its number too."""
    if status not in (0, 1, 2):  # else it ended before the signal came
        assert status in (128 + number, -number), (status, shown)
    assert shown.count("\n") <= 1 and "Traceback" not in shown, (status, shown)


@pytest.mark.parametrize(
    ("verb", "number"), [("evaluate", signal.SIGINT), ("audit", signal.SIGTERM)]
)
def test_a_signal_while_a_verb_imports_ends_it_with_one_line(
    verb: str, number: int, tmp_path: Path
) -> None:
    assert_one_line(*interrupted(verb, number, 0.15, tmp_path), number)


def test_a_signal_amid_the_making_of_a_class_is_a_stop_and_no_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Field:
        def __set_name__(self, owner: type, name: str) -> None:  # Python 3.11 wraps what it raises
            raise Stopped(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended, user_console(stopped="the same command goes on"):
        type("JobConf", (), {"env_copy": Field()})
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


def test_the_same_in_a_verb_without_a_console_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted_verb(verb: str) -> int:
        if verb == "broken":
            raise RuntimeError("no signal")
        if verb == "wrapped":
            raise RuntimeError("Error calling __set_name__") from Stopped(signal.SIGTERM)
        try:
            raise Stopped(signal.SIGTERM)
        finally:
            raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'")

    monkeypatch.setattr(cli, "run", interrupted_verb)
    monkeypatch.setattr(cli, "_signals_to", lambda handler: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for verb in ("wrapped", "cleaned up"):
        monkeypatch.setattr(sys, "argv", ["sepdist", verb])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 128 + signal.SIGTERM
        assert capsys.readouterr().err == "stopped\n"
    monkeypatch.setattr(sys, "argv", ["sepdist", "broken"])
    with pytest.raises(RuntimeError, match="no signal"):
        cli.main()


@pytest.mark.slow
@pytest.mark.seconds(300)
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_at_any_moment_ends_a_verb_with_one_line(verb: str, tmp_path: Path) -> None:
    draw = random.Random(verb)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        seconds = draw.uniform(0, 6 if verb == "shard" else 2)
        assert_one_line(*interrupted(verb, number, seconds, tmp_path), number)
