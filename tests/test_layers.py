"""Imports go down only: programs -> training -> parts -> foundations; heavy packages have one home each."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = {
    **dict.fromkeys(
        (
            "config",
            "storage",
            "audio",
            "seeding",
            "allocator",
            "reporting",
            "plotting",
            "cluster",
            "console",
        ),
        0,
    ),
    **dict.fromkeys(("data", "corpora", "models", "objectives", "metrics", "recognisers"), 1),
    "training": 2,
    "inference": 3,
    "papers": 4,
    "cli": 5,
    "__main__": 6,
}
SIDEWAYS = {
    ("objectives", "metrics"),
    ("corpora", "data"),
    ("data", "corpora"),
    ("objectives", "data"),
}
HOMES = {
    "ray": {"cluster.py", "training/launch.py"},
    "webdataset": {"data/shards.py"},
    "deepspeed": {"training/engine.py"},
    "s3fs": {"storage.py"},
    "transformers": {"models/speech_encoders.py", "recognisers/transformers_ctc.py"},
    "faster_whisper": {"recognisers/faster_whisper.py"},
    "jiwer": {"metrics/wer.py"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_modules_import_only_from_lower_layers_and_the_named_neighbours() -> None:
    wrong = []
    files = sorted((ROOT / "sepdist").rglob("*.py"))
    assert len(files) > 30
    for path in files:
        own = path.relative_to(ROOT / "sepdist").with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "sepdist" or len(parts) < 2 or parts[1] in (own, "__version__"):
                continue
            other = parts[1]
            fine = (
                LAYERS[other] < LAYERS[own]
                or (own, other) in SIDEWAYS
                or (LAYERS[own] == LAYERS[other] == 0)
            )
            if not fine:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_heavy_packages_are_imported_in_their_homes_only() -> None:
    wrong = []
    for path in sorted((ROOT / "sepdist").rglob("*.py")):
        relative = str(path.relative_to(ROOT / "sepdist"))
        for name in imports(path):
            package = name.split(".")[0]
            if package in HOMES and relative not in HOMES[package]:
                wrong.append(f"{relative} imports {package}")
    assert wrong == []
