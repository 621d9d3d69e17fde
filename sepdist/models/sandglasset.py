"""Sandglasset: mixture [B, T] in, one waveform per speaker [B, S, T] out, attention at a granularity that changes.

Lam, Wang, Su and Yu, "Sandglasset: A Light Multi-Granularity Self-attentive Network for Time-Domain Speech
Separation", 2021: 2,296,705 parameters for two speakers at the defaults. The public versions disagree with each other;
what is decided here, and why:

- A block samples the frames *inside* a chunk down and up (along K), by *depth-wise* convolutions whose kernel is their
  stride, also where that is 1: only so the published 2.3 million parameters come out (full convolutions give 3.66).
- The layer norm before the bottleneck has no gain and shift: the linear layer after it has both.
- Within the attention, x = norm(x) + positions, then norm(x + dropout(attention(x))): dropout of what attention gives
  and not of its weights, so that the fused kernel serves.
- What block b gives is added to what block N - 1 - b gives, the two being of equal granularity. To add it to the
  *input* of that block would mix it with a coarser one and double the input of the block after the middle.
- Chunks have a whole chunk of padding on either side, as all dual-path models here but SepFormer.

Inside, tensors are channels-last. Shapes: B batch, S speakers, T samples, N frames, E encoder filters, F features,
C chunks, K frames of a chunk, Q = K / factor coarse frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.attention import Attention, sinusoids
from sepdist.models.checks import check_sizes
from sepdist.models.dual_path import merge, segment, split, swapped
from sepdist.models.frames import decode, encode, widen
from sepdist.models.lstm import BiLSTM


class LocalRecurrence(nn.Module):
    """Bi-LSTM along the frames of each chunk, linear, layer norm, residual: [B, C, K, F] -> [B, C, K, F]."""

    def __init__(self, num_features: int, num_hidden: int, compile: bool) -> None:
        super().__init__()
        self.lstm = BiLSTM(num_features, num_hidden, compile)
        self.linear = nn.Linear(2 * num_hidden, num_features)
        self.norm = nn.LayerNorm(num_features)

    def forward(self, x_BCKF: Tensor) -> Tensor:
        """The next x."""
        hidden = self.lstm(x_BCKF.flatten(0, 1))
        return x_BCKF + self.norm(widen(self.linear(hidden))).view_as(x_BCKF)


class GlobalAttention(nn.Module):
    """Sample down, attend along the chunks at each coarse frame, sample up: [B, C, K, F] -> [B, C, K, F]."""

    def __init__(self, num_features: int, num_heads: int, factor: int, dropout: float) -> None:
        super().__init__()
        self.down_taps, self.up_taps = (
            nn.Parameter(torch.empty(factor, num_features)) for _ in range(2)
        )
        self.down_bias, self.up_bias = (nn.Parameter(torch.empty(num_features)) for _ in range(2))
        # As torch's depth-wise nn.Conv1d and nn.ConvTranspose1d start.
        for parameter in (self.down_taps, self.up_taps, self.down_bias, self.up_bias):
            nn.init.uniform_(parameter, -(factor**-0.5), factor**-0.5)
        self.attention_norm = nn.LayerNorm(num_features)
        self.attention = Attention(num_features, num_heads)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(num_features)

    def forward(self, x_BCKF: Tensor) -> Tensor:
        """What is left of x at this block's granularity, with the other chunks in view."""
        factor = self.down_taps.shape[0]
        coarse_BCQF = (x_BCKF.unflatten(2, (-1, factor)) * self.down_taps).sum(3) + self.down_bias
        x = self.attention_norm(swapped(coarse_BCQF).flatten(0, 1))
        x = x + sinusoids(x.shape[1], x)
        x = self.norm(x + self.dropout(widen(self.attention(x))))
        coarse_BCQF = swapped(x.unflatten(0, (len(x_BCKF), -1)))
        return (coarse_BCQF.unsqueeze(3) * self.up_taps + self.up_bias).flatten(2, 3)


class Sandglasset(nn.Module):
    """Encoder, blocks of local recurrence and global attention, masks, decoder.

    Of `num_blocks` blocks, block b samples down by 4 to the power of min(b, num_blocks - 1 - b). `output_parameters`
    are the prefixes of the parameters that make particular speakers; `compile=False` runs torch's own LSTM.
    """

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
        compile: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(num_speakers, kernel_size, stride, chunk_size)
        factors = [4 ** min(block, num_blocks - 1 - block) for block in range(num_blocks)]
        if num_blocks < 1 or chunk_size % max(factors):
            raise ValueError(
                f"chunk_size={chunk_size} with num_blocks={num_blocks}: choose a multiple of {max(factors, default=1)}"
                " and at least one block"
            )
        self.num_speakers, self.chunk_size = num_speakers, chunk_size
        self.min_length, self.stride = kernel_size, stride
        self.encoder = nn.Linear(kernel_size, num_filters, bias=False)
        self.norm = nn.LayerNorm(num_filters, elementwise_affine=False)
        self.bottleneck = nn.Linear(num_filters, num_features)
        self.local = nn.ModuleList(
            LocalRecurrence(num_features, num_hidden, compile) for _ in factors
        )
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
        masks_BNSE = F.relu(
            split(merge(self.prelu(x), encoded_BNE.shape[1]), self.mask_conv, self.num_speakers)
        )
        masked_BNSE = masks_BNSE * encoded_BNE.unsqueeze(2)
        return decode(masked_BNSE, self.decoder, self.stride, mixture_BT.shape[1])
