"""Who may import whom, where heavy packages live, and how large files may be.

The layers, from the bottom up: what everything builds on (config, storage, ...); the components of
a training run (data, models, objectives, ...); training; inference; papers; the programs. A module
imports from lower layers only.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from sepdist.cli import VERBS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sepdist"
FOUNDATIONS = (
    "allocator",
    "audio",
    "cluster",
    "composing",
    "config",
    "console",
    "hub",
    "object_storage",
    "patience",
    "plotting",
    "reporting",
    "seeding",
    "slots",
    "storage",
)
COMPONENTS = ("corpora", "data", "metrics", "models", "objectives", "recognisers")
LAYERS = {
    **dict.fromkeys(FOUNDATIONS, 0),
    **dict.fromkeys(COMPONENTS, 1),
    "training": 2,
    "inference": 3,
    "papers": 4,
    "cli": 5,
    "__main__": 6,
}
# Imports between components that are allowed.
SIDEWAYS = {
    ("objectives", "metrics"),
    ("corpora", "data"),
    ("data", "corpora"),
    ("objectives", "data"),
}
# The only files that import a heavy package, by package.
HOMES = {
    "ray": {"cluster.py", "training/launch.py"},
    "webdataset": {"data/shards.py", "corpora/webdataset_tars.py"},
    "pyroomacoustics": {"data/rooms.py"},
    "deepspeed": {"training/engine.py"},
    "s3fs": {"object_storage.py"},
    "transformers": {"models/speech_encoders.py", "recognisers/transformers_ctc.py"},
    "faster_whisper": {"recognisers/faster_whisper.py"},
    "jiwer": {"metrics/wer.py"},
    "huggingface_hub": {"hub.py"},
}
MAX_WIDTH = 100
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 150  # for the function that is the training loop
LOOP = "training/loop.py"
MAX_PRODUCT_LINES = 19_700
MAX_YAML_FILES = 88


def product_files() -> list[Path]:
    files = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")])
    assert len(files) > 30
    return files


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_imports() -> Iterator[tuple[Path, str]]:
    """(file below sepdist/, imported name) of every import in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in sorted(imports(path)):
            yield path.relative_to(PACKAGE), name


def may_import(own: str, other: str) -> bool:
    if own == other or (own, other) in SIDEWAYS:
        return True
    return LAYERS[other] < LAYERS[own] or (LAYERS[own] == LAYERS[other] == 0)


def test_modules_import_only_from_lower_layers_and_the_named_neighbours() -> None:
    wrong = []
    for path, name in package_imports():
        own, parts = path.with_suffix("").parts[0], name.split(".")
        if own == "__init__" or parts[0] != "sepdist" or len(parts) < 2:
            continue
        if parts[1] != "__version__" and not may_import(own, parts[1]):
            wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_no_program_imports_another() -> None:
    assert {f"{verb}.py" for verb in VERBS} <= {path.name for path in (PACKAGE / "cli").iterdir()}
    wrong = [
        f"{path} imports {name}"
        for path, name in package_imports()
        if path.parts[0] == "cli" and name.removeprefix("sepdist.cli.").split(".")[0] in VERBS
    ]
    assert wrong == []


def test_heavy_packages_are_imported_in_their_homes_only() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, name in package_imports()
        if str(path) not in HOMES.get(name.split(".")[0], {str(path)})
    ]
    assert wrong == []


def test_tests_and_benchmarks_share_code_through_tests_support_only() -> None:
    wrong = []
    for path in sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        for name in sorted(imports(path)):
            last = name.rpartition(".")[2]
            if name.startswith("tests.") and last.startswith("test_"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_line_of_code_is_wider_than_the_limit() -> None:
    wrong = []
    for path in product_files():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if len(line) > MAX_WIDTH:
                wrong.append(f"{path.relative_to(ROOT)}:{number} has {len(line)} columns")
    assert wrong == []


def test_files_and_functions_can_be_read_in_one_sitting() -> None:
    wrong = []
    for path in product_files():
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if (num_lines := text.count("\n")) > MAX_FILE_LINES:
            wrong.append(f"{name} has {num_lines} lines")
        most = MAX_LOOP_LINES if path == PACKAGE / LOOP else MAX_FUNCTION_LINES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > most:
                    wrong.append(f"{name}: {node.name} has {length} lines")
    assert wrong == []


def test_the_product_and_its_configs_stay_small() -> None:
    num_lines = sum(path.read_text().count("\n") for path in product_files())
    assert num_lines <= MAX_PRODUCT_LINES
    assert len(list((ROOT / "configs").rglob("*.yaml"))) <= MAX_YAML_FILES
