"""The wheel: what is in it, and a stranger's first hour with it, far from the source tree."""

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
import soundfile

import sepdist
from tests.support.runs import ROOT, TINY

pytestmark = pytest.mark.xdist_group("wheel")  # one process builds, installs and trains
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHORT = [*TINY, "init.weights=null", "init.reinit=[]", "training.max_steps=2"]
SHORT += ["validation.every_steps=2", "cluster.num_workers=1"]
# Several commands in one process, which spares the imports of all but the first.
COMMANDS = """\
import json, sys
from sepdist.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["sepdist", *command]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
"""
FOUR_LINES = """\
import sepdist, soundfile
wave, rate = soundfile.read("Gespräch zu zweit.wav")
separator = sepdist.load("~/Läufe a/erster")
voices = separator(wave, rate)
"""


def build(source: Path, target: str, output: Path) -> Path:
    """Build an sdist or a wheel with the backend that pyproject.toml names; needs no network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = output.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files_below(folder: str) -> set[str]:
    """The files of a folder of the source tree, caches aside, relative to the tree."""
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in paths if path.parent.name != "__pycache__"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_the_package_its_configs_and_the_licence_and_nothing_else(wheel) -> None:
    files = contents(wheel)
    configs = {f"sepdist/{name}": name for name in files_below("configs")}
    info = f"sepdist-{sepdist.__version__}.dist-info"
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert set(files) == files_below("sepdist") | set(configs) | {f"{info}/{one}" for one in about}
    for name, source in [*configs.items(), (f"{info}/licenses/LICENSE", "LICENSE")]:
        assert files[name] == (ROOT / source).read_bytes(), name
    record = csv.reader(io.StringIO(files[f"{info}/RECORD"].decode()))
    assert {row[0] for row in record} == set(files)


def test_the_metadata_name_the_pythons_the_extras_and_the_command(wheel) -> None:
    files, info = contents(wheel), f"sepdist-{sepdist.__version__}.dist-info"
    metadata = Parser().parsestr(files[f"{info}/METADATA"].decode())
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    pythons = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert pythons <= set(metadata.get_all("Classifier"))
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert b"sepdist = sepdist.cli:main" in files[f"{info}/entry_points.txt"]


def test_a_source_distribution_builds_the_same_wheel(wheel, tmp_path: Path) -> None:
    source = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / source.name.removesuffix(".tar.gz"), "wheel", tmp_path / "wheel")
    assert again.name == wheel.name and contents(again) == contents(wheel)


def test_nothing_tells_people_to_install_sepdist_from_an_index() -> None:
    says_so = re.compile(r"pip install (?:-\S+ )*['\"]?sepdist\b(?!-)")
    found = []
    for place in ("README.md", "CONTRIBUTING.md", "sepdist", "configs", "docs", "cluster", "tools"):
        for path in [ROOT / place, *(ROOT / place).rglob("*")]:
            if path.suffix in (".md", ".py", ".yaml", ".ipynb") or path.name == "Dockerfile":
                lines = enumerate(path.read_text().splitlines(), start=1)
                found += [f"{path}:{number}" for number, line in lines if says_so.search(line)]
    assert [one for one in found if "/_build/" not in one] == []


@dataclass
class Stranger:
    """Somebody with the wheel in an environment of their own, which they have not activated."""

    home: Path  # `~`
    folder: Path  # where they are
    programs: Path  # the environment's bin/

    def run(self, program: str, *words: str) -> str:
        """Run a program of the environment and return its output; it must succeed."""
        environment = {"HOME": str(self.home), "PATH": "/usr/bin:/bin"}
        environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(
            [str(self.programs / program), *words],
            cwd=self.folder,
            env=environment,
            text=True,
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def sepdist(self, *commands: list[str]) -> str:
        """Run `sepdist` with each of these lists of words, one after the other."""
        return self.run("python", "-c", COMMANDS, json.dumps(commands))


@pytest.fixture(scope="module")
def stranger(wheel, tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    """The wheel in a new environment that sees this one's packages, but not its sepdist.

    Only the .pth files of the environment's own folder are read, so the one that an editable
    install left in this one's has no effect there.
    """
    place = tmp_path_factory.mktemp("stranger")
    programs = place / "eine Umgebung" / "bin"
    someone = Stranger(place / "Heim ñ", place / "ein leerer Ordner, für Übungen", programs)
    someone.home.mkdir()
    someone.folder.mkdir()
    venv.create(place / "eine Umgebung", symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    [packages] = place.glob("eine Umgebung/lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{Path(np.__file__).parent.parent}\n")
    return someone


def test_the_command_works_far_from_the_source_tree(stranger) -> None:
    listed = stranger.run("sepdist", "--help")
    assert "shard" in listed and "separate" in listed
    code = (
        "import sys, sepdist.config as c; print(c.__file__, c.config_dir(), *sys.path, sep='\\n')"
    )
    first, configs, *path = stranger.run("python", "-c", code).splitlines()
    assert Path(first).is_relative_to(stranger.programs.parent)
    assert str(ROOT) not in path
    assert Path(configs) == Path(first).parent / "configs"


@pytest.fixture(scope="module")
def trained(stranger) -> Stranger:
    """The stranger with two data sets and a run in `~`, and a recording in their folder."""
    demo = ["shard", "write", "corpus=demo", "corpus.num_train=6", "corpus.num_dev=2"]
    demo.append("samples_per_shard=4")
    splits = [["split=train", "output=~/Töne/train"], ["split=dev", "output=~/Töne/dev"]]
    stranger.sepdist(*([*demo, *words] for words in splits))
    data = ["data.train=~/Töne/train", "data.validation=~/Töne/dev"]
    run_dir = "run_dir=~/Läufe a/erster"
    stranger.run("sepdist", "train", "experiment=demo/finetune", *data, run_dir, *SHORT)
    seconds = np.arange(3 * 8000) / 8000
    wave = 0.3 * np.sin(2 * np.pi * 220 * seconds) + 0.3 * np.sin(2 * np.pi * 361 * seconds)
    soundfile.write(stranger.folder / "Gespräch zu zweit.wav", wave, 8000)
    return stranger


@pytest.mark.seconds(60)
def test_a_stranger_makes_data_trains_evaluates_and_separates(trained) -> None:
    """Blanks, letters beyond ASCII and `~` are in the paths of every step."""
    words = ["model=~/Läufe a/erster", "data=~/Töne/dev", "output=Ergebnisse (2)", "num_workers=0"]
    shown = trained.sepdist(
        ["shard", "verify", "output=~/Töne/train"],
        ["shard", "info", "output=~/Töne/dev"],
        ["audit", "run_dir=~/Läufe a/erster"],
        ["evaluate", *words],
    )
    assert "intact: 2 shards, 6 samples" in shown
    assert "2 (s1 + s2 + noise, 8000 Hz)" in shown
    assert "0 lost, 0 repeated" in shown
    results = json.loads((trained.folder / "Ergebnisse (2)" / "results.json").read_text())
    assert np.isfinite(results["metrics_db"]["si_snri"]["mean"])
    words = ["--model", "~/Läufe a/erster", "--output", "~/Stimmen", "Gespräch zu zweit.wav"]
    trained.run("sepdist", "separate", *words)
    for speaker in ("s1", "s2"):
        wave, rate = soundfile.read(trained.home / "Stimmen" / f"Gespräch zu zweit_{speaker}.wav")
        assert rate == 8000 and len(wave) == 24000 and np.isfinite(wave).all()
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "Ergebnisse (2)",
        "Gespräch zu zweit.wav",
    ]


@pytest.mark.seconds(60)  # as above, so that the two share the fixture
def test_four_lines_of_python_separate_a_recording(trained) -> None:
    shape = trained.run("python", "-c", FOUR_LINES + "print(voices.shape)")
    assert shape.strip() == "(2, 24000)"
