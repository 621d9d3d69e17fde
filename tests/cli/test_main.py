"""The entry point: verbs, exit statuses, closed pipes, and nothing heavy imported too early."""

import subprocess
import sys

import pytest

from sepdist import cli
from sepdist.console import user_console
from tests.support.runs import ROOT, program


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
    command = f"{sys.executable} -m sepdist evaluate --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


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


@pytest.mark.seconds(20)
@pytest.mark.parametrize(
    "words",
    [
        *(("shard", "write", "modl=x"), *WRONG, ("--help",)),
        *((verb, "modl=x") for verb in sorted(cli.VERBS.keys() - {"shard", "separate"})),
        *((verb, "--help") for verb in cli.VERBS),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_and_help_given_before_heavy_imports(
    words: tuple[str, ...],
) -> None:
    code = (
        f"import sys; sys.argv = ['sepdist', *{words!r}]\n"
        "from sepdist.cli import main\n"
        "try: main()\n"
        f"except SystemExit as e: print(bool(e.code), *{HEAVY!r} & sys.modules.keys())"
    )
    assert program("-c", code).splitlines()[-1] == str("--help" not in words)


def test_reporting_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, sepdist.reporting as _; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert program("-c", code).strip() == "set()"
