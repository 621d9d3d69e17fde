"""Weights of an earlier stage: one rank reads them, all have them."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.multiprocessing
from torch import distributed as dist

from sepdist import slots
from sepdist.config import InitConfig
from sepdist.training import state
from sepdist.training.checkpoint import CheckpointError
from sepdist.training.world import World
from tests.support.exports import MODEL, write_export


def rank(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=number, world_size=2)
    world, model = World(number, 2, torch.device("cpu")), slots.build("model", MODEL)
    if number == 1:
        state.inherit = None  # type: ignore[assignment]  # whoever calls it fails

    fresh, parent = state.inherit_for_all(model, InitConfig(f"{folder}/export"), world)
    assert fresh == [] and parent["run"] == "toy"
    safetensors.torch.save_file(model.state_dict(), f"{folder}/{number}.safetensors")
    with pytest.raises(CheckpointError, match="nosuch: neither a folder"):
        state.inherit_for_all(model, InitConfig(f"{folder}/nosuch"), world)
    dist.destroy_process_group()


def test_the_main_rank_reads_for_all_and_its_error_is_everybodys(tmp_path: Path) -> None:
    expected = write_export(tmp_path / "export").state_dict()
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)
    for number in (0, 1):
        found = safetensors.torch.load_file(tmp_path / f"{number}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
