"""Models and objectives on a device that refuses host tensors and tells what it waits for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def report(*options: str) -> list[dict]:
    """The rows of a process of its own, because the fake device changes torch for good."""
    command = [sys.executable, "-m", "tests.support.fake_cases", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(rows: list[dict]) -> dict[str, object]:
    return {
        row["case"]: row["error"] or row["waits"] for row in rows if row["error"] or row["waits"]
    }


@pytest.mark.seconds(10)
def test_no_model_and_no_objective_mixes_devices_or_waits_for_the_device() -> None:
    rows = report("--quick")
    assert faults(rows) == {}
    for group in ("model", "objective"):
        files = {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}
        assert {row[group] for row in rows if group in row} == files, (
            f"of configs/{group} have a case"
        )


@pytest.mark.slow
def test_every_model_with_every_objective_neither_mixes_devices_nor_waits() -> None:
    assert faults(report()) == {}
