"""With Asteroid's weights, our models give Asteroid's estimates. Skipped where Asteroid is not installed."""

import pytest
import torch
from torch import nn

from benchmarks.peers import PEERS
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.models.dprnn import DPRNN
from sepdist.models.dptnet import DPTNet

CODEC = {"num_speakers": 3, "num_filters": 24, "kernel_size": 8, "stride": 4}
SIZES = {
    "conv_tasnet": {"num_bottleneck": 12, "num_hidden": 20, "num_skip": 8, "num_blocks": 3, "num_repeats": 2},
    "dprnn": {"num_bottleneck": 16, "num_hidden": 64, "chunk_size": 10, "num_repeats": 2},
    "dptnet": {"num_heads": 4, "num_hidden": 64, "chunk_size": 10, "num_repeats": 2},
}
MODELS: dict[str, type[nn.Module]] = {"conv_tasnet": ConvTasNet, "dprnn": DPRNN, "dptnet": DPTNet}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_frames", [3, 61, 80])
def test_estimates_are_asteroids_with_asteroids_weights(name: str, num_frames: int) -> None:
    pytest.importorskip("asteroid", reason=f"to compare, install (without dependencies) {PEERS[name].packages}")
    torch.manual_seed(0)
    sizes = CODEC | SIZES[name] | ({"num_taps": 3} if name == "conv_tasnet" else {})
    peer = PEERS[name].build(sizes)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ours = MODELS[name](**sizes, compile=name != "conv_tasnet")
        ours.load_state_dict(PEERS[name].weights(peer.state_dict()))
        mixture = torch.randn(2, 8 + 4 * (num_frames - 1))  # whole frames: Asteroid drops the samples behind the last
        expected = peer(mixture)
        assert float((ours(mixture) - expected).norm() / expected.norm()) < 1e-5
