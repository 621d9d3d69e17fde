"""DPRNN and DPTNet against textbook versions in torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.dprnn import DPRNN
from sepdist.models.dptnet import DPTNet
from tests.support.dual_path import folded, unfolded
from tests.support.model_checks import (
    gradients,
    relative,
    shaken,
)

MODELS = (DPRNN, DPTNet)
SMALL = {
    "num_filters": 12,
    "kernel_size": 6,
    "stride": 2,
    "num_hidden": 64,
    "chunk_size": 10,
    "num_repeats": 2,
}


def small(kind: type[nn.Module], **changes: object) -> nn.Module:
    """A model whose sizes all differ, with weights that make every term of the arithmetic count."""
    torch.manual_seed(0)
    more = {"num_bottleneck": 20} if kind is DPRNN else {"num_heads": 3}
    return shaken(kind(**({"num_speakers": 3} | SMALL | more | changes)))


def gln(x: Tensor, norm: nn.Module, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return (
        norm.gain * centred / (centred.square().mean(dims, keepdim=True) + 1e-8).sqrt() + norm.shift
    )


def torch_attention(x: Tensor, ours: nn.Module) -> Tensor:
    rows = x.transpose(0, 1)
    return F.multi_head_attention_forward(
        rows, rows, rows, x.shape[-1], ours.num_heads, ours.qkv.weight, ours.qkv.bias, None, None,
        False, 0.0, ours.out.weight, ours.out.bias,
    )[0].transpose(0, 1)  # fmt: skip


def textbook(model: nn.Module, mixture: Tensor) -> Tensor:
    """The papers' equations on chunks [B, C, K, F], in their order."""
    recurrent = isinstance(model, DPRNN)
    steps = max(0, -(-(mixture.shape[1] - model.min_length) // model.stride))
    padded = F.pad(mixture, (0, steps * model.stride + model.min_length - mixture.shape[1]))
    encoded = F.conv1d(padded[:, None], model.encoder.weight[:, None], stride=model.stride).mT
    encoded = encoded if recurrent else F.relu(encoded)
    x = gln(encoded, model.norm, (1, 2))
    x = unfolded(
        F.linear(x, model.bottleneck.weight, model.bottleneck.bias) if recurrent else x,
        model.chunk_size,
    )
    for pair in zip(model.intra, model.inter, strict=True):
        for path in pair:
            rows = x.flatten(0, 1)
            if recurrent:
                y = F.linear(path.lstm(rows)[0], path.linear.weight, path.linear.bias).view_as(x)
                x = x + gln(y, path.norm, (1, 2, 3))
            else:
                rows = gln(
                    rows + torch_attention(rows, path.attention), path.attention_norm, (1, 2)
                )
                y = F.linear(F.relu(path.lstm(rows)[0]), path.linear.weight, path.linear.bias)
                x = gln(rows + y, path.norm, (1, 2)).view_as(x)
            x = x.transpose(1, 2)
    y = F.linear(F.prelu(x, model.prelu.weight), model.mask_conv.weight, model.mask_conv.bias)
    y = folded(y, encoded.shape[1]).unflatten(-1, (model.num_speakers, -1)) / (
        1 if recurrent else 2
    )
    values, gates = F.linear(y, model.gate.linear.weight, model.gate.linear.bias).chunk(2, -1)
    y = values.tanh() * gates.sigmoid()
    masks = F.relu(F.linear(y, model.mask.weight) if recurrent else y)
    masked = (masks * encoded[:, :, None]).permute(0, 2, 3, 1).flatten(0, 1)
    waves = F.conv_transpose1d(masked, model.decoder.weight.T[:, None], stride=model.stride)
    return waves.view(len(mixture), model.num_speakers, -1)[..., : mixture.shape[1]]


@pytest.mark.parametrize(
    ("kind", "changes", "count"),
    [
        (DPRNN, {}, 3_651_073),
        (DPRNN, {"num_bottleneck": 64}, 2_608_065),
        (DPTNet, {}, 8_527_233),
        (DPTNet, {"num_hidden": 128}, 2_801_025),
    ],
)
def test_the_sizes_of_paper_1_and_of_the_originals_have_their_numbers_of_parameters(
    kind: type[nn.Module], changes: dict, count: int
) -> None:
    assert sum(p.numel() for p in kind(2, **changes).parameters()) == count


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [101, 31, 6])
def test_estimates_and_all_gradients_agree_with_the_textbook_in_float64(
    kind: type[nn.Module], length: int
) -> None:
    model = small(kind).double()
    mixture = torch.randn(2, length, dtype=torch.float64)
    assert relative(model(mixture), textbook(model, mixture)) < 1e-12
    for got, expected in zip(
        gradients(model, mixture), gradients(model, mixture, textbook), strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_second_of_speech_passes_forth_and_back_at_full_size(kind: type[nn.Module]) -> None:
    model = kind(2)
    estimates = model(torch.randn(1, 8000))
    estimates.square().mean().backward()
    assert estimates.shape == (1, 2, 8000)
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any()
        for p in model.parameters()
    )
