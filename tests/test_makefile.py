"""Which Python `make install` takes; the Pythons are scripts that say how they were called."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import ROOT

# A Python that `-m venv` makes an environment with: .venv/bin/python says how it was called, too.
GOOD = """\
[ "$1" = -c ] && exit 0
mkdir -p .venv/bin && touch .venv/bin/pip && printf '#!/bin/sh\\n' > .venv/bin/python
chmod +x .venv/bin/python
"""
WITHOUT_VENV = '[ "$1" = -c ] && exit 1'
NOT_SWITCHED_ON = "exit 127"  # what a version manager puts on the PATH for versions not in use
Install = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Run `make install words...` where there are these Pythons and no others."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in ("make", "sh", "test", "touch", "mkdir", "chmod", "printf", "echo"):
        (programs / tool).symlink_to(shutil.which(tool) or tool)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()

    def run(*words: str, **pythons: str) -> subprocess.CompletedProcess[str]:
        for name, body in pythons.items():
            script = programs / name.replace("_", ".")
            script.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "{script.name}: $*"\n{body}\n')
            script.chmod(0o755)
        return subprocess.run(
            ["make", "install", *words],
            cwd=tmp_path,
            env={"PATH": str(programs)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3_11": GOOD}, "python3.11"),
        ({"python3_11": GOOD, "python3_12": GOOD, "python3_14": GOOD}, "python3.12"),
        ({"python3_11": GOOD, "python3_12": GOOD, "python3_13": GOOD}, "python3.13"),
        ({"python3_11": GOOD, "python3_13": WITHOUT_VENV}, "python3.11"),
        ({"python3_12": GOOD, "python3_13": NOT_SWITCHED_ON}, "python3.12"),
    ],
)
def test_make_takes_the_newest_python_that_can_make_an_environment(
    install: Install, pythons: dict[str, str], chosen: str
) -> None:
    done = install(**pythons)
    assert done.returncode == 0, done.stderr
    assert f"{chosen}: -m venv .venv" in done.stdout.splitlines()
    assert done.stdout.count("-m venv .venv\n") == 2  # make's own line, and the script's


def test_the_users_choice_wins(install: Install) -> None:
    done = install("PYTHON=python3.11", python3_11=GOOD, python3_13=GOOD)
    assert done.returncode == 0 and "python3.11: -m venv .venv" in done.stdout.splitlines()


@pytest.mark.parametrize("pythons", [{}, {"python3_14": GOOD}, {"python3_11": WITHOUT_VENV}])
def test_make_says_what_is_missing_where_no_python_is_of_use(
    install: Install, pythons: dict[str, str]
) -> None:
    done = install(**pythons)
    assert done.returncode == 2 and "-m venv" not in done.stdout
    assert "needs Python 3.11, 3.12 or 3.13 with venv" in done.stderr
    assert "apt-get install python3.11-venv" in done.stderr


def test_an_environment_keeps_its_python_when_packages_change(
    install: Install, tmp_path: Path
) -> None:
    install(python3_11=GOOD)
    (tmp_path / "pyproject.toml").write_text("changed")
    (tmp_path / ".venv" / ".installed").unlink()
    done = install(python3_13=GOOD)
    assert done.returncode == 0 and "-m venv" not in done.stdout
    assert "--editable" in done.stdout  # as make's own line: the packages are brought up to date
