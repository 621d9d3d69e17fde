"""Conv-TasNet: mixture [B, T] in, one waveform per speaker [B, S, T] out.

Luo and Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech
Separation", 2019, with gLN, skip connections and ReLU masks. The defaults are the size of paper 1's
experiments: 5,050,545 parameters for two speakers. Inside, tensors are channels-last.

Shapes: B batch, S speakers, T samples, N frames, F encoder filters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models import frames
from sepdist.models.causal import CausalConvBlock, Past, Streamer, cumulative_norm
from sepdist.models.conv_block import ConvBlock, compiled_if, init_uniform
from sepdist.models.dual_path import global_norm


def apply_masks(masks_BNSF: Tensor, encoded_BNF: Tensor, activation: str = "relu") -> Tensor:
    """The masks of every speaker times the encoded frames, [B, N, S, F]."""
    return frames.MASKS[activation](masks_BNSF) * encoded_BNF.unsqueeze(2)


class NormLinear(nn.Module):
    """gLN and a 1x1 convolution in fp32 or wider, [B, N, F] -> [B, N, out] (equation 9)."""

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))
        self.shift = nn.Parameter(torch.zeros(num_features))
        self.weight = nn.Parameter(torch.empty(num_outputs, num_features))
        self.bias = nn.Parameter(torch.empty(num_outputs))
        init_uniform((self.weight, self.bias), num_features)

    def forward(self, x_BNF: Tensor, past: Past | None = None) -> Tensor:
        """Normalise each item of the batch, by cLN where there is a `past`, then multiply."""
        with torch.autocast(x_BNF.device.type, enabled=False):
            if past is None:
                normalised_BNF = global_norm(x_BNF, self.gain, self.shift)
            else:
                normalised_BNF = cumulative_norm(x_BNF, self.gain, self.shift, past)
            return F.linear(normalised_BNF, self.weight, self.bias)


class ConvTasNet(nn.Module):
    """Encoder, temporal convolution network that masks the encoded frames, decoder.

    `output_parameters` are the prefixes of the speaker-specific parameters: the last 1x1
    convolution, which a new task reinitialises. `compile=False` runs the same arithmetic without
    `torch.compile`. With `masking=False` the network's output is decoded directly instead of being
    multiplied by the encoded frames, which are zero where the input is zero; this lets a model fill
    in masked input (MAMA). The parameters are the same.

    With `causal=True` an estimate depends on the mixture up to `kernel_size` samples behind it
    alone: convolutions look back, gLN becomes cLN (section II-D, causal.py), and `streamer` gives
    the estimates block by block. The parameters have the same names and sizes.
    """

    output_parameters: tuple[str, ...] = ("mask_conv",)

    def __init__(
        self,
        num_speakers: int = 2,
        num_filters: int = 512,
        kernel_size: int = 16,
        stride: int = 8,
        num_bottleneck: int = 128,
        num_hidden: int = 512,
        num_skip: int = 128,
        num_blocks: int = 8,
        num_repeats: int = 3,
        num_taps: int = 3,
        masking: bool = True,
        causal: bool = False,
        compile: bool = True,
        padding: str = "end",
        mask_activation: str = "relu",
    ) -> None:
        super().__init__()
        frames.check_counts(locals())
        frames.check_sizes(kernel_size, stride)
        frames.check_variant(padding, mask_activation)
        self.padding, self.mask_activation = padding, mask_activation
        self.num_speakers, self.num_filters, self.num_skip = num_speakers, num_filters, num_skip
        self.num_features = num_speakers * num_filters
        self.kernel_size, self.stride = kernel_size, stride
        self.min_length = kernel_size
        self.masking, self.compiled, self.causal = masking, compile, causal
        self.encoder = nn.Linear(kernel_size, num_filters, bias=False)
        self.bottleneck = NormLinear(num_filters, num_bottleneck)
        block = CausalConvBlock if causal else ConvBlock
        self.blocks = nn.ModuleList(
            block(num_bottleneck, num_hidden, num_skip, num_taps, 2**index, compile)
            for _ in range(num_repeats)
            for index in range(num_blocks)
        )
        self.prelu = nn.PReLU()
        self.mask_conv = nn.Linear(num_skip, self.num_features)
        self.decoder = nn.Linear(num_filters, kernel_size, bias=False)
        frames.init_filterbank(self.encoder, self.decoder)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T] of the speakers, in no particular order."""
        encoded_BNF = frames.encode(mixture_BT, self.encoder, self.stride, self.padding)
        masked_BNSF, length = self.masked(encoded_BNF, Past()), mixture_BT.shape[1]
        return frames.decode(masked_BNSF, self.decoder, self.stride, length, self.padding)

    def features(self, mixture_BT: Tensor) -> Tensor:
        """The network's output [B, N, num_features], before it is applied as masks."""
        encoded_BNF = frames.encode(mixture_BT, self.encoder, self.stride, self.padding)
        return F.relu(self._output(encoded_BNF, Past()))

    def streamer(self) -> Streamer:
        """Separate one mixture block by block; ValueError unless the model is causal."""
        if not self.causal or self.padding != "end":
            needs = "causal: true and padding: end separates streams"
            raise ValueError(f"this Conv-TasNet needs whole mixtures; one with {needs}")
        return Streamer(self)

    def masked(self, encoded_BNF: Tensor, past: Past) -> Tensor:
        """Masked features [B, N, S, F] of encoded frames that follow those of `past`."""
        masks_BNSF = self._output(encoded_BNF, past).unflatten(-1, (self.num_speakers, -1))
        if self.masking:
            masks = compiled_if(self.compiled, apply_masks)
            return masks(masks_BNSF, encoded_BNF, self.mask_activation)
        return F.relu(masks_BNSF)

    def _output(self, encoded_BNF: Tensor, past: Past) -> Tensor:
        """The network's output [B, N, S * F] for the encoded frames."""
        x = self.bottleneck(encoded_BNF, past if self.causal else None)
        skip = x.new_zeros(*x.shape[:2], self.num_skip)
        for block in self.blocks:
            x, skip = block(x, skip, past) if self.causal else block(x, skip)
        return self.mask_conv(self.prelu(skip))
