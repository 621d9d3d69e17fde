"""Completion: what the last word may become, asked by Python and by the shells themselves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sepdist.cli import VERBS, completion
from tests.support.runs import ROOT, program

DRIVE_BASH = """
eval "$(sepdist completion bash)"
COMP_LINE=$1 COMP_POINT=${#1}
compopt() { :; }
_sepdist
printf '%s\\n' "${COMPREPLY[@]}"
complete -p sepdist
"""
DRIVE_FISH = "sepdist completion fish | source; complete -C $argv[1]"


def found(*words: str) -> list[str]:
    return [one for one in completion.candidates(words) if one.startswith(words[-1])]


def test_verbs_actions_and_shells_are_completed() -> None:
    assert found("") == list(VERBS)
    assert found("pi") == ["pipeline"]
    assert found("shard", "") == ["write", "verify", "info"]
    assert found("completion", "") == ["bash", "zsh", "fish"]


def test_keys_are_completed_level_by_level() -> None:
    assert found("train", "da") == ["data_root=", "data."]
    assert found("train", "data.train") == ["data.train="]
    assert found("train", "model=dprnn", "model.num_b") == ["model.num_bottleneck="]
    assert found("train", "model.masking") == ["model.masking="]  # of the default model
    assert found("evaluate", "num_w") == ["num_workers="]
    assert found("audit", "") == ["run_dir=", "json="]


@pytest.mark.parametrize("text", [b"a: [", b"- a", b"3", b"", b"\xff", b"a: " + b"[" * 5000])
def test_a_broken_file_of_the_user_completes_nothing_and_says_nothing(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "broken.yaml").write_bytes(text)
    words = ["train", "--config-dir", str(tmp_path), "model=broken", "model.nosuch"]
    monkeypatch.setattr(sys, "argv", ["completion", "words", *words])
    assert completion.main() is None
    assert capsys.readouterr() == ("", "")


def test_values_are_completed_where_they_can_be_listed() -> None:
    assert found("train", "model=conv_tasnet_") == [
        "model=conv_tasnet_context",
        "model=conv_tasnet_small",
    ]
    assert found("train", "experiment=demo/") == [
        "experiment=demo/finetune",
        "experiment=demo/pretrain",
    ]
    assert found("pipeline", "experiment=huang2021/table2") == [
        "experiment=huang2021/table2_libri2mix",
        "experiment=huang2021/table2_wsj0",
    ]
    assert found("shard", "write", "corpus=libri") == [
        "corpus=libricss",
        "corpus=librimix",
        "corpus=librispeech",
    ]
    assert found("audit", "json=") == ["json=true", "json=false"]
    assert found("evaluate", "model=") == []  # a path: the shell completes file names
    assert found("train", "run_dir=") == []


def test_options_are_completed() -> None:
    assert found("train", "--") == ["--help", "--config-dir", "--cfg", "--multirun"]
    assert found("evaluate", "--") == ["--help", "--config-dir", "--cfg"]
    assert found("evaluate", "--cfg", "") == ["job"]
    assert found("separate", "--f") == ["--format"]
    assert "flac" in found("separate", "--format", "")
    assert found("separate", "meet") == []


def test_the_users_folder_is_completed_too(tmp_path: Path) -> None:
    for name in ("experiment/mine.yaml", "model/mine.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("num_layers: 3\n")
    given = ["train", "--config-dir", str(tmp_path)]
    assert found(*given, "experiment=mi") == ["experiment=mine"]
    assert found(*given, "model=mine", "model.") == ["model.num_layers="]
    assert found("train", f"--config-dir={tmp_path}", "experiment=mi") == ["experiment=mine"]
    assert found("train", "--config-dir", "nowhere", "experiment=mi") == []


def test_a_tab_imports_neither_hydra_nor_torch() -> None:
    words = ["train", "model=", "model.", "--config-dir", ".", "experiment="]
    code = (
        "import sys; from sepdist.cli.completion import candidates\n"
        f"assert candidates({words!r}) and candidates(['pipeline', 'experiment='])\n"
        "assert candidates(['separate', '--format', ''])\n"
        "print({'hydra', 'torch', 'numpy', 'ray'} & sys.modules.keys())"
    )
    assert program("-c", code).strip() == "set()"


@pytest.fixture
def path(tmp_path: Path) -> dict[str, str]:
    """An environment with the command `sepdist`."""
    command = tmp_path / "bin" / "sepdist"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sepdist "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}


def shell(command: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sepdist tra", ["train"]),
        ("sepdist train data.tra", ["data.train="]),
        # Bash replaces only what follows the "=".
        ("sepdist train seed=1 model=conv_tasnet_s", ["conv_tasnet_small"]),
        (r"sepdist train --config-dir my\ configs experiment=mi", ["mine"]),
        ("sepdist train run_dir=ru", [""]),
    ],
)
def test_bash_completes(line: str, expected: list[str], tmp_path: Path, path) -> None:
    file = tmp_path / "my configs" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("name: mine\n")
    command = ["bash", "--norc", "-c", DRIVE_BASH, "bash", line]
    *shown, how = shell(command, tmp_path, path)
    assert shown == expected
    assert how == "complete -o default -F _sepdist sepdist"  # else file names, by bash itself


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish_completes(tmp_path: Path, path) -> None:
    (tmp_path / "runs of mine").mkdir()

    def completed(line: str) -> list[str]:
        shown = shell(["fish", "--no-config", "-c", DRIVE_FISH, line], tmp_path, path)
        return [one.partition("\t")[0] for one in shown]

    assert completed("sepdist train model=conv_tasnet_s") == ["model=conv_tasnet_small"]
    assert completed("sepdist separate --form") == ["--format"]
    assert completed("sepdist audit run_dir=ru") == ["run_dir=runs of mine/"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_the_script_for_zsh_is_read_by_it(tmp_path: Path, path) -> None:
    script = 'compdef() { print $*; }; eval "$(sepdist completion zsh)"; whence -w _sepdist'
    shown = shell(["zsh", "-f", "-c", script], tmp_path, path)
    assert shown == ["_sepdist sepdist", "_sepdist: function"]
