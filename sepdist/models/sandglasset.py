"""Sandglasset: separates a mixture [B, T] into S waveforms [B, S, T], at several granularities.

Lam, Wang, Su and Yu, "Sandglasset: A Light Multi-Granularity Self-attentive Network for Time-Domain
Speech Separation", 2021: 2,296,705 parameters for two speakers at the defaults. The public versions
disagree with each other; docs/architectures.md says what is chosen here, and why.

Tensors inside are channels-last. Shapes: B batch, S speakers, T samples, N frames, E encoder
filters, F features, C chunks, K frames of a chunk, Q = K / factor coarse frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.attention import Attention, sinusoids
from sepdist.models.compiling import compiled_on_gpu
from sepdist.models.dual_path import merge, run_lstm, segment, split, swapped
from sepdist.models.frames import check_counts, check_sizes, decode, encode, widen


class LocalRecurrence(nn.Module):
    """Bi-LSTM within each chunk, linear, layer norm, residual: [B, C, K, F] -> [B, C, K, F]."""

    def __init__(self, num_features: int, num_hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(num_features, num_hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * num_hidden, num_features)
        self.norm = nn.LayerNorm(num_features)

    def forward(self, x_BCKF: Tensor) -> Tensor:
        """Run along K."""
        return self._residual(x_BCKF, run_lstm(self.lstm, x_BCKF.flatten(0, 1)))

    @compiled_on_gpu
    def _residual(self, x_BCKF: Tensor, hidden: Tensor) -> Tensor:
        return x_BCKF + self.norm(widen(self.linear(hidden))).view_as(x_BCKF)


class GlobalAttention(nn.Module):
    """Downsample, attend across chunks at each coarse frame, upsample; [B, C, K, F] -> the same."""

    def __init__(self, num_features: int, num_heads: int, factor: int, dropout: float) -> None:
        super().__init__()
        self.down_taps = nn.Parameter(torch.empty(factor, num_features))
        self.up_taps = nn.Parameter(torch.empty(factor, num_features))
        self.down_bias = nn.Parameter(torch.empty(num_features))
        self.up_bias = nn.Parameter(torch.empty(num_features))
        # The initial values of torch's depth-wise nn.Conv1d and nn.ConvTranspose1d.
        for parameter in (self.down_taps, self.up_taps, self.down_bias, self.up_bias):
            nn.init.uniform_(parameter, -(factor**-0.5), factor**-0.5)
        self.attention_norm = nn.LayerNorm(num_features)
        self.attention = Attention(num_features, num_heads)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(num_features)

    @compiled_on_gpu
    def forward(self, x_BCKF: Tensor) -> Tensor:
        """Attend along C at this block's granularity."""
        factor = self.down_taps.shape[0]
        coarse_BCQF = (x_BCKF.unflatten(2, (-1, factor)) * self.down_taps).sum(3) + self.down_bias
        x = self.attention_norm(swapped(coarse_BCQF).flatten(0, 1))
        x = x + sinusoids(x.shape[1], x)
        x = self.norm(x + self.dropout(widen(self.attention(x))))
        coarse_BCQF = swapped(x.unflatten(0, (-1, coarse_BCQF.shape[2])))
        return (coarse_BCQF.unsqueeze(3) * self.up_taps + self.up_bias).flatten(2, 3)


class Sandglasset(nn.Module):
    """Encoder, blocks of local recurrence and global attention, masks, decoder."""

    # Prefixes of the parameters that belong to particular speakers, which a new task starts afresh.
    output_parameters: tuple[str, ...] = ("mask_conv",)

    def __init__(
        self,
        num_speakers: int = 2,
        num_filters: int = 256,
        kernel_size: int = 4,
        stride: int = 2,
        num_features: int = 128,
        chunk_size: int = 256,
        num_blocks: int = 6,
        num_hidden: int = 128,
        num_heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_counts(locals())
        check_sizes(kernel_size, stride, chunk_size)
        coarsest = 4 ** ((num_blocks - 1) // 2)
        if chunk_size % coarsest:
            given = f"chunk_size={chunk_size} with num_blocks={num_blocks}"
            raise ValueError(f"{given}: choose a multiple of {coarsest}")
        factors = [4 ** min(block, num_blocks - 1 - block) for block in range(num_blocks)]
        self.num_speakers, self.chunk_size = num_speakers, chunk_size
        self.min_length, self.stride = kernel_size, stride
        self.encoder = nn.Linear(kernel_size, num_filters, bias=False)
        self.norm = nn.LayerNorm(num_filters, elementwise_affine=False)
        self.bottleneck = nn.Linear(num_filters, num_features)
        self.local = nn.ModuleList(LocalRecurrence(num_features, num_hidden) for _ in factors)
        self.coarse = nn.ModuleList(
            GlobalAttention(num_features, num_heads, factor, dropout) for factor in factors
        )
        self.prelu = nn.PReLU()
        self.mask_conv = nn.Linear(num_features, num_speakers * num_filters)
        self.decoder = nn.Linear(num_filters, kernel_size, bias=False)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T] of the speakers, in no particular order."""
        encoded_BNE = F.relu(encode(mixture_BT, self.encoder, self.stride))
        x = segment(widen(self.bottleneck(self.norm(widen(encoded_BNE)))), self.chunk_size)
        finer: list[Tensor] = []
        for block, (local, coarse) in enumerate(zip(self.local, self.coarse, strict=True)):
            x = coarse(local(x))
            blocks_left = len(self.local) - 1 - block
            if block < blocks_left:
                finer.append(x)
            elif block > blocks_left:
                x = x + finer.pop()
        merged = merge(self.prelu(x), encoded_BNE.shape[1])
        masks_BNSE = F.relu(split(merged, self.mask_conv, self.num_speakers))
        masked_BNSE = masks_BNSE * encoded_BNE.unsqueeze(2)
        return decode(masked_BNSE, self.decoder, self.stride, mixture_BT.shape[1])
