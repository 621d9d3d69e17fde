"""SepFormer: mixture [B, T] in, one waveform per speaker [B, S, T] out, by attention in and across chunks.

Subakan et al., "Attention Is All You Need in Speech Separation", 2021, in the form that SpeechBrain published and
trained: 25,679,361 parameters for two speakers, no dropout, and to rounding the same estimates. That form has norms
the paper does not draw: one over each item before the chunks, one after each Transformer, and an even number of chunks.
Inside, tensors are channels-last; `torch.compile` compiles one layer, once, for all of them and all lengths.

Shapes: B batch, S speakers, T samples, N frames, F features, C chunks, K frames of a chunk, L places of a sequence.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sepdist.models.attention import attend, attention_parameters, sinusoids
from sepdist.models.dual_path import GlobalNorm, merge, segment
from sepdist.models.layers import apply_masks, cut_frames, has_compiler, overlap_add, widen

NORM_EPS = 1e-6


def _layer(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    gain2: Tensor,
    shift2: Tensor,
) -> Tensor:
    """Norm, attention, residual; norm, two products with a ReLU between, residual (equations 6 and 7)."""
    y = F.layer_norm(x, x.shape[-1:], gain1, shift1, NORM_EPS)
    x = x + attend(y, in_weight, in_bias, out_weight, out_bias)
    y = F.layer_norm(x, x.shape[-1:], gain2, shift2, NORM_EPS)
    return x + F.linear(F.relu(F.linear(y, up_weight, up_bias)), down_weight, down_bias)


@functools.cache
def _compiled_layer() -> Callable[..., Tensor]:
    return torch.compile(_layer, dynamic=True)


class TransformerLayer(nn.Module):
    """One pre-norm layer, [M, L, F] -> [M, L, F] for M sequences; its parameters are its own, as ZeRO-3 needs."""

    def __init__(self, num_features: int, num_heads: int, num_hidden: int, compile: bool) -> None:
        super().__init__()
        self.compiled = compile
        attention = attention_parameters(num_features, num_heads)
        self.in_weight, self.in_bias, self.out_weight, self.out_bias = attention
        self.up_weight = nn.Parameter(torch.empty(num_hidden, num_features))
        self.up_bias = nn.Parameter(torch.empty(num_hidden))
        self.down_weight = nn.Parameter(torch.empty(num_features, num_hidden))
        self.down_bias = nn.Parameter(torch.empty(num_features))
        for weight, bias in ((self.up_weight, self.up_bias), (self.down_weight, self.down_bias)):
            for parameter in (weight, bias):
                nn.init.uniform_(parameter, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        self.gain1, self.gain2 = (nn.Parameter(torch.ones(num_features)) for _ in range(2))
        self.shift1, self.shift2 = (nn.Parameter(torch.zeros(num_features)) for _ in range(2))

    def forward(self, x_MLF: Tensor) -> Tensor:
        """The next x."""
        layer = _compiled_layer() if self.compiled and has_compiler() else _layer
        return layer(
            x_MLF, self.in_weight, self.in_bias, self.out_weight, self.out_bias, self.up_weight, self.up_bias,
            self.down_weight, self.down_bias, self.gain1, self.shift1, self.gain2, self.shift2,
        )  # fmt: skip


class Transformer(nn.Module):
    """Positions, layers, layer norm, and gLN of the whole: [B, M, L, F] -> [B, M, L, F], attending along L."""

    def __init__(
        self, num_features: int, num_layers: int, num_heads: int, num_hidden: int, compile: bool, checkpointed: bool
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(
            TransformerLayer(num_features, num_heads, num_hidden, compile) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(num_features, eps=NORM_EPS)
        self.global_norm = GlobalNorm(num_features)

    def forward(self, x_BMLF: Tensor) -> Tensor:
        """Every sequence attends to itself alone; the gLN sees all sequences of an item."""
        x = (x_BMLF + sinusoids(x_BMLF.shape[2], x_BMLF)).flatten(0, 1)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.global_norm(self.layer_norm(x).view_as(x_BMLF))


class SepFormer(nn.Module):
    """Encoder, Transformers along the frames of each chunk (intra) and along the chunks (inter), masks, decoder.

    `output_parameters` are the prefixes of the parameters that make particular speakers. `compile=False` runs the same
    arithmetic without `torch.compile`. `checkpoint_activations` keeps only what enters each layer for the backward
    pass, which computes the rest again: less memory, a third more time, the same bits.
    """

    output_parameters: tuple[str, ...] = ("mask_conv",)

    def __init__(
        self,
        num_speakers: int = 2,
        num_filters: int = 256,
        kernel_size: int = 16,
        stride: int = 8,
        chunk_size: int = 250,
        num_blocks: int = 2,
        num_layers: int = 8,
        num_heads: int = 8,
        num_hidden: int = 1024,
        checkpoint_activations: bool = False,
        compile: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= stride <= kernel_size:
            raise ValueError(f"stride={stride} with kernel_size={kernel_size}: choose 1 <= stride <= kernel_size")
        if num_speakers < 1:
            raise ValueError(f"num_speakers={num_speakers}: at least one")
        self.num_speakers, self.num_filters = num_speakers, num_filters
        self.kernel_size, self.stride, self.chunk_size = kernel_size, stride, chunk_size
        self.min_length = kernel_size
        self.compiled = compile
        self.encoder = nn.Linear(kernel_size, num_filters, bias=False)
        self.norm = GlobalNorm(num_filters)
        self.bottleneck = nn.Linear(num_filters, num_filters, bias=False)
        sizes = (num_filters, num_layers, num_heads, num_hidden, compile, checkpoint_activations)
        self.intra, self.inter = (
            nn.ModuleList(Transformer(*sizes) for _ in range(num_blocks)) for _ in ("intra", "inter")
        )
        self.prelu = nn.PReLU()
        self.mask_conv = nn.Linear(num_filters, num_speakers * num_filters)
        self.gates = nn.Linear(num_filters, 2 * num_filters)
        self.mask_out = nn.Linear(num_filters, num_filters, bias=False)
        self.decoder = nn.Linear(num_filters, kernel_size, bias=False)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T] of the speakers, in no particular order."""
        if mixture_BT.ndim != 2 or mixture_BT.shape[1] < self.min_length:
            raise ValueError(
                f"mixture of shape {tuple(mixture_BT.shape)}: expected [B, T] with T >= {self.min_length} samples"
            )
        encoded_BNF = F.relu(self.encoder(cut_frames(mixture_BT, self.kernel_size, self.stride)))
        x = to_chunks(self.bottleneck(self.norm(encoded_BNF)), self.chunk_size)
        for intra, inter in zip(self.intra, self.inter, strict=True):
            x = x + intra(x)
            x = x + inter(x.transpose(1, 2).contiguous()).transpose(1, 2)
        # Every frame is the sum of two places, and so is the bias: the same as to convolve each place, at half the work.
        frames_BNF = from_chunks(self.prelu(x), encoded_BNF.shape[1])
        speakers_BNSF = 2 * self.mask_conv(frames_BNF / 2).unflatten(-1, (self.num_speakers, self.num_filters))
        value, gate = self.gates(speakers_BNSF).chunk(2, dim=-1)
        logits_BNSF = self.mask_out(torch.tanh(value) * torch.sigmoid(gate))
        frames = self.decoder(apply_masks(logits_BNSF, encoded_BNF, self.compiled))
        return overlap_add(widen(frames).transpose(1, 2), self.stride, mixture_BT.shape[1])


def to_chunks(frames_BNF: Tensor, chunk_size: int) -> Tensor:
    """Half-overlapping chunks [B, C, K, F] from half a chunk before the first frame on; C is even."""
    chunks = segment(frames_BNF, chunk_size)[:, 1:]
    return F.pad(chunks, (0, 0, 0, 0, 0, chunks.shape[1] % 2))


def from_chunks(chunks_BCKF: Tensor, num_frames: int) -> Tensor:
    """The overlap-add [B, N, F] of such chunks."""
    return merge(F.pad(chunks_BCKF, (0, 0, 0, 0, 1, 0)), num_frames)
