"""Sandglasset against torch's LSTM, attention and convolutions, channels first."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.sandglasset import GlobalAttention, Sandglasset
from tests.support.model_checks import (
    gradients,
    improvement_learnt,
    relative,
    shaken,
)


def small(**changes: object) -> Sandglasset:
    """A model whose sizes all differ, with weights that make every term of the arithmetic count."""
    torch.manual_seed(0)
    sizes = {
        "num_filters": 14,
        "kernel_size": 8,
        "stride": 4,
        "num_features": 12,
        "chunk_size": 32,
        "num_hidden": 5,
    }
    others = {"num_speakers": 2, "num_blocks": 5, "num_heads": 3}
    return shaken(Sandglasset(**(others | sizes | changes)))


def textbook(model: Sandglasset, mixture: Tensor) -> Tensor:
    """The network with torch's modules, channels first."""

    def norm(x: Tensor, *affine: Tensor) -> Tensor:
        """Over the channels of [B, F, ...]."""
        return F.layer_norm(x.movedim(1, -1), (x.shape[1],), *affine).movedim(-1, 1)

    size, speakers = model.chunk_size, model.num_speakers
    encoded = F.conv1d(mixture[:, None], model.encoder.weight[:, None], stride=model.stride).relu()
    x = F.conv1d(norm(encoded), model.bottleneck.weight[..., None], model.bottleneck.bias)
    fold = {"kernel_size": (size, 1), "padding": (size, 0), "stride": (size // 2, 1)}
    x = F.unfold(x[..., None], **fold).unflatten(1, (x.shape[1], size))  # [B, F, K, C]
    batch, features, _, chunks = x.shape
    outputs: list[Tensor] = []
    for block, (local, coarse) in enumerate(zip(model.local, model.coarse, strict=True)):
        rows = x.permute(0, 3, 2, 1).flatten(0, 1)
        rows = local.linear(local.lstm(rows)[0])
        x = x + norm(
            rows.unflatten(0, (batch, chunks)).permute(0, 3, 2, 1),
            local.norm.weight,
            local.norm.bias,
        )

        factor = 4 ** min(block, len(model.local) - 1 - block)
        sample = {"stride": factor, "groups": features}
        rows = x.permute(0, 3, 1, 2).flatten(0, 1)  # [B C, F, K]
        rows = F.conv1d(rows, coarse.down_taps.T[:, None], coarse.down_bias, **sample)
        y = rows.unflatten(0, (batch, chunks)).permute(0, 3, 1, 2).flatten(0, 1)  # [B Q, C, F]
        y = F.layer_norm(y, (features,), coarse.attention_norm.weight, coarse.attention_norm.bias)
        angles = torch.arange(chunks)[:, None] / 10000 ** (torch.arange(0, features, 2) / features)
        y[..., 0::2] += angles.sin()
        y[..., 1::2] += angles.cos()
        attention = nn.MultiheadAttention(
            features, coarse.attention.num_heads, batch_first=True, dtype=y.dtype
        )
        replaced = {
            "in_proj_weight": coarse.attention.qkv.weight,
            "in_proj_bias": coarse.attention.qkv.bias,
            "out_proj.weight": coarse.attention.out.weight,
            "out_proj.bias": coarse.attention.out.bias,
        }
        attended, _ = torch.func.functional_call(attention, replaced, (y, y, y))
        y = F.layer_norm(y + attended, (features,), coarse.norm.weight, coarse.norm.bias)
        rows = y.unflatten(0, (batch, -1)).permute(0, 2, 3, 1).flatten(0, 1)  # [B C, F, Q]
        rows = F.conv_transpose1d(rows, coarse.up_taps.T[:, None], coarse.up_bias, **sample)
        x = rows.unflatten(0, (batch, chunks)).permute(0, 2, 3, 1)
        mirror = len(model.local) - 1 - block
        if mirror < block:
            x = x + outputs[mirror]
        outputs.append(x)
    weight = model.mask_conv.weight[..., None, None]
    masks = F.conv2d(F.prelu(x, model.prelu.weight), weight, model.mask_conv.bias)  # [B, S E, K, C]
    masks = F.fold(masks.flatten(1, 2), (encoded.shape[2], 1), **fold)[..., 0]
    masked = masks.relu().unflatten(1, (speakers, -1)) * encoded[:, None]
    waves = F.conv_transpose1d(
        masked.flatten(0, 1), model.decoder.weight.T[:, None], stride=model.stride
    )
    return waves.view(batch, speakers, -1)


def test_the_paper_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Sandglasset().parameters()) == 2_296_705


@pytest.mark.parametrize("num_blocks", [6, 5, 1])
def test_estimates_and_all_gradients_agree_with_the_textbook_in_float64(num_blocks: int) -> None:
    model = small(num_blocks=num_blocks).double().eval()
    mixture = torch.randn(2, 8 + 4 * 70, dtype=torch.float64)
    # The sinusoids are fp32 numbers, so that they are the same in every type.
    assert relative(model(mixture), textbook(model, mixture)) < 1e-6
    for got, expected in zip(
        gradients(model, mixture), gradients(model, mixture, textbook), strict=True
    ):
        assert relative(got, expected) < 1e-5


def test_granularity_turns_coarser_and_then_finer() -> None:
    factors = [len(coarse.down_taps) for coarse in small(num_blocks=6).coarse]
    assert factors == [1, 4, 16, 16, 4, 1]


def test_the_coarse_attention_sees_other_chunks_at_the_same_places_only() -> None:
    torch.manual_seed(0)
    layer = GlobalAttention(8, 2, 4, dropout=0.0).double()
    x = torch.randn(1, 3, 16, 8, dtype=torch.float64, requires_grad=True)
    # The gradient of one feature: those of a layer-normed row sum to nothing.
    (dx,) = torch.autograd.grad(layer(x)[0, 1, 6, 0], x)
    seen = dx[0].abs().amax(-1) > 0
    assert seen[:, 4:8].all() and not seen[:, :4].any() and not seen[:, 8:].any()


def test_dropout_follows_the_seed_in_training_and_is_off_in_evaluation() -> None:
    model, mixture = small(), torch.randn(1, 200)

    def estimates(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(mixture)

    assert torch.equal(estimates(1), estimates(1)) and not torch.equal(estimates(1), estimates(2))
    model.eval()
    assert torch.equal(estimates(1), estimates(2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk_size": 40}, "chunk_size=40.*16"),
        ({"num_blocks": 0}, "num_blocks=0"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_some_steps_on_one_batch_learn_it() -> None:
    torch.manual_seed(0)
    first, last = improvement_learnt(Sandglasset(2, 32, 16, 8, 16, 16, 3, 64, 2), 5e-3)
    assert last > first + 5 and last > 5


def test_the_paper_size_goes_forward_and_back_over_a_second() -> None:
    model = Sandglasset()
    model(torch.randn(1, 8000)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
