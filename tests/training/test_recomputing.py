"""Blocks that run again for the gradient give the same bits as those that keep everything."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepdist import slots
from sepdist.config import ConfigError
from sepdist.training.recomputing import outermost, recompute_blocks

SMALL: dict[str, tuple[dict[str, Any], int]] = {  # arguments, and the number of blocks
    "conv_tasnet.ConvTasNet": (
        {"num_filters": 16, "num_bottleneck": 8, "num_hidden": 12, "num_skip": 8, "num_blocks": 2},
        6,
    ),
    "dprnn.DPRNN": (
        {"num_filters": 8, "num_bottleneck": 8, "num_hidden": 8, "chunk_size": 20}, 12
    ),
    "dptnet.DPTNet": ({"num_filters": 8, "num_heads": 2, "num_hidden": 8, "chunk_size": 20}, 12),
    "sepformer.SepFormer": (
        {"num_filters": 16, "chunk_size": 20, "num_layers": 2, "num_heads": 2, "num_hidden": 16},
        4,
    ),
    "sandglasset.Sandglasset": (
        {"num_filters": 8, "num_features": 8, "chunk_size": 32, "num_blocks": 4, "num_heads": 2},
        8,
    ),
}  # fmt: skip


class PlugIn(nn.Module):
    """A stranger's model: blocks with dropout, and lists in a submodule and in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(nn.ModuleDict({"own": self._block()}) for _ in range(2))
        self.tail = nn.ModuleList([self._block()])

    def _block(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, mixture_BT: Tensor) -> Tensor:
        x = mixture_BT.unsqueeze(-1)
        for block in self.body.blocks:
            x = x + block["own"](x)
        return (x + self.tail[0](x)).squeeze(-1).unsqueeze(1)


def small(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return slots.build("model", {"_target_": f"sepdist.models.{name}"} | SMALL[name][0] | more)


def results(model: nn.Module, bf16: bool) -> tuple[list[Tensor], int]:
    """The loss and the gradients, and the bytes that the forward pass keeps for them."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    mixture = torch.randn(2, 800, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            estimates = model(mixture)
        loss = estimates.float().square().mean()
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return [loss, *grads], sum(kept.values())


def assert_same_bits(model: nn.Module, bf16: bool) -> None:
    expected, before = results(model, bf16)
    recompute_blocks(model)
    found, after = results(model, bf16)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert any(bool(one.abs().max() > 0) for one in found[1:])
    assert after < before


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL)
def test_losses_and_gradients_keep_their_bits_and_less_is_kept(name: str, bf16: bool) -> None:
    model = small(name, **({"compile": False} if "conv_tasnet" in name else {}))
    assert len(outermost(model)) == SMALL[name][1]
    assert_same_bits(model, bf16)


@pytest.mark.slow
def test_compiled_blocks_keep_their_bits_too() -> None:
    assert_same_bits(small("conv_tasnet.ConvTasNet"), False)


def test_the_blocks_of_a_plug_in_are_found_and_its_dropout_is_repeated() -> None:
    model = PlugIn()
    assert len(outermost(model)) == 3
    names, copied = list(model.state_dict()), copy.deepcopy(model)
    assert_same_bits(copied.train(), False)
    assert list(copied.state_dict()) == names == [name for name, _ in copied.named_parameters()]


def test_a_sequence_of_blocks_of_one_class_is_a_list_of_them_and_one_of_layers_is_not() -> None:
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2)]
    assert outermost(nn.Sequential(nn.Linear(2, 3), nn.Sequential(*blocks), nn.Tanh())) == blocks


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint_activations=true: Linear keeps no blocks"):
        recompute_blocks(nn.Linear(2, 2))
