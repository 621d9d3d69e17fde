"""The tutorial notebook: its stored outputs are what a reader sees, and it runs."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


def text_of(cells: list[dict]) -> str:
    """Everything that the outputs of cells show as text."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = [output.get("text") or output["data"].get("text/plain", "") for output in outputs]
    return "\n".join("".join(text) for text in shown)


def improvements(text: str) -> list[float]:
    """The SI-SNRi in dB that a text reports."""
    return [float(number) for number in re.findall(r"SI-SNRi: (\S+) dB", text)]


def test_the_stored_notebook_shows_outputs_of_every_cell_and_no_path_of_a_machine() -> None:
    assert NOTEBOOK.stat().st_size < 1_000_000
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
    kinds = {kind for cell in code for one in cell["outputs"] for kind in one.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
    shown = text_of(code)
    assert re.findall(r"(?<![\w.])/\w+/\w*|Error|Traceback", shown) == []
    assert len(improvements(shown)) == 2 and min(improvements(shown)) > 0


@pytest.mark.slow
def test_the_notebook_runs_and_its_two_ways_to_score_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=place).execute()
    by_hand, by_metrics = improvements(text_of(notebook.cells))
    assert by_hand == pytest.approx(by_metrics, abs=0.011) and by_hand > 0
    assert len(list(tmp_path.glob("tutorial/out/meeting_s?.wav"))) == 2
