"""Snapshots and checkpointers of a tiny model, saved and compared."""

import torch

from sepdist import slots
from sepdist.training.checkpoint import (
    Checkpointer,
    OptimizerState,
    Snapshot,
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
    model = slots.build("model", NODE)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {f"exp_avg/{name}": torch.randn_like(value) for name, value in weights.items()}
    return Snapshot(
        step,
        weights,
        OptimizerState(moments, {"step": float(step)}),
        {"samples_seen": 8 * step},
        score,
    )


def checkpointer(run_dir: object, **options: object) -> Checkpointer:
    arguments = {
        "model_node": NODE,
        "sample_rate": 8000,
        "lineage": {"run": "r"},
        "keep_last": 2,
        "keep_best": True,
    }
    return Checkpointer(str(run_dir), **(arguments | options))


def save(run_dir: object, *snapshots: Snapshot, **options: object) -> None:
    writer = checkpointer(run_dir, **options)
    for one in snapshots:
        writer.save(one)
    writer.close()


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    assert one.step == other.step and one.state["samples_seen"] == other.state["samples_seen"]
    assert one.optimizer.scalars == other.optimizer.scalars
    for mine, its in (
        (one.weights, other.weights),
        (one.optimizer.tensors, other.optimizer.tensors),
    ):
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in mine)
