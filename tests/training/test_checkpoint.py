"""A checkpoint is whole or does not exist, and is checked when it is read."""

from pathlib import Path

import pytest

from sepdist import storage
from sepdist.training import checkpoint
from sepdist.training.checkpoint import (
    CheckpointError,
    load_newest,
)
from tests.support.checkpoints import assert_equal, checkpointer, save, snapshot


def steps_of(run_dir: object) -> list[int]:
    return [
        one.step for one in checkpoint.find_committed(storage.join(str(run_dir), "checkpoints"))
    ]


def test_a_snapshot_comes_back_to_the_last_bit_from_disk(tmp_path: Path) -> None:
    save(tmp_path, snapshot(3))
    assert_equal(load_newest(str(tmp_path)), snapshot(3))


def test_a_snapshot_comes_back_to_the_last_bit_from_s3(bucket: str) -> None:
    save(f"s3://{bucket}/run", snapshot(3), snapshot(4))
    assert_equal(load_newest(f"s3://{bucket}/run"), snapshot(4))


def test_tensors_whose_dimensions_lie_in_another_order_are_saved(tmp_path: Path) -> None:
    """As of a parameter made by `nn.Parameter(weight.permute(...))`: its moments are like it."""
    given = snapshot(3)
    for tensors in (given.weights, given.optimizer.tensors):
        for name, value in tensors.items():
            order = range(value.dim() - 1, -1, -1)
            tensors[name] = value.permute(*order).contiguous().permute(*order)
    assert not all(one.is_contiguous() for one in given.optimizer.tensors.values())
    save(tmp_path, given)
    assert_equal(load_newest(str(tmp_path)), snapshot(3))


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


def test_a_kill_after_any_file_leaves_the_checkpoint_before_it_loadable(
    tmp_path: Path, monkeypatch
) -> None:
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
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    name, damage, tmp_path, caplog
) -> None:
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
    assert (
        name in caplog.text and ("ignored" if damage == "remove" else "falling back") in caplog.text
    )


def damage_weights(run_dir: Path, *steps: int) -> None:
    for one in checkpoint.find_committed(str(run_dir / "checkpoints")):
        if one.step in steps:
            (Path(one.url) / "model.safetensors").write_bytes(b"?")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh_in_silence(
    tmp_path: Path,
) -> None:
    save(tmp_path, snapshot(1), snapshot(2))
    damage_weights(tmp_path, 1, 2)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole: .*step-000000002.*; restore one of them"
    ):
        load_newest(str(tmp_path))


def test_a_damaged_checkpoint_of_a_later_step_takes_no_place_among_the_last(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1), snapshot(5))
    damage_weights(tmp_path, 5)
    save(tmp_path, snapshot(2), snapshot(3), keep_last=1)
    assert steps_of(tmp_path) == [3, 5]
    assert_equal(load_newest(str(tmp_path)), snapshot(3))
    save(tmp_path, snapshot(5), keep_last=1)  # the same step again, of another attempt
    assert_equal(load_newest(str(tmp_path)), snapshot(5))
    assert steps_of(tmp_path) == [5]


def test_checkpoints_at_multiples_of_keep_every_stay_for_good(tmp_path: Path) -> None:
    save(
        tmp_path, *(snapshot(step, score=-step) for step in range(3, 8)), keep_last=1, keep_every=3
    )
    assert steps_of(tmp_path) == [3, 6, 7]
    save(tmp_path, snapshot(8), keep_last=1, keep_best=False)
    assert steps_of(tmp_path) == [8]


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    def refuse(url: str) -> None:
        raise storage.StorageError(f"cannot remove {url}: read-only")

    monkeypatch.setattr(storage, "remove", refuse)
    save(tmp_path, snapshot(1), snapshot(2), keep_last=1)
    assert "read-only; old checkpoints are removed after the next one" in caplog.text
    monkeypatch.undo()
    assert steps_of(tmp_path) == [1, 2]
    save(tmp_path, snapshot(3), keep_last=1)
    assert steps_of(tmp_path) == [3]


def test_folders_and_links_of_others_are_never_collected(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1))
    for folder in ("archive", "checkpoints/step-1-onnx"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine").touch()
    (tmp_path / "checkpoints" / "step-old").symlink_to(tmp_path / "archive")
    assert checkpoint.collect_orphans(str(tmp_path)) == []
    assert {path.name for path in tmp_path.glob("checkpoints/step-1-onnx/*")} == {"mine"}
    assert {path.name for path in (tmp_path / "archive").iterdir()} == {"mine"}


def test_what_is_no_checkpoint_is_never_collected(tmp_path: Path) -> None:
    save(tmp_path, snapshot(1))
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert checkpoint.collect_orphans(str(tmp_path)) == []
    assert (tmp_path / "checkpoints" / "notes.txt").exists() and load_newest(
        str(tmp_path)
    ).step == 1
