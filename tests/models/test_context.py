"""Context network: the paper's sizes, torch's Transformer layer as oracle, no leaks."""

import pytest
import torch
from torch import nn

from sepdist.models.context import ContextModel, TransformerLayer
from sepdist.models.conv_tasnet import ConvTasNet
from tests.support.context import tiny_context


def test_at_full_size_three_seconds_are_750_frames() -> None:
    model = ContextModel(ConvTasNet(1, compile=False), num_layers=2)
    assert sum(p.numel() for p in model.parameters()) == 28_434_865
    assert model.num_frames(24000) == 750
    mixture = torch.randn(1, 4001)
    features, predictions = model(mixture, torch.zeros(1, model.num_frames(4001), dtype=torch.bool))
    assert features.shape == predictions.shape == (1, model.num_frames(4001), 2048)
    assert model.down.weight.shape == (2048, 512 // 16, 129)


def test_without_hidden_frames_it_is_the_separator() -> None:
    model, mixture = tiny_context(), torch.randn(2, 700)
    assert torch.equal(model(mixture), model.separator(mixture))


def test_features_are_the_rectified_output_of_the_mask_layer() -> None:
    torch.manual_seed(0)
    model, mixture = ConvTasNet(1, 16, 16, 8, 8, 12, 8, 2, 1, compile=False), torch.randn(2, 300)
    seen = []
    model.mask_conv.register_forward_hook(lambda module, given, result: seen.append(result))
    assert torch.equal(model.features(mixture), seen[0].relu()) and model.features(
        mixture
    ).shape == (2, 37, 16)
    model.masking = False
    assert torch.equal(model.decoder(seen[0].relu())[:, :, :8][:, 0], model(mixture)[:, 0, :8]), (
        "first frame, alone"
    )


def test_predictions_do_not_see_what_is_hidden() -> None:
    model = tiny_context().eval()
    hidden = torch.zeros(2, model.num_frames(700), dtype=torch.bool)
    hidden[0, 10:17] = hidden[1, 3:9] = True
    features, predictions = model(torch.randn(2, 700), hidden)
    features.retain_grad()
    predictions.square().sum().backward()
    assert torch.equal(features.grad.abs().sum(-1) == 0, hidden)


def test_a_layer_is_torchs_own_post_norm_layer() -> None:
    torch.manual_seed(0)
    ours = TransformerLayer(24, 4, 40, 0.0)
    theirs = nn.TransformerEncoderLayer(24, 4, 40, 0.0, nn.functional.gelu, batch_first=True)
    pairs = {
        "self_attn.in_proj_": ours.attend,
        "self_attn.out_proj.": ours.join,
        "linear1.": ours.expand,
    }
    pairs |= {"linear2.": ours.contract, "norm1.": ours.norm1, "norm2.": ours.norm2}
    weights = {
        name + kind: getattr(layer, kind)
        for name, layer in pairs.items()
        for kind in ("weight", "bias")
    }
    theirs.load_state_dict(weights)
    x = torch.randn(2, 9, 24)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_layers_share_their_weights() -> None:
    counts = {sum(p.numel() for p in tiny_context(num_layers=n).parameters()) for n in (1, 6)}
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"kernel_size": 8}, "kernel_size=8"), ({"num_heads": 5}, "num_heads=5")),
        *(({"num_layers": -1}, "num_layers=-1"), ({"num_heads": -1}, "num_heads=-1")),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_context(**options)


def test_a_separator_that_pads_otherwise_is_refused_as_frames_are_counted() -> None:
    with pytest.raises(ValueError, match=r"separator\.padding='both': choose end"):
        ContextModel(ConvTasNet(num_filters=8, padding="both", compile=False))


def test_a_separator_without_features_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="Conv1d has no features"):
        ContextModel(nn.Conv1d(1, 1, 1))
