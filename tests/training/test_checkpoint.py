"""A checkpoint is whole or does not exist, is checked when it is read, and fits its model or says where it does not."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sepdist import config, storage
from sepdist.config import InitConfig
from sepdist.training import checkpoint
from sepdist.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    OptimizerState,
    Snapshot,
    inherit,
    load_newest,
    load_weights,
)

NODE = {
    "_target_": "sepdist.models.conv_tasnet.ConvTasNet",
    "num_speakers": 2,
    "num_filters": 8,
    "num_bottleneck": 4,
    "num_hidden": 6,
    "num_skip": 4,
    "num_blocks": 1,
    "num_repeats": 1,
    "compile": False,
}


def snapshot(step: int, score: float | None = None) -> Snapshot:
    torch.manual_seed(step)
    model = config.build(NODE)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {f"exp_avg/{name}": torch.randn_like(value) for name, value in weights.items()}
    return Snapshot(step, weights, OptimizerState(moments, {"step": float(step)}), {"samples_seen": 8 * step}, score)


def checkpointer(run_dir: object, **options: object) -> Checkpointer:
    arguments = {"model_node": NODE, "sample_rate": 8000, "lineage": {"run": "r"}, "keep_last": 2, "keep_best": True}
    return Checkpointer(str(run_dir), **(arguments | options))


def save(run_dir: object, *snapshots: Snapshot, **options: object) -> None:
    writer = checkpointer(run_dir, **options)
    for one in snapshots:
        writer.save(one)
    writer.close()


def steps_of(run_dir: object) -> list[int]:
    return [one.step for one in checkpoint.find_committed(storage.join(str(run_dir), "checkpoints"))]


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    assert one.step == other.step and one.state["samples_seen"] == other.state["samples_seen"]
    assert one.optimizer.scalars == other.optimizer.scalars
    for mine, its in ((one.weights, other.weights), (one.optimizer.tensors, other.optimizer.tensors)):
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_snapshot_comes_back_to_the_last_bit_from_disk(tmp_path: Path) -> None:
    save(tmp_path, snapshot(3))
    assert_equal(load_newest(str(tmp_path)), snapshot(3))


def test_a_snapshot_comes_back_to_the_last_bit_from_s3(bucket: str) -> None:
    save(f"s3://{bucket}/run", snapshot(3), snapshot(4))
    assert_equal(load_newest(f"s3://{bucket}/run"), snapshot(4))


def test_an_empty_run_dir_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_newest(str(tmp_path / "nothing")) is None


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    scores = {1: 1.0, 2: 9.0, 3: 2.0, 4: None, 5: 3.0}
    save(tmp_path, *[snapshot(step, score) for step, score in scores.items()])
    assert steps_of(tmp_path) == [2, 4, 5]


def test_a_checkpoint_without_commit_is_never_loaded_and_is_collected(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1), snapshot(2))
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    (newest / "COMMIT").unlink()
    assert load_newest(str(tmp_path)).step == 1
    assert checkpoint.collect_orphans(str(tmp_path)) == [newest.name]
    assert not newest.exists() and load_newest(str(tmp_path)).step == 1


def test_a_kill_after_any_file_leaves_the_checkpoint_before_it_loadable(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, snapshot(1))
    put = storage.put_bytes
    for allowed in range(6):  # five files and COMMIT
        calls = []

        def dying(url: str, data: bytes, calls=calls, allowed=allowed, **options: bool) -> None:
            if len(calls) == allowed:
                raise KeyboardInterrupt
            calls.append(url)
            put(url, data, **options)

        monkeypatch.setattr(storage, "put_bytes", dying)
        writer = checkpointer(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            writer._write(snapshot(2))
        writer.close()
        monkeypatch.setattr(storage, "put_bytes", put)
        assert_equal(load_newest(str(tmp_path)), snapshot(1))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(name, damage, tmp_path, caplog) -> None:
    save(tmp_path, snapshot(1), snapshot(2))
    victim = sorted((tmp_path / "checkpoints").iterdir())[-1] / name
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    assert_equal(load_newest(str(tmp_path)), snapshot(1))
    assert name in caplog.text and ("left out" if damage == "remove" else "falling back") in caplog.text


def damage_weights(run_dir: Path, *steps: int) -> None:
    for one in checkpoint.find_committed(str(run_dir / "checkpoints")):
        if one.step in steps:
            (Path(one.url) / "model.safetensors").write_bytes(b"?")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh_in_silence(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1), snapshot(2))
    damage_weights(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-000000002.*; restore one of them"):
        load_newest(str(tmp_path))


def test_a_damaged_checkpoint_of_a_later_step_takes_no_place_among_the_last(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1), snapshot(5))
    damage_weights(tmp_path, 5)
    save(tmp_path, snapshot(2), snapshot(3), keep_last=1)
    assert steps_of(tmp_path) == [3, 5]
    assert_equal(load_newest(str(tmp_path)), snapshot(3))
    save(tmp_path, snapshot(5), keep_last=1)  # the same step again, as after a rollback
    assert_equal(load_newest(str(tmp_path)), snapshot(5))
    assert steps_of(tmp_path) == [5]


def test_checkpoints_at_multiples_of_keep_every_stay_for_good(tmp_path: Path) -> None:
    save(tmp_path, *(snapshot(step, score=-step) for step in range(3, 8)), keep_last=1, keep_every=3)
    assert steps_of(tmp_path) == [3, 6, 7]
    save(tmp_path, snapshot(8), keep_last=1, keep_best=False)
    assert steps_of(tmp_path) == [8]


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(url: str) -> None:
        raise storage.StorageError(f"cannot remove {url}: read-only")

    monkeypatch.setattr(storage, "remove", refuse)
    save(tmp_path, snapshot(1), snapshot(2), keep_last=1)
    assert "read-only; what is to go is tried again" in caplog.text
    monkeypatch.undo()
    assert steps_of(tmp_path) == [1, 2]
    save(tmp_path, snapshot(3), keep_last=1)
    assert steps_of(tmp_path) == [3]


def test_what_is_no_checkpoint_is_never_collected(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1))
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert checkpoint.collect_orphans(str(tmp_path)) == []
    assert (tmp_path / "checkpoints" / "notes.txt").exists() and load_newest(str(tmp_path)).step == 1


def test_a_damaged_export_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1))
    weights = next((tmp_path / "checkpoints").iterdir()) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        checkpoint.load_model(str(tmp_path))


def test_a_run_dir_is_an_export_of_its_best_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1, 5.0), snapshot(2, 1.0))
    export = checkpoint.load_export(str(tmp_path))
    assert export.sample_rate == 8000 and export.lineage["step"] == 1 and not export.model.training
    assert all(torch.equal(value, snapshot(1).weights[name]) for name, value in export.model.state_dict().items())


def test_a_plain_folder_of_weights_and_yaml_is_an_export_too(tmp_path: Path) -> None:
    safetensors.torch.save_file(snapshot(1).weights, tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text(json.dumps({"model": NODE, "sample_rate": 16000}))
    assert checkpoint.load_export(str(tmp_path)).sample_rate == 16000


def test_a_folder_that_is_neither_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        checkpoint.load_model(str(tmp_path))


def test_an_export_cannot_run_code_of_its_choice(tmp_path: Path) -> None:
    safetensors.torch.save_file(snapshot(1).weights, tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text(json.dumps({"model": {"_target_": "os.system"}, "sample_rate": 8000}))
    with pytest.raises(ValueError, match=r"os\.system"):
        checkpoint.load_model(str(tmp_path))


def linear(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, outputs))


def test_hand_off_keeps_the_named_parameters_fresh_and_copies_all_others() -> None:
    parent, child = linear(1), linear(2)
    before = {name: value.clone() for name, value in child.state_dict().items()}
    assert load_weights(child, parent.state_dict(), ["1"]) == ["1.bias", "1.weight"]
    assert torch.equal(child[0].weight, parent[0].weight) and torch.equal(child[0].bias, parent[0].bias)
    assert torch.equal(child[1].weight, before["1.weight"]) and torch.equal(child[1].bias, before["1.bias"])


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
    (folder / "model.yaml").write_text("model: {}\nsample_rate: 8000\n")
    (folder / "lineage.json").write_text('{"run": "parent"}')
    return str(folder)


def test_a_part_of_the_parent_is_handed_over_with_its_prefix_stripped(tmp_path: Path) -> None:
    parent = nn.ModuleDict({"separator": linear(1), "separators": linear(1), "head": nn.Linear(1, 1)})
    url = exported(parent, tmp_path / "parent")
    child = linear(2)
    fresh, lineage = inherit(child, InitConfig(url, part="separator", reinit=["1"]))
    assert fresh == ["1.bias", "1.weight"] and lineage == {"url": url, "run": "parent"}
    assert torch.equal(child[0].weight, parent["separator"][0].weight)
    with pytest.raises(
        CheckpointError, match=r"init\.part=nosuch: .*parent has no such part, it has head, separator, s"
    ):
        inherit(child, InitConfig(url, part="nosuch"))
    with pytest.raises(CheckpointError, match=r"missing 0\.bias.*unexpected head\.bias"):
        inherit(linear(1), InitConfig(url))
    with pytest.raises(CheckpointError, match=r"missing 2\.weight"):
        inherit(nn.Sequential(*linear(1), nn.Linear(1, 1)), InitConfig(url, part="separator"))
    with pytest.raises(CheckpointError, match=r"unexpected 1\.bias"):
        inherit(linear(1)[:1], InitConfig(url, part="separator"))


def test_an_export_gives_the_loudest_outputs_where_its_objective_says_so_and_an_old_one_all_but_the_last(
    tmp_path: Path,
) -> None:
    node, mixture = NODE | {"num_speakers": 4}, torch.randn(2, 900)
    model = config.build(node)
    whole = model(mixture).detach()
    loudest = whole.square().sum(2).argsort(1)[:, 2:].sort(1).values
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, outputs, expected in (
        ("all", {}, whole),
        ("none", {"num_extra_outputs": 0, "num_loudest": 0}, whole),
        ("old", {"num_extra_outputs": 1}, whole[:, :3]),
        ("loudest", {"num_extra_outputs": 0, "num_loudest": 2}, torch.stack([whole[i, loudest[i]] for i in (0, 1)])),
    ):
        one = Snapshot(1, weights, OptimizerState({}, {}), {})
        save(tmp_path / name, one, model_node=node, outputs=outputs)
        assert torch.equal(checkpoint.load_export(str(tmp_path / name)).model(mixture), expected), name
        assert load_newest(str(tmp_path / name)).weights.keys() == weights.keys(), "the hand-off keeps all outputs"
