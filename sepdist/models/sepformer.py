"""SepFormer: separates a mixture [B, T] into one waveform per speaker [B, S, T] by attention.

Subakan et al., "Attention Is All You Need in Speech Separation", 2021, in the form that SpeechBrain
published and trained: 25,679,361 parameters for two speakers, no dropout, and with padding="none"
the same estimates to rounding at any length (the default hears the samples after the last whole
frame too, which SpeechBrain drops). That form has norms that the paper does not draw, one over each
item before the chunks and one after each Transformer, and an even number of chunks. Tensors inside
are channels-last (dual_path.py).

Shapes: B batch, S speakers, T samples, N frames, F features, C chunks, K frames of a chunk,
M sequences of an item, R sequences of L places.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sepdist.models.attention import Attention, sinusoids
from sepdist.models.compiling import compiled_on_gpu
from sepdist.models.dual_path import Gate, GlobalNorm, merge, segment, split, swapped
from sepdist.models.frames import check_counts, check_sizes, check_variant, decode, encode, widen

NORM_EPS = 1e-6


class TransformerLayer(nn.Module):
    """Norm, attention, residual; norm, linear, ReLU, linear, residual: [R, L, F] -> [R, L, F]."""

    def __init__(self, num_features: int, num_heads: int, num_hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(num_features, eps=NORM_EPS)
        self.attention = Attention(num_features, num_heads)
        self.norm = nn.LayerNorm(num_features, eps=NORM_EPS)
        self.up = nn.Linear(num_features, num_hidden)
        self.down = nn.Linear(num_hidden, num_features)

    @compiled_on_gpu
    def forward(self, x_RLF: Tensor) -> Tensor:
        """Transform each sequence by itself."""
        x_RLF = x_RLF + self.attention(self.attention_norm(x_RLF))
        return x_RLF + self.down(F.relu(self.up(self.norm(x_RLF))))


class Transformer(nn.Module):
    """Positions, layers, layer norm, gLN over the item, residual: [B, M, L, F] -> the same."""

    def __init__(
        self, num_features: int, num_layers: int, num_heads: int, num_hidden: int, recompute: bool
    ) -> None:
        super().__init__()
        self.recompute = recompute
        sizes = (num_features, num_heads, num_hidden)
        self.layers = nn.ModuleList(TransformerLayer(*sizes) for _ in range(num_layers))
        self.layer_norm = nn.LayerNorm(num_features, eps=NORM_EPS)
        self.global_norm = GlobalNorm(num_features)

    def forward(self, x_BMLF: Tensor) -> Tensor:
        """Attend along L."""
        x = (x_BMLF + sinusoids(x_BMLF.shape[2], x_BMLF)).flatten(0, 1)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x_BMLF + self.global_norm(self.layer_norm(x).view_as(x_BMLF))


class SepFormer(nn.Module):
    """Encoder, Transformers within and across chunks that mask the encoded frames, decoder.

    `checkpoint_activations` keeps only each layer's input for the backward pass and recomputes the
    rest: less memory, a third more time, the same bits.
    """

    # Prefixes of the parameters that belong to particular speakers, which a new task starts afresh.
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
        padding: str = "end",
    ) -> None:
        super().__init__()
        check_counts(locals())
        check_sizes(kernel_size, stride, chunk_size)
        check_variant(padding)
        self.padding = padding
        self.num_speakers, self.chunk_size = num_speakers, chunk_size
        self.min_length, self.stride = kernel_size, stride
        self.encoder = nn.Linear(kernel_size, num_filters, bias=False)
        self.norm = GlobalNorm(num_filters)
        self.bottleneck = nn.Linear(num_filters, num_filters, bias=False)
        sizes = (num_filters, num_layers, num_heads, num_hidden, checkpoint_activations)
        self.intra = nn.ModuleList(Transformer(*sizes) for _ in range(num_blocks))
        self.inter = nn.ModuleList(Transformer(*sizes) for _ in range(num_blocks))
        self.prelu = nn.PReLU()
        self.mask_conv = nn.Linear(num_filters, num_speakers * num_filters)
        self.gate = Gate(num_filters)
        self.mask_out = nn.Linear(num_filters, num_filters, bias=False)
        self.decoder = nn.Linear(num_filters, kernel_size, bias=False)
        # As nn.ConvTranspose1d starts, whose fan-in is the kernel; nn.Linear starts smaller.
        nn.init.uniform_(self.decoder.weight, -(kernel_size**-0.5), kernel_size**-0.5)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T] of the speakers, in no particular order."""
        encoded_BNF = F.relu(encode(mixture_BT, self.encoder, self.stride, self.padding))
        x = to_chunks(widen(self.bottleneck(self.norm(encoded_BNF))), self.chunk_size)
        for intra, inter in zip(self.intra, self.inter, strict=True):
            x = swapped(inter(swapped(intra(x))))
        merged = from_chunks(self.prelu(x), encoded_BNF.shape[1])
        y_BNSF = split(merged, self.mask_conv, self.num_speakers)
        masks_BNSF = F.relu(self.mask_out(self.gate(y_BNSF)))
        masked_BNSF = masks_BNSF * encoded_BNF.unsqueeze(2)
        return decode(masked_BNSF, self.decoder, self.stride, mixture_BT.shape[1], self.padding)


def to_chunks(frames_BNF: Tensor, chunk_size: int) -> Tensor:
    """Half-overlapping chunks [B, C, K, F] that begin half a chunk early; C is even."""
    chunks = segment(frames_BNF, chunk_size)[:, 1:]
    return F.pad(chunks, (0, 0, 0, 0, 0, chunks.shape[1] % 2))


def from_chunks(chunks_BCKF: Tensor, num_frames: int) -> Tensor:
    """Overlap-add [B, N, F] of `to_chunks`'s chunks."""
    return merge(F.pad(chunks_BCKF, (0, 0, 0, 0, 1, 0)), num_frames)
