"""A run is where its config lies: moved, renamed or copied, it goes on there and nowhere else."""

import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from rich.console import Console

from sepdist import config, storage
from sepdist.config import ConfigError
from sepdist.training.audit import audit
from sepdist.training.checkpoint import CheckpointError
from sepdist.training.run import fill_in, freeze
from tests.support.checkpoints import save, snapshot
from tests.support.runs import final_hash, frozen, loop, program, train_arguments

FRESH = ("init.weights=null", "init.reinit=[]", "cluster.num_workers=1")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file, by name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def config_text(tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return Path(frozen(tiny_data, tmp_path_factory.mktemp("first"))).read_text()


@pytest.mark.parametrize("place", ["moved", "with blank and ü", "a/b/../c"])
def test_the_run_dir_of_a_frozen_config_is_the_folder_where_it_lies(
    place: str, config_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / place
    (tmp_path / "a" / "b").mkdir(parents=True)
    folder.mkdir()
    (folder / "config.yaml").write_text(config_text)
    assert config.load_frozen(f"{folder}/config.yaml").run_dir == str(folder.resolve())
    monkeypatch.chdir(tmp_path)
    assert config.load_frozen(f"{place}/config.yaml").run_dir == str(folder.resolve())
    (tmp_path / "link").symlink_to(folder)
    assert config.load_frozen("link/config.yaml").run_dir == str(folder.resolve())
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.yaml").symlink_to(folder / "config.yaml")
    assert config.load_frozen("linked/config.yaml").run_dir == str(tmp_path / "linked")
    monkeypatch.chdir(folder)
    assert config.load_frozen("config.yaml").run_dir == str(folder.resolve())


def test_the_run_dir_of_a_frozen_config_in_a_bucket_is_its_prefix(
    config_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "read_bytes", lambda url: config_text.encode())
    assert config.load_frozen("s3://other/moved/config.yaml").run_dir == "s3://other/moved"


def test_a_start_looks_for_the_parent_stage_only_until_there_is_a_checkpoint(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    path = frozen(tiny_data, tmp_path / "run", f"init.weights={tmp_path}/gone")
    with pytest.raises(CheckpointError, match="gone"):
        freeze(config.load_frozen(path), Console(quiet=True))
    save(tmp_path / "run", snapshot(1))
    freeze(config.load_frozen(path), Console(quiet=True))


@pytest.mark.slow
def test_a_copied_run_goes_on_to_the_same_bits_and_leaves_the_original_alone(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    loop(frozen(tiny_data, tmp_path / "straight", "training.max_steps=4"))
    path = Path(frozen(tiny_data, tmp_path / "base", "training.max_steps=2"))
    loop(str(path))
    path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 4"))
    base, copy = tmp_path / "base", tmp_path / "elsewhere" / "copy"
    shutil.copytree(base, copy)
    before = contents(base)
    loop(str(copy / "config.yaml"))
    assert contents(base) == before
    base.rename(tmp_path / "renamed")
    loop(str(tmp_path / "renamed" / "config.yaml"))
    assert not base.exists()
    for run_dir in (copy, tmp_path / "renamed"):
        assert final_hash(run_dir) == final_hash(tmp_path / "straight")
        result = audit(str(run_dir))
        assert result.sound and result.steps == 4 and result.checkpoint.startswith(str(run_dir))


@pytest.mark.slow
def test_a_run_whose_parent_is_gone_goes_on_with_the_same_lineage(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    loop(frozen(tiny_data, tmp_path / "parent", "training.max_steps=1"))
    handed = (f"init.weights={tmp_path}/parent", "training.max_steps=2")
    path = Path(frozen(tiny_data, tmp_path / "child", "training.max_steps=1", *handed))
    loop(str(path))
    (before,) = (tmp_path / "child").glob("checkpoints/*2-*/lineage.json")
    wanted = before.read_text().splitlines()
    (tmp_path / "parent").rename(tmp_path / "archive")
    path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 3"))
    loop(str(path))
    (after,) = (tmp_path / "child").glob("checkpoints/*3-*/lineage.json")
    own = ('"step"', '"sha256"')
    found = after.read_text().splitlines()
    assert [line for line in found if not line.startswith(tuple(f" {one}" for one in own))] == [
        line for line in wanted if not line.startswith(tuple(f" {one}" for one in own))
    ]
    assert '"parent": {' in after.read_text()


@pytest.mark.slow
def test_sepdist_train_goes_on_in_the_copy_that_it_is_given(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    base, copy = tmp_path / "base", tmp_path / "copy"
    program(*train_arguments("demo/finetune", tiny_data, base, *FRESH, "training.max_steps=2"))
    shutil.copytree(base, copy, symlinks=True)
    before = contents(base)
    printed = program(
        *train_arguments("demo/finetune", tiny_data, copy, *FRESH, "training.max_steps=4")
    )
    assert f"at step 4: {copy}" in printed or f"{copy}/checkpoints" in printed
    assert contents(base) == before
    assert audit(str(copy)).steps == 4 and audit(str(base)).steps == 2


def test_arguments_that_are_younger_than_a_run_are_filled_in_at_any_depth() -> None:
    separator = {"_target_": "sepdist.models.conv_tasnet.ConvTasNet", "num_filters": 8}
    mixing = {"_target_": "sepdist.data.dynamic.DynamicMixing"}
    context = {"_target_": "sepdist.models.context.ContextModel", "separator": separator}
    older = {"model": context, "data": {"mixing": mixing, "train": "a"}}
    newer = deepcopy(older)
    newer["model"]["separator"]["causal"] = False  # type: ignore[index]
    newer["data"]["mixing"]["balance"] = None  # type: ignore[index]
    fill_in(older, newer)
    assert older == newer
    newer["model"]["separator"]["causal"] = True  # type: ignore[index]
    fill_in(older, newer)
    assert config.differences(older, newer) == ["model.separator.causal was False, is True"]


def test_a_data_set_is_what_its_digest_says_wherever_it_lies(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    extra = f"data.extra=[{{name: more, url: {tiny_data['train']}, num_sources: 2}}]"
    cfg = config.load_frozen(frozen(tiny_data, tmp_path / "composed", extra))
    cfg.run_dir = str(tmp_path / "run")
    freeze(cfg, Console(quiet=True))
    for split, folder in tiny_data.items():
        shutil.copytree(folder, tmp_path / "elsewhere" / split)
    places = {name: f"{tmp_path}/elsewhere/{name}" for name in ("train", "dev")}
    cfg.data.train, cfg.data.validation = places["train"], places["dev"]
    cfg.data.extra[0].url = places["train"]
    freeze(cfg, Console(quiet=True))
    assert config.load_frozen(f"{cfg.run_dir}/config.yaml").data.train == places["train"]
    for change, name in (("train", "main"), ("validation", "validation"), ("extra", "more")):
        wrong = deepcopy(cfg)
        if change == "extra":
            wrong.data.extra[0].url = places["dev"]
        else:
            setattr(wrong.data, change, places["dev" if change == "train" else "train"])
        with pytest.raises(ConfigError, match=rf"another config: data\.digests\.{name} was "):
            freeze(wrong, Console(quiet=True))
    assert config.load_frozen(f"{cfg.run_dir}/config.yaml").data.train == places["train"]
