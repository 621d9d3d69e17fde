"""Causal Conv-TasNet: its equations, what it may not hear, and its estimates block by block."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import PEERS
from sepdist.models.conv_tasnet import ConvTasNet
from tests.support.model_checks import gradients, moved_differ, relative, shaken

SIZES = {"num_filters": 24, "kernel_size": 8, "stride": 4, "num_bottleneck": 12}
SIZES |= {"num_hidden": 20, "num_skip": 8, "num_blocks": 3, "num_repeats": 2}


def small(**changes: object) -> ConvTasNet:
    torch.manual_seed(0)
    return shaken(
        ConvTasNet(**({"num_speakers": 3, "causal": True, "compile": False} | SIZES | changes))
    )


def textbook(model: ConvTasNet, mixture: Tensor) -> Tensor:
    """Section II-D frame by frame, channels first, of mixtures that fill whole frames."""

    def cln(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        heard = [x[:, :, : frame + 1] for frame in range(x.shape[2])]
        means = torch.stack([one.mean((1, 2)) for one in heard], 1)[:, None]
        variances = torch.stack([one.var((1, 2), correction=0) for one in heard], 1)[:, None]
        return gain[:, None] * (x - means) / (variances + 1e-8).sqrt() + shift[:, None]

    encoded = F.conv1d(mixture[:, None], model.encoder.weight[:, None], stride=model.stride)
    x = cln(encoded, model.bottleneck.gain, model.bottleneck.shift)
    x = F.conv1d(x, model.bottleneck.weight[..., None], model.bottleneck.bias)
    total: Tensor | float = 0.0
    for block in model.blocks:
        y = F.prelu(F.conv1d(x, block.in_weight[..., None], block.in_bias), block.prelu1)
        y = F.pad(cln(y, block.gain1, block.shift1), (2 * block.dilation, 0))
        taps = {"dilation": block.dilation, "groups": y.shape[1]}
        y = F.conv1d(y, block.taps.T[:, None], block.taps_bias, **taps)
        y = cln(F.prelu(y, block.prelu2), block.gain2, block.shift2)
        residual, skip = F.conv1d(y, block.out_weight[..., None], block.out_bias).split(
            [x.shape[1], model.num_skip], 1
        )
        x, total = x + residual, total + skip
    y = F.prelu(total, model.prelu.weight)
    masks = F.relu(F.conv1d(y, model.mask_conv.weight[..., None], model.mask_conv.bias))
    masked = (masks.unflatten(1, (3, -1)) * encoded[:, None]).flatten(0, 1)
    waves = F.conv_transpose1d(masked, model.decoder.weight.T[:, None], stride=model.stride)
    return waves.view(len(mixture), 3, -1)


def streamed(model: ConvTasNet, mixture_T: Tensor, size: int) -> Tensor:
    stream = model.streamer()
    blocks = [stream.push(block) for block in mixture_T.split(size)]
    return torch.cat([*blocks, stream.finish()], dim=1)


def test_estimates_and_gradients_are_those_of_the_equations_frame_by_frame() -> None:
    model, mixture = small(num_repeats=1).double(), torch.randn(2, 56, dtype=torch.float64)
    assert relative(model(mixture), textbook(model, mixture)) < 1e-10
    pairs = zip(gradients(model, mixture), gradients(model, mixture, textbook), strict=True)
    assert all(torch.allclose(got, wanted, rtol=1e-8, atol=1e-8) for got, wanted in pairs)


def test_estimates_are_asteroids_with_its_weights() -> None:
    models = pytest.importorskip("asteroid.models")
    words = {"bn_chan": 12, "hid_chan": 20, "skip_chan": 8, "n_blocks": 3, "n_repeats": 2}
    words |= {"kernel_size": 8, "stride": 4, "n_filters": 24, "conv_kernel_size": 3}
    words |= {"norm_type": "cgLN", "mask_act": "relu", "encoder_activation": None}
    torch.manual_seed(0)
    peer = shaken(models.ConvTasNet(3, causal=True, **words))
    # A causal convolution is the first of two modules there.
    state = {
        name.replace("shared_block.3.0.", "shared_block.3."): value
        for name, value in peer.state_dict().items()
    }
    model = small()
    model.load_state_dict(PEERS["conv_tasnet"].weights(state))
    mixture = torch.randn(2, 8 + 4 * 99)
    assert relative(model(mixture), peer(mixture)) < 1e-5


def test_an_estimate_depends_on_nothing_a_window_or_more_behind_it() -> None:
    model, mixture = small(), torch.randn(1, 400)
    changed = torch.cat([mixture[:, :200], torch.zeros(1, 200)], 1)
    differs_T = (model(mixture) - model(changed)).abs().amax((0, 1)) > 0
    # 200 is a multiple of the stride of 4: the frame from 196 on is the first to hear it.
    assert differs_T[196:].any() and not differs_T[:196].any()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 203])
@pytest.mark.parametrize("size", [1, 3, 17, 500])
def test_the_blocks_of_a_stream_are_the_estimates_of_the_whole_mixture(
    length: int, size: int
) -> None:
    model, mixture_T = small(), torch.randn(length)
    padded = F.pad(mixture_T, (0, max(0, 8 - length)))[None]  # the model takes 8 samples or more
    whole_ST = model(padded)[0, :, :length]
    got_ST = streamed(model, mixture_T, size)
    assert got_ST.shape == whole_ST.shape and relative(got_ST, whole_ST) < 1e-5


def test_a_stream_gives_each_sample_within_its_latency() -> None:
    stream, given = small().streamer(), 0
    assert stream.latency_samples == 8
    for heard in range(1, 100):
        given += stream.push(torch.randn(1)).shape[1]
        assert given >= heard - stream.latency_samples + 1


def test_two_streams_of_a_model_do_not_hear_each_other() -> None:
    model, mixture_T = small(), torch.randn(60)
    one, other = model.streamer(), model.streamer()
    first = [one.push(mixture_T[:30]), other.push(torch.randn(30))][0]
    got_ST = torch.cat([first, one.push(mixture_T[30:]), one.finish()], 1)
    assert relative(got_ST, model(mixture_T[None])[0]) < 1e-5


def test_half_a_minute_of_speech_does_not_wear_out_the_cumulative_norm() -> None:
    model = small(num_blocks=1, num_repeats=1)
    mixture = 1 + torch.randn(1, 240_000) / 10
    wide, narrow = model.double()(mixture.double()), model.float()(mixture)
    assert relative(narrow[..., -800:].double(), wide[..., -800:]) < 1e-4


def test_without_masks_a_causal_model_streams_too() -> None:
    model, mixture_T = small(masking=False), torch.randn(90)
    assert relative(streamed(model, mixture_T, 13), model(mixture_T[None])[0]) < 1e-5


def test_only_a_causal_model_streams() -> None:
    with pytest.raises(ValueError, match="causal: true and padding: end"):
        small(causal=False).streamer()


def test_a_causal_model_has_the_parameters_of_one_that_is_not() -> None:
    shapes = [
        {name: value.shape for name, value in small(causal=causal).state_dict().items()}
        for causal in (True, False)
    ]
    assert shapes[0] == shapes[1]


def test_silence_and_bf16_give_finite_estimates_near_those_of_fp32() -> None:
    model = small()
    model(torch.zeros(2, 100)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    mixture = torch.randn(2, 400)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimates = model(mixture)
    assert estimates.dtype == torch.float32 and relative(estimates, model(mixture)) < 0.05


def test_where_the_parameters_lie_in_memory_changes_no_bit() -> None:
    assert moved_differ(small(), torch.randn(2, 100)) == []
