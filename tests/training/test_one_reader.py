"""At a start the main rank reads the checkpoint, once, and all ranks have it or its error."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sepdist import storage
from sepdist.training.checkpoint import CheckpointError, Snapshot, load_newest
from sepdist.training.state import load_for_all
from sepdist.training.world import World
from tests.support.checkpoints import assert_equal, save, snapshot

CPU = torch.device("cpu")


def _load(rank: int, size: int, run_dir: str, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    if rank:  # this host cannot see the run_dir
        storage.read_bytes = storage.list_names = None  # type: ignore[assignment]
    try:
        found = load_for_all(run_dir, World(rank, size, CPU))
    except (CheckpointError, OSError) as error:
        found = type(error), str(error)  # type: ignore[assignment]
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def loaded(run_dir: Path, folder: Path, size: int = 2) -> list:
    """What each rank got."""
    folder.mkdir()
    arguments = (size, str(run_dir), str(folder / "store"), str(folder))
    mp.start_processes(_load, arguments, size, start_method="forkserver")
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


def odd_snapshot(step: int) -> Snapshot:
    """Tensors of many kinds: of no and of one dimension, empty, of other types, and infinite."""
    one = snapshot(step, 1.5)
    one.weights |= {
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "half": torch.tensor([1.0, 1e-40, -0.0]).bfloat16(),
        "double": torch.tensor([[1e-310, float("inf")]], dtype=torch.float64),
    }
    one.tables = {"previous": torch.tensor([[1, 2]]), "current": torch.tensor([[3, 0], [4, 1]])}
    one.state["numbers"] = [float("inf"), None]
    return one


def test_all_ranks_have_its_bits_and_the_main_rank_has_the_switches(tmp_path: Path) -> None:
    save(tmp_path / "run", odd_snapshot(3))
    first, second = loaded(tmp_path / "run", tmp_path / "ranks")
    here = load_newest(str(tmp_path / "run"))
    for one in (first, second):
        assert one.url == here.url and one.lineage == here.lineage and one.state == here.state
        assert_equal(one, here)
        for name, tensor in odd_snapshot(3).weights.items():
            mine = one.weights[name]
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape)
            flat = mine.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            assert torch.equal(*flat), name
    assert first.tables.keys() == {"previous", "current"} and second.tables == {}
    assert torch.equal(first.tables["current"], odd_snapshot(3).tables["current"])


def test_a_damaged_one_is_left_for_the_one_before_by_all_and_none_whole_is_an_error_of_all(
    tmp_path: Path,
) -> None:
    save(tmp_path / "run", snapshot(1), snapshot(2))
    older, newer = sorted((tmp_path / "run" / "checkpoints").iterdir())
    (newer / "optimizer.safetensors").write_bytes(b"?")
    for one in loaded(tmp_path / "run", tmp_path / "fallen_back", 3):
        assert_equal(one, snapshot(1))
    (older / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole") as caught:
        load_newest(str(tmp_path / "run"))
    for kind, message in loaded(tmp_path / "run", tmp_path / "damaged"):
        assert kind is CheckpointError and message == str(caught.value)


def test_a_run_without_a_checkpoint_starts_anew_on_all(tmp_path: Path) -> None:
    assert loaded(tmp_path / "run", tmp_path / "ranks") == [None, None]
