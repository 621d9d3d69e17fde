"""With a published implementation's weights our models give its estimates; else skipped."""

import pytest
import torch
from torch import nn

from benchmarks.peers import PEERS
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.models.dprnn import DPRNN
from sepdist.models.dptnet import DPTNet
from sepdist.models.sepformer import SepFormer

CODEC = {"num_speakers": 3, "num_filters": 24, "kernel_size": 8, "stride": 4}
SIZES = {
    "conv_tasnet": {
        "num_bottleneck": 12,
        "num_hidden": 20,
        "num_skip": 8,
        "num_blocks": 3,
        "num_repeats": 2,
    },
    "dprnn": {"num_bottleneck": 16, "num_hidden": 64, "chunk_size": 10, "num_repeats": 2},
    "dptnet": {"num_heads": 4, "num_hidden": 64, "chunk_size": 10, "num_repeats": 2},
    "sepformer": {
        "num_heads": 4,
        "num_hidden": 48,
        "chunk_size": 10,
        "num_blocks": 2,
        "num_layers": 2,
    },
}
MODELS: dict[str, type[nn.Module]] = {
    "conv_tasnet": ConvTasNet,
    "dprnn": DPRNN,
    "dptnet": DPTNet,
    "sepformer": SepFormer,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "num_frames", [3, 61, 75, 80]
)  # with chunks of 10, two of them at an exact end of one
def test_estimates_are_the_peers_with_the_peers_weights(name: str, num_frames: int) -> None:
    torch.manual_seed(0)
    sizes = CODEC | SIZES[name] | ({"num_taps": 3} if name == "conv_tasnet" else {})
    try:
        peer = PEERS[name].build(sizes).eval()
    except ImportError as error:
        pytest.skip(f"{error}; to compare, install (without dependencies) {PEERS[name].packages}")
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ours = MODELS[name](**sizes, **({"compile": False} if name == "conv_tasnet" else {}))
        ours.load_state_dict(PEERS[name].weights(peer.state_dict()))
        mixture = torch.randn(
            2, 8 + 4 * (num_frames - 1)
        )  # whole frames: peers drop the samples behind the last
        expected = peer(mixture)
        assert sum(p.numel() for p in ours.parameters()) == sum(
            p.numel() for p in peer.parameters()
        )
        assert float((ours(mixture) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("name", "deviation"),
    [  # worked out by hand for 512 filters of 16 samples
        *((name, 0.0156098) for name in ("conv_tasnet", "dprnn", "dptnet")),  # sqrt(2 / 8208)
        ("sepformer", 0.1443376),  # uniform within 1 / sqrt(16): 0.25 / sqrt(3)
    ],
)
def test_encoder_and_decoder_start_at_the_scale_of_the_peer(name: str, deviation: float) -> None:
    torch.manual_seed(0)
    sizes = CODEC | SIZES[name] | {"num_filters": 512, "kernel_size": 16, "stride": 8}
    ours = MODELS[name](**sizes)
    weights = [ours.encoder.weight, ours.decoder.weight]
    try:
        peer = PEERS[name].build({"num_taps": 3} | sizes)
    except ImportError:
        pass
    else:
        theirs = PEERS[name].weights(peer.state_dict())
        weights += [theirs["encoder.weight"], theirs["decoder.weight"]]
    for weight in map(torch.Tensor.detach, weights):  # 8192 draws estimate it to about 0.8 %
        assert float(weight.std()) == pytest.approx(deviation, rel=0.04)
        assert abs(float(weight.mean())) < 0.05 * deviation
