"""Models on the hub and model cards: a cache laid out by hand, and a folder for the hub."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import sepdist
from sepdist import hub, storage
from sepdist.config import ConfigError, InitConfig
from sepdist.hub import HubError
from sepdist.inference.export import load_export
from sepdist.inference.pushing import push
from sepdist.slots import build
from sepdist.training.handoff import inherit
from tests.support.exports import MODEL, RATE, voices, write_export

hf = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
SHA = "0123456789abcdef0123456789abcdef01234567"
LINEAGE = {"run": "fine", "run_dir": "/home/me/runs/fine", "step": 20, "sha256": "ab" * 32}
LINEAGE |= {"parent": {"run": "toy", "url": "/home/me/toy", "step": 12, "parent": None}}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_export(tmp_path / "export")
    (tmp_path / "export" / "lineage.json").write_text(json.dumps(LINEAGE))
    return tmp_path / "export"


@pytest.fixture
def cached(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one model, and no net."""
    folder = tmp_path / "cache" / "models--org--name"
    shutil.copytree(export, folder / "snapshots" / SHA)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder / "snapshots" / SHA


def results(path: Path, sha256: str) -> str:
    model = {"lineage": {"sha256": sha256}}
    scores = {"si_snri": {"mean": 12.345}, "sdri": {"mean": 12.5}}
    data = {"corpus": "libri2mix", "split": "test", "noise": False}
    content = {"metrics_db": scores, "model": model, "data": data, "num_utterances": 3000}
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("revision", ["", "@main", f"@{SHA}"])
def test_a_model_on_the_hub_is_used_from_its_cache_without_a_net(
    revision: str, cached: Path, export: Path
) -> None:
    url = f"hf://org/name{revision}"
    wave = voices(num=1)[0]
    expected = sepdist.load(export)(wave, RATE)
    assert np.array_equal(sepdist.load(url)(wave, RATE), expected)
    model = build("model", MODEL)
    _, parent = inherit(model, InitConfig(weights=url))
    assert parent["url"] == str(cached) and parent["step"] == 20
    assert storage.absolute(url) == url  # as every worker names it


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://org/other", "hf://org/other: .*"),
        ("hf://org", "hf://org/name@revision"),
        ("hf://org/name/more", "hf://org/name@revision"),
        ("hf://org/../x", "hf://org/name@revision"),
        ("hf://org/name@gone", "hf://org/name@gone: "),
    ],
)
@pytest.mark.usefixtures("cached")
def test_a_model_that_is_not_there_is_named(url: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        load_export(url)


def test_only_files_of_a_model_are_fetched(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(**arguments: Any) -> str:
        asked.update(arguments)
        return str(export)

    monkeypatch.setattr(hf, "snapshot_download", snapshot_download)
    assert load_export("hf://org/name@v1").sample_rate == RATE
    assert asked["repo_id"] == "org/name" and asked["revision"] == "v1"
    wanted = {"model.yaml", "model.safetensors", "lineage.json", "README.md"}
    assert set(asked["allow_patterns"]) == wanted


def test_a_pushed_folder_loads_and_says_where_it_comes_from(export: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared" / "good one"
    scores = results(tmp_path / "results.json", "ab" * 32)
    assert push(str(export), str(target), "cc-by-4.0", scores, False, False) == str(target)
    wave = voices(num=1)[0]
    assert np.array_equal(sepdist.load(target)(wave, RATE), sepdist.load(export)(wave, RATE))
    text = (target / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["library_name"]) == ("cc-by-4.0", "sepdist")
    [result] = front["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "si_snri", "value": 12.35}
    assert result["dataset"] == {"name": "libri2mix test", "type": "libri2mix"}
    assert "run fine, step 20" in text and "run toy, step 12" in text
    assert "sepdist.load(" in text and "| si_snri | 12.35 |" in text
    for file in target.iterdir():
        assert b"/home/me" not in file.read_bytes()
    with pytest.raises(FileExistsError, match="good one holds something"):
        push(str(export), str(target), "mit", "", False, False)


def test_scores_of_unknown_weights_are_refused(export: Path, tmp_path: Path) -> None:
    scores = results(tmp_path / "results.json", "ab" * 32)
    content = json.loads(Path(scores).read_text())
    content["model"]["lineage"] = {}
    Path(scores).write_text(json.dumps(content))
    (export / "lineage.json").write_text("{}")
    with pytest.raises(ConfigError, match="its scores are of other weights"):
        push(str(export), str(tmp_path / "out"), "mit", scores, False, False)


@pytest.mark.parametrize(("sha256", "message"), [("cd" * 32, "other weights"), ("", "no results")])
def test_scores_of_another_model_are_refused(
    sha256: str, message: str, export: Path, tmp_path: Path
) -> None:
    scores = results(tmp_path / "results.json", sha256)
    if not sha256:
        (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ConfigError, match=message):
        push(str(export), str(tmp_path / "out"), "mit", scores, False, False)
    assert not (tmp_path / "out").exists()


class FolderHub:
    """HfApi, with a folder for the repository."""

    folder: Path
    calls: list[str]

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(f"create {repo_id} {private}")
        self.folder.mkdir(exist_ok=True)
        (self.folder / ".gitattributes").touch()

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=not (self.folder / "public").exists())

    def list_repo_files(self, repo_id: str, revision: str | None) -> list[str]:
        there = self.folder / (revision or "")
        return sorted(path.name for path in there.iterdir() if path.is_file())

    def upload_folder(self, folder_path: Path, repo_id: str, **_: Any) -> str:
        self.calls.append(f"upload {repo_id}")
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        return f"https://hub.test/{repo_id}"


def test_a_push_to_the_hub_makes_one_commit_and_never_replaces_unasked(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    FolderHub.folder, FolderHub.calls = tmp_path / "repository", []
    monkeypatch.setattr(hf, "HfApi", FolderHub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    where = push(str(export), "hf://org/name", "mit", "", True, False)
    assert where == "https://hub.test/org/name"
    assert FolderHub.calls == ["create org/name True", "upload org/name"]
    names = {path.name for path in FolderHub.folder.iterdir()} - {".gitattributes"}
    assert names == set(hub.OURS)
    with pytest.raises(HubError, match=r"hf://org/name holds .*add --update"):
        push(str(export), "hf://org/name", "mit", "", True, False)
    push(str(export), "hf://org/name", "mit", "", True, True)
    assert FolderHub.calls.count("upload org/name") == 2
    (FolderHub.folder / "v2").mkdir()
    (FolderHub.folder / "v2" / "model.yaml").touch()
    with pytest.raises(HubError, match=r"hf://org/name@v2 holds model\.yaml already"):
        push(str(export), "hf://org/name@v2", "mit", "", True, False)
    (FolderHub.folder / "public").touch()
    with pytest.raises(HubError, match=r"hf://org/name is public already: .*nothing was sent"):
        push(str(export), "hf://org/name", "mit", "", True, True)
    assert FolderHub.calls.count("upload org/name") == 2
    assert "hf_secret" not in "".join(capsys.readouterr())


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"hf://org/name: run: pip install huggingface_hub.*`hub`"):
        load_export("hf://org/name")


def test_a_fault_of_the_hub_is_one_line(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(FolderHub):
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            raise OSError("401 Client Error.\nInvalid username or password.")

    monkeypatch.setattr(hf, "HfApi", Away)
    with pytest.raises(HubError, match=r"^hf://org/name: 401 .*password\.$"):
        push(str(export), "hf://org/name", "mit", "", False, False)


def test_a_fault_of_the_hub_shows_no_password_of_its_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(**_: object) -> str:
        raise OSError("404 Not Found for url 'https://me:se@cret@mirror.example/api/models/a/b'")

    monkeypatch.setattr(hf, "snapshot_download", fails)
    with pytest.raises(HubError, match=r"https://mirror\.example/api") as caught:
        hub.local("hf://org/name")
    assert "cret" not in str(caught.value)


def test_weights_pushed_in_half_precision_load_as_the_nearest_float16(
    export: Path, tmp_path: Path
) -> None:
    folder = push(str(export), str(tmp_path / "half"), "mit", "", False, False, half=True)
    stored = safetensors.torch.load_file(Path(folder, "model.safetensors"))
    assert {one.dtype for one in stored.values()} == {torch.float16}
    whole, half = (load_export(str(one)).model.state_dict() for one in (export, folder))
    for name, weight in whole.items():
        assert half[name].dtype == torch.float32
        assert np.array_equal(half[name].numpy(), weight.numpy().astype(np.float16))
