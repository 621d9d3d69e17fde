"""A damaged export is refused by name; one that does not fit its model, with the differences."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from sepdist import slots
from sepdist.config import InitConfig
from sepdist.inference.export import load_estimator, load_export
from sepdist.training.checkpoint import CheckpointError, OptimizerState, Snapshot, load_newest
from sepdist.training.handoff import inherit, load_weights
from tests.support.checkpoints import NODE, save, snapshot


def test_a_damaged_export_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1))
    weights = next((tmp_path / "checkpoints").iterdir()) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_estimator(str(tmp_path))


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F32", [0, 2**40, 2**40]), ("F32", [2**64 - 1, 0]), ("F8_E8M0", [0])]
)
def test_a_header_that_torch_cannot_follow_is_damage(
    dtype: str, shape: list[int], tmp_path: Path
) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}).encode()
    data = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "model.yaml").write_text(json.dumps({"model": NODE, "sample_rate": 8000}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged") as caught:
        load_export(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"step": float("inf")},
        {"score": "best"},
        {"score": []},
        {"files": {"model.yaml": None}},
        {"files": {"model.yaml": {}}},
        b"[" * 100_000,
    ],
)
def test_a_commit_of_other_values_is_damage(change: Any, tmp_path: Path) -> None:
    save(tmp_path, snapshot(1))
    folder = next((tmp_path / "checkpoints").iterdir())
    commit = json.loads((folder / "COMMIT").read_text())
    data = change
    if isinstance(change, dict):
        commit = {name: value for name, value in commit.items() if name != "sha256"} | change
        text = json.dumps(commit, sort_keys=True)
        data = json.dumps(commit | {"sha256": sha256(text.encode()).hexdigest()}).encode()
    (folder / "COMMIT").write_bytes(data)
    with pytest.raises(CheckpointError, match="COMMIT is damaged"):
        load_export(str(folder))


def test_a_run_dir_is_an_export_of_its_best_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1, 5.0), snapshot(2, 1.0))
    export = load_export(str(tmp_path))
    assert export.sample_rate == 8000 and export.lineage["step"] == 1 and not export.model.training
    assert all(
        torch.equal(value, snapshot(1).weights[name])
        for name, value in export.model.state_dict().items()
    )


def test_a_plain_folder_of_weights_and_yaml_is_an_export_too(tmp_path: Path) -> None:
    safetensors.torch.save_file(snapshot(1).weights, tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text(json.dumps({"model": NODE, "sample_rate": 16000}))
    assert load_export(str(tmp_path)).sample_rate == 16000


def test_a_folder_that_is_neither_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_estimator(str(tmp_path))


def test_an_export_cannot_run_code_of_its_choice(tmp_path: Path) -> None:
    safetensors.torch.save_file(snapshot(1).weights, tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text(
        json.dumps({"model": {"_target_": "os.system"}, "sample_rate": 8000})
    )
    with pytest.raises(ValueError, match=r"os\.system"):
        load_estimator(str(tmp_path))


def linear(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, outputs))


def test_hand_off_keeps_the_named_parameters_fresh_and_copies_all_others() -> None:
    parent, child = linear(1), linear(2)
    before = {name: value.clone() for name, value in child.state_dict().items()}
    assert load_weights(child, parent.state_dict(), ["1"]) == ["1.bias", "1.weight"]
    assert torch.equal(child[0].weight, parent[0].weight) and torch.equal(
        child[0].bias, parent[0].bias
    )
    assert torch.equal(child[1].weight, before["1.weight"]) and torch.equal(
        child[1].bias, before["1.bias"]
    )


def test_weights_of_another_model_are_refused_with_the_parameters_that_differ() -> None:
    with pytest.raises(CheckpointError, match=r"1\.bias is \(1,\), the model's is \(2,\)"):
        load_weights(linear(2), linear(1).state_dict())
    with pytest.raises(CheckpointError, match=r"missing 2\.weight"):
        load_weights(nn.Sequential(*linear(1), nn.Linear(1, 1)), linear(1).state_dict())
    with pytest.raises(CheckpointError, match=r"unexpected 1\.bias"):
        load_weights(linear(1)[:1], linear(1).state_dict())


def test_a_reinit_prefix_that_names_nothing_is_refused() -> None:
    with pytest.raises(CheckpointError, match="nosuch"):
        load_weights(linear(1), linear(1).state_dict(), ["nosuch"])


def exported(model: nn.Module, folder: Path) -> str:
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "model.yaml").write_text("model: {_target_: x.Y}\nsample_rate: 8000\n")
    (folder / "lineage.json").write_text('{"run": "parent"}')
    return str(folder)


def test_a_submodule_of_the_parent_is_handed_over_without_its_prefix(tmp_path: Path) -> None:
    parent = nn.ModuleDict(
        {"separator": linear(1), "separators": linear(1), "head": nn.Linear(1, 1)}
    )
    url = exported(parent, tmp_path / "parent")
    child = linear(2)
    fresh, lineage = inherit(child, InitConfig(url, submodule="separator", reinit=["1"]))
    assert fresh == ["1.bias", "1.weight"] and lineage == {"url": url, "run": "parent"}
    assert torch.equal(child[0].weight, parent["separator"][0].weight)
    with pytest.raises(
        CheckpointError,
        match=r"init\.submodule=nosuch: .*parent has no such one, only head, separator, s",
    ):
        inherit(child, InitConfig(url, submodule="nosuch"))
    with pytest.raises(CheckpointError, match=r"missing 0\.bias.*unexpected head\.bias"):
        inherit(linear(1), InitConfig(url))
    with pytest.raises(CheckpointError, match=r"missing 2\.weight"):
        inherit(nn.Sequential(*linear(1), nn.Linear(1, 1)), InitConfig(url, submodule="separator"))
    with pytest.raises(CheckpointError, match=r"unexpected 1\.bias"):
        inherit(linear(1)[:1], InitConfig(url, submodule="separator"))


def test_an_export_returns_the_outputs_that_its_objective_chose(
    tmp_path: Path,
) -> None:
    node, mixture = NODE | {"num_speakers": 4}, torch.randn(2, 900)
    model = slots.build("model", node)
    whole = model(mixture).detach()
    loudest = whole.square().sum(2).argsort(1)[:, 2:].sort(1).values
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, outputs, expected in (
        ("all", {}, whole),
        ("none", {"num_extra_outputs": 0, "num_loudest": 0}, whole),
        ("old", {"num_extra_outputs": 1}, whole[:, :3]),
        (
            "loudest",
            {"num_extra_outputs": 0, "num_loudest": 2},
            torch.stack([whole[i, loudest[i]] for i in (0, 1)]),
        ),
    ):
        one = Snapshot(1, weights, OptimizerState({}, {}), {})
        save(tmp_path / name, one, model_node=node, outputs=outputs)
        assert torch.equal(load_export(str(tmp_path / name)).model(mixture), expected), name
        assert load_newest(str(tmp_path / name)).weights.keys() == weights.keys(), (
            "the hand-off keeps all outputs"
        )
