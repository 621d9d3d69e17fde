"""The pages that people read: commands compose or run, Python runs, links lead somewhere.

bash itself expands every command block, with stubs in place of all programs; what they were called
with is then read by the programs' own readers. The log of results quotes commands as they were
spelled at the commits that it names, and tests/test_extending.py follows extending.md.
"""

import argparse
import contextlib
import importlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hydra.core.override_parser.overrides_parser import OverridesParser

from sepdist import cli
from sepdist.cli import compose
from sepdist.config import ConfigError
from tests.support.exports import RATE, voices, write_export
from tests.support.runs import program

READ_CONFIG = compose.read_config  # before a test replaces it, as are the programs that import it
PROGRAMS = {verb: importlib.import_module(f"sepdist.cli.{verb}") for verb in cli.VERBS}
ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cluster/README.md")]
# Whose commands are not for this test.
ELSEWHERE = {"results.md", "results-2026-11.md", "extending.md"}
FENCE = re.compile(r"^ *```(\S*)\n(.*?)^ *```$", re.M | re.S)
# Languages of blocks that are not commands or Python: what is in them is checked elsewhere.
OTHER_LANGUAGES = {"text", "toml", "yaml", "{toctree}", "{eval-rst}"}
NUM_BASH_BLOCKS, NUM_PYTHON_BLOCKS = 56, 3
# Programs that cannot be run or composed here, and why it is enough that they are spelled so.
STRANGERS = {
    "chmod": "a permission of the user's own file",
    "kubectl": "needs a cluster; tests/test_cluster_files.py checks the files that it gets",
    "pip": "installs; a test of the wheel does",
    "sbatch": "needs Slurm; tests/test_cluster_files.py runs its script",
    "tensorboard": "another project's reader",
}
STUB = """#!{bash}
printf -v call '%s\\x1f' "${{0##*/}}" "$@"
printf '%s\\x1e' "$call" >> "$NOTED"
"""
VARIABLES = {"DATA_ROOT": "s3://bucket/data", "SPEECH": "/data/speech", "NOISE": "/data/noise"}
# Commands of the pages that need no data and take seconds: these are run.
RUN = [
    ["sepdist", "--help"],
    ["sepdist", "train", "--help"],
    ["sepdist", "train", "experiment=demo/finetune", "optim.lr=5e-4", "--cfg", "job"],
]


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(page:number, text) of the fenced blocks in these languages."""
    found = []
    for page in [*OUTSIDE, *PAGES]:
        if page.name not in ELSEWHERE:
            for number, (language, text) in enumerate(FENCE.findall(page.read_text()), start=1):
                if language in languages:
                    found.append((f"{page.relative_to(ROOT)}:{number}", text))
    return found


def test_no_block_escapes() -> None:
    for page in [*OUTSIDE, *PAGES]:
        text = page.read_text()
        fences = re.findall(r"^ *```(.*)$", text, re.M)
        assert len(fences) == 2 * len(FENCE.findall(text)), page.name
        assert set(fences[::2]) <= {"bash", "python", *OTHER_LANGUAGES}, page.name
        assert not re.search(r"^    \$ |^\$ sepdist", text, re.M), f"{page.name}: a bare command"
    counts = [len(blocks(language)) for language in ("bash", "python")]
    assert counts == [NUM_BASH_BLOCKS, NUM_PYTHON_BLOCKS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of somebody with a folder of configs and a plug-in of their own."""
    own = tmp_path / "my-configs"
    (own / "experiment").mkdir(parents=True)
    (own / "model").mkdir()
    small = "# @package _global_\nname: small\ntraining: {max_steps: 1}\n"
    (own / "experiment" / "small.yaml").write_text(small)
    (own / "model" / "gated.yaml").write_text("_target_: mypackage.Gated\n")
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(text: str, folder: Path) -> list[list[str]]:
    """The commands of a block as bash expands it: loops, variables, quotes and all."""
    bash = shutil.which("bash")
    assert bash
    programs, noted = folder / "programs", folder / "noted"
    programs.mkdir(exist_ok=True)
    for name in ("sepdist", "make", "python", "ray", "torchrun", *STRANGERS):
        (programs / name).write_text(STUB.format(bash=bash))
        (programs / name).chmod(0o755)
    noted.write_text("")
    environment = {**VARIABLES, "PATH": str(programs), "NOTED": str(noted), "HOME": str(folder)}
    done = subprocess.run(
        [bash, "-euc", f"{text}\nwait"],
        env=environment,
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [call.split("\x1f")[:-1] for call in noted.read_text().split("\x1e")[:-1]]


@pytest.mark.parametrize(("where", "text"), blocks("bash"))
def test_every_command_of_the_pages_is_one_that_its_program_accepts(
    where: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = calls(text, folder)
    assert found, f"{where} has no command"
    for call in found:
        check(call, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "sepdist train experiment=demo/finetune optim.lrr=1",
        "sepdist train -m experiment=demo/finetune optim.lrr=1,2",
        "sepdist train experiment=demo/finetune --frobnicate",
        "sepdist evaluate model=a",
        "sepdist separate --modle a meeting.wav",
        "sepdist frobnicate",
        "python -m sepdist shard write corpus=nowhere split=a output=b",
        "python -m benchmarks.chaos --frobnicate",
        "ray job submit -- sepdist audit",
        "make nothing",
        "rsync a b",
    ],
)
def test_a_wrong_command_would_not_pass(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(command.split(), monkeypatch)


def check(call: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the program would accept this command line."""
    match call:
        case ["sepdist", *words] | ["python", "-m", "sepdist", *words]:
            check_verb(words, monkeypatch)
        case ["python", "tools/shard_data.py", *words]:
            check_verb(["shard", *words], monkeypatch)
        case ["python", "-m", "sepdist.training.loop", frozen]:
            assert frozen.endswith("config.yaml")
        case ["torchrun", "--nproc-per-node", _, "-m", module, frozen]:
            check(["python", "-m", module, frozen], monkeypatch)
        case ["python", "-m", module, *words] if module.startswith("benchmarks."):
            check_benchmark(module, words, monkeypatch)
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert targets and set(targets) <= set(known)
        case ["ray", "job", "submit", *words]:
            if "..." not in words:
                check(words[words.index("--") + 1 :], monkeypatch)
        case ["ray", verb, *_]:
            assert verb in RAY_VERBS
        case _:
            assert call[0] in STRANGERS, call


RAY_VERBS = {"start", "up", "down", "dashboard", "drain-node", "get-auth-token"}


def check_verb(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    verb, *rest = words
    if verb == "--help":
        return
    assert verb in cli.VERBS, verb
    if verb == "completion":
        assert rest in (["bash"], ["zsh"], ["fish"])
    elif verb in ("separate", "import", "export", "push"):
        importlib.import_module(f"sepdist.cli.{verb}")._parser().parse_intermixed_args(rest)
    else:
        elided = "..." in rest
        rest = [word for word in rest if word != "..."]
        if "--help" in rest:
            return
        try:
            composed(verb, rest, monkeypatch)
        except ConfigError as error:
            assert elided and "no value given" in str(error), error


class ReadError(Exception):
    """Ends a program once it has read its config; `cause` is what was wrong with it, or None."""


def composed(verb: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program read its config from the words and go no further; ConfigError if it cannot."""
    program_of_verb = PROGRAMS[verb]
    reader = program_of_verb if hasattr(program_of_verb, "read_config") else compose
    sweeps: list[list[str]] = []

    def read(*given: Any) -> None:
        if len(given) > 3:  # what a sweep would call
            given = (*given[:3], lambda words: sweeps.append(list(words)) or 0)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                READ_CONFIG(*given)
        except ConfigError as error:
            raise ReadError from error
        except SystemExit as end:  # after --cfg job, and after a sweep
            assert end.code == 0
        raise ReadError

    monkeypatch.setattr(reader, "read_config", read)
    monkeypatch.setattr(sys, "argv", [f"sepdist {verb}", *words])
    with pytest.raises(ReadError) as end:
        program_of_verb.main()
    if end.value.__cause__:
        raise end.value.__cause__
    for swept in sweeps:
        composed(verb, [one_value(word) for word in swept if "hydra" not in word], monkeypatch)


def one_value(word: str) -> str:
    """A word of a sweep with its first or smallest value."""
    [parsed] = OverridesParser.create().parse_overrides([word])
    if not parsed.is_sweep_override():
        return word
    start = getattr(parsed.value(), "start", None)  # of an interval
    value = next(parsed.sweep_string_iterator()) if start is None else start
    return f"{parsed.get_key_element()}={value}"


def check_benchmark(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the options with the benchmark's own parser, and go no further."""
    read = []

    def stop(self: Any, arguments: Any = None, namespace: Any = None) -> None:
        given, unknown = original(self, words)
        assert not unknown
        read.append(given)
        raise SystemExit(0)

    original = argparse.ArgumentParser.parse_known_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    assert read


def test_the_commands_that_need_no_data_run(tmp_path: Path) -> None:
    """Those of RUN; the demo's and the tests of the system run the others on data."""
    every = [call for _, text in blocks("bash") for call in calls(text, tmp_path)]
    for call in RUN:
        assert call in every, f"no page has {call}"
        assert program("-m", *call).strip()


@pytest.mark.parametrize(("where", "text"), blocks("python"))
def test_the_python_of_the_pages_runs_on_a_model_and_a_recording_where_the_demo_puts_them(
    where: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "runs").mkdir(parents=True)
    write_export(tmp_path / "demo" / "runs" / "finetune")
    recording = tmp_path / "demo" / "evaluation" / "listening" / "0" / "mixture.wav"
    recording.parent.mkdir(parents=True)
    soundfile.write(recording, voices().sum(0), RATE)
    names: dict[str, Any] = {}
    exec(compile(text, where, "exec"), names)
    assert names["voices"].shape == (2, 4000) and np.isfinite(names["voices"]).all()


HEADING = re.compile(r"^#+ (.*)$", re.M)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {
        slug if number == 0 else f"{slug}-{number}"
        for slug, most in found.items()
        for number in range(most + 1)
    }


def links(page: Path) -> Iterator[str]:
    return (link for link in LINK.findall(FENCE.sub("", page.read_text())) if "://" not in link)


@pytest.mark.parametrize(
    "page", [*OUTSIDE, ROOT / "CHANGELOG.md", *PAGES], ids=lambda page: page.name
)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}"


def test_every_page_is_in_the_table_of_contents() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    listed = [
        name
        for language, block in FENCE.findall(text)
        if language == "{toctree}"
        for name in re.findall(r"^(?:.*<)?([\w-]+)>?$", block, re.M)
    ]
    pages = [page.stem for page in (ROOT / "docs").iterdir() if page.suffix in (".md", ".ipynb")]
    assert sorted(listed) == sorted(set(pages) - {"index"})


def test_the_readme_is_short_and_its_pictures_are_light() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    pictures = re.findall(r"!\[.+\]\(([^)]+)\)", text)
    assert len(pictures) == 2
    assert all((ROOT / name).stat().st_size <= 150_000 for name in pictures)


def test_no_page_installs_the_package_as_if_it_were_on_an_index() -> None:
    for page in [*OUTSIDE, *PAGES, *(ROOT / "docs").glob("*.ipynb")]:
        assert not re.search(r"pip install [^\n`]*['\" ]sepdist\b", f" {page.read_text()}"), (
            page.name
        )
