"""docs/extending.md to the letter: its files in an empty folder, then its commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support.runs import ROOT, program

BLOCK = re.compile(r"(?:^`([\w/.]+)`[^`\n]*:\n\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)


def record(folder: Path) -> None:
    """Two speakers in each of four mixtures: noises of other colours."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(len(folder.name))
    for name, lag in (("anna", 1), ("bert", 9)):
        noise = draws.standard_normal(9000)
        soundfile.write(folder / f"{name}.wav", 0.05 * (noise[lag:] + noise[:-lag]), 8000)


@pytest.mark.seconds(60)
def test_the_page_works_as_it_is_written_in_a_folder_outside_the_checkout(tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "extending.md").read_text())
    files = {path: text for path, _, text in blocks if path}
    commands = [text for _, language, text in blocks if language == "bash"]
    assert len(files) == 9 and len(commands) == 3
    others = [language for path, language, _ in blocks if not path and language != "bash"]
    assert others == ["text", "toml"], "a block of code has no path in front of it"
    work = tmp_path / "my work"
    for path, text in files.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_text(text)
    for number in range(1, 5):
        for split in ("train", "dev"):
            record(work / "speech" / split / f"{number:04}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=work, env=environment, text=True, capture_output=True, check=False
        )

    for command in commands:
        done = run("bash", "-ec", command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 passed" in done.stdout
    assert (work / "separated" / "anna_s2.wav").exists()
    assert "plugins:\n- mine" in (work / "runs" / "gated" / "config.yaml").read_text()
    checked = run(sys.executable, "-m", "ruff", "check", "--select=E,F,I", "--line-length=100", ".")
    assert checked.returncode == 0, checked.stdout

    # The export is of no use to somebody who has not named the package, though it is there.
    words = ("--model", str(work / "runs" / "gated"), "--output", str(tmp_path), "a.wav")
    path = f"{ROOT}{os.pathsep}{work}"
    shown = program("-m", "sepdist", "separate", *words, expect=1, PYTHONPATH=path)
    assert "'mine.gated.Gated' is not allowed" in shown and "plugins=[mine]" in shown
