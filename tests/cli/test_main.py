"""The entry point: verbs, exit statuses, closed pipes, and nothing heavy imported too early."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sepdist import cli
from sepdist.console import user_console
from tests.support.runs import ROOT, program


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what `cli.main` changes in this process."""
    before = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("evalute", 2), ("", 2)])
def test_the_verbs_are_listed_for_help_and_for_a_wrong_verb(
    word: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sepdist", *([word] if word else [])])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == status
    out, err = capsys.readouterr()
    shown = err if status else out
    assert all(f"  {verb} " in shown for verb in cli.VERBS)
    assert all(f"\n{purpose}:\n" in shown for purpose in cli.PURPOSES)
    assert ("no verb 'evalute'" in shown) == (word == "evalute")


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sepdist", "evaluate", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


AT_EXIT = """
import atexit, sys, time, types
import sepdist.cli
atexit.register(lambda: (print("inside", flush=True), time.sleep(60)))
sys.modules["sepdist.cli.audit"] = types.SimpleNamespace(main=lambda: 0)
sepdist.cli.main()
"""
IN_A_CALLBACK = """
import sys, time, types, weakref
import sepdist.cli
def main():
    thing = type("Thing", (), {})()
    dying = weakref.ref(thing, lambda _: (print("inside", flush=True), time.sleep(60)))
    del thing
    time.sleep(60)
sys.modules["sepdist.cli.audit"] = types.SimpleNamespace(main=main)
sepdist.cli.main()
"""


def started(code: str) -> subprocess.Popen[str]:
    """Run code until it says that it is inside."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "audit"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_drops_in_a_callback_still_ends_the_program(number: int) -> None:
    process = started(IN_A_CALLBACK)
    process.send_signal(number)
    assert process.communicate(timeout=50)[1] == "stopped\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_ends_shows_no_traceback(number: int) -> None:
    process = started(AT_EXIT)
    process.send_signal(number)
    assert process.communicate(timeout=50)[1] == "" and process.returncode == -number


def test_ctrl_c_while_a_verb_is_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    monkeypatch.setattr(sys, "argv", ["sepdist", "audit"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 130 and capsys.readouterr() == ("", "stopped\n")


def test_a_closed_pipe_passes_through_the_console() -> None:
    with pytest.raises(BrokenPipeError), user_console():
        raise BrokenPipeError


def test_an_error_does_not_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), user_console():
        raise ValueError("no tensor ü\x1b[2J\udcff\nhere")
    assert capsys.readouterr().err == "error: no tensor ü\\x1b[2J\\udcff\nhere\n"


HEAVY = {"torch", "ray", "scipy", "matplotlib", "deepspeed", "transformers"}
WRONG = [
    ("shard", "shred"),
    ("train", "optim.rate=1"),
    ("train", "model=nosuch"),
    ("train", "-m", "seed=0,1", "modl=x"),
    ("train", "-m", "model=dprnn,nosuch"),
    ("pipeline", "experiment=nosuch"),
    ("plot", "figure2.png", "from scratch=runs/a"),
    ("separate", "--modl", "x"),
    ("completion", "tcsh"),
]


# Each command in a fork of a process that has imported what all of them need.
EACH = f"""
import contextlib, io, json, os, sys
import hydra, sepdist.cli.compose
from hydra.core.plugins import Plugins
from sepdist.cli import main
Plugins.instance()
for words in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    sys.argv, shown = ["sepdist", *words], io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            status = main()
        except SystemExit as error:
            status = error.code
    print(json.dumps([words, bool(status), sorted({HEAVY!r} & sys.modules.keys())]), flush=True)
    os._exit(0)
"""


@pytest.mark.seconds(20)
def test_a_wrong_command_line_is_refused_and_help_given_before_heavy_imports() -> None:
    wrong = [("shard", "write", "modl=x"), *WRONG]
    wrong += [(verb, "modl=x") for verb in sorted(cli.VERBS.keys() - {"shard", "separate"})]
    help_ = [("--help",), *((verb, "--help") for verb in cli.VERBS)]
    shown = program("-c", EACH, json.dumps(wrong + help_))
    found = [json.loads(line) for line in shown.splitlines()]
    assert found == [[list(words), words in wrong, []] for words in wrong + help_]


def test_reporting_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, sepdist.reporting as _; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert program("-c", code).strip() == "set()"
