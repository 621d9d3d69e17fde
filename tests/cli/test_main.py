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
    assert ("no verb 'evalute'" in shown) == (word == "evalute")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m sepdist evaluate --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_closed_pipe_passes_through_the_console() -> None:
    with pytest.raises(BrokenPipeError), user_console():
        raise BrokenPipeError


@pytest.mark.parametrize(
    "words", [("evaluate", "modl=x"), ("separate", "--modl", "x"), ("--help",)]
)
def test_a_wrong_command_line_is_refused_without_torch(words: tuple[str, ...]) -> None:
    code = (
        f"import sys; sys.argv = ['sepdist', *{words!r}]\n"
        "from sepdist.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert program("-c", code).splitlines()[-1] == "False False"


def test_reporting_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, sepdist.reporting as _; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert program("-c", code).strip() == "set()"
