"""A tiny context network."""

import torch

from sepdist.models.context import ContextModel
from sepdist.models.conv_tasnet import ConvTasNet


def tiny_context(**options: object) -> ContextModel:
    torch.manual_seed(0)
    separator = ConvTasNet(1, 16, 16, 8, 8, 12, 8, num_blocks=2, num_repeats=1, compile=False)
    sizes = {
        "num_targets": 24,
        "kernel_size": 9,
        "stride": 2,
        "num_groups": 4,
        "num_hidden": 32,
        "num_heads": 4,
    }
    sizes |= {"num_feedforward": 48, "num_layers": 2, "num_position_taps": 9}
    return ContextModel(separator, **(sizes | options))
