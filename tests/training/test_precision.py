"""The precision asked for is that of the layers inside the model, as they would run on a GPU."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from sepdist.config import ValidationConfig
from sepdist.data.records import Batch
from sepdist.training.engine import DeepSpeedEngine
from sepdist.training.validation import validate
from sepdist.training.world import World

# ZeRO 3 comes last, because DeepSpeed then replaces functions of torch for good.
COMBINATIONS = [
    (reduction, stage, precision)
    for stage in range(4)
    for reduction in ("canonical", "native")
    for precision in ("fp32", "bf16")
    if (reduction, stage) != ("canonical", 3)
]


class Layers(nn.Module):
    """A convolution, a linear layer and a transposed convolution, noting the dtypes of outputs."""

    def __init__(self, note: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.linear = nn.Linear(4, 4)
        self.transposed = nn.ConvTranspose1d(4, 1, 3, padding=1)
        for name, layer in self.named_children():
            layer.register_forward_hook(
                lambda _, __, output, name=name: note(name, output)  # type: ignore[misc]
            )

    def forward(self, mixture_BT: Tensor) -> Tensor:
        hidden_BNT = self.linear(self.conv(mixture_BT[:, None]).transpose(1, 2)).transpose(1, 2)
        return self.transposed(hidden_BNT)


def squared_error(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    error_BST = (model(batch.mixture).float() - batch.sources) ** 2
    return error_BST.mean(), {"error": error_BST.mean((1, 2))}


def batch_of(position: int) -> Batch:
    wave = torch.randn(1, 40, generator=torch.Generator().manual_seed(position))
    return Batch([str(position)], torch.tensor([position]), wave, wave[:, None], None, [40])


def note_dtypes(rank: int, world_size: int, folder: str) -> None:
    """Step and validate in every combination; write the dtypes of outputs, weights and moments."""
    plain = torch.is_autocast_enabled
    # Without an argument it asks about CUDA; here it has the answer that a GPU would give.
    torch.is_autocast_enabled = lambda device="cpu": plain(device)  # type: ignore[assignment]
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found: dict[str, Any] = {}
    for reduction, stage, precision in COMBINATIONS:
        seen: dict[str, set[str]] = {}
        engine = DeepSpeedEngine(
            Layers(
                lambda name, output, seen=seen: seen.setdefault(name, set()).add(str(output.dtype))
            ),
            squared_error,
            functools.partial(torch.optim.Adam, lr=1e-3),
            World(rank, world_size, torch.device("cpu")),
            seed=0,
            num_virtual_shards=2,
            micro_batch=1,
            zero_stage=stage,
            precision=precision,
            reduction=reduction,
            allow_slow_bf16=True,
        )
        losses = [
            engine.step([batch_of(shard) for shard in engine.owned])[-1].loss for _ in range(2)
        ]
        trained, _ = dict(seen), seen.clear()
        data_set: Any = SimpleNamespace(
            manifest=SimpleNamespace(num_samples=2), full=lambda index, _: batch_of(index)
        )
        validate(engine, squared_error, data_set, engine.world, ValidationConfig())
        kept = {
            str(v.dtype)
            for v in [*engine.weights().values(), *engine.optimizer_state().tensors.values()]
        }
        found["-".join(map(str, (reduction, stage, precision)))] = {
            "training": {name: sorted(dtypes) for name, dtypes in trained.items()},
            "validation": {name: sorted(dtypes) for name, dtypes in seen.items()},
            "kept": sorted(kept),
            "losses": losses,
        }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dtypes")
    mp.start_processes(note_dtypes, (1, str(folder)), nprocs=1, start_method="forkserver")
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("reduction", "stage", "precision"), COMBINATIONS)
def test_every_layer_computes_in_the_precision_asked_for(
    reduction: str, stage: int, precision: str, found: dict[str, Any]
) -> None:
    dtype = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]
    one = found[f"{reduction}-{stage}-{precision}"]
    for phase, layer in itertools.product(
        ("training", "validation"), ("conv", "linear", "transposed")
    ):
        assert one[phase][layer] == [dtype], (phase, layer)
    assert one["kept"] == ["torch.float32"], "weights and moments stay in fp32"


def test_native_steps_in_bf16_are_those_of_canonical_reduction_to_its_rounding(
    found: dict[str, Any],
) -> None:
    for stage in range(4):
        ours, expected = (
            found[name]["losses"] for name in (f"native-{stage}-bf16", "canonical-0-bf16")
        )
        assert ours == pytest.approx(expected, rel=1e-2)
        assert ours[0] != found[f"native-{stage}-fp32"]["losses"][0]
