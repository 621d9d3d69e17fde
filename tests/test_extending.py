"""docs/extending.md to the letter: its files in a copy of the source tree, then its command."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:^`([\w/.]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)


def test_the_recipes_work_as_they_are_written(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("sepdist", "configs", "tests", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    blocks = BLOCK.findall((ROOT / "docs" / "extending.md").read_text())
    files = {path: text for path, _, text in blocks if path}
    commands = [text for _, language, text in blocks if language == "bash"]
    assert len(files) == 9 and len(commands) == 1
    assert len(blocks) == 10, "a block has no path in front of it"
    for path, text in files.items():
        assert not (tmp_path / path).exists(), f"{path} is not a new file"
        (tmp_path / path).write_text(text)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False
        )

    done = run("bash", "-ec", commands[0])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "9 passed" in done.stdout  # 6 of its own, and one for each YAML file
    python_files = [path for path in files if path.endswith(".py")]
    checked = run(sys.executable, "-m", "ruff", "check", *python_files)
    assert checked.returncode == 0, checked.stdout
