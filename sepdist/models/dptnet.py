"""DPTNet: separates a mixture [B, T] into S waveforms [B, S, T] by attention and bi-LSTMs.

Chen, Mao and Liu, "Dual-Path Transformer Network: Direct Context-Aware Modeling for End-to-End
Monaural Speech Separation", 2020: Transformer layers whose feed-forward network begins with a
bi-LSTM, so that no positions are added. The defaults are the size of paper 1's experiments, with
256 hidden units per direction of that LSTM (the original has 128): 8,527,233 parameters for two
speakers. There is no bottleneck. Tensors inside are channels-last (dual_path.py).

Shapes: B batch, S speakers, T samples, N frames, C chunks, K frames of a chunk, R sequences of
L places, F features.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models import frames
from sepdist.models.attention import Attention
from sepdist.models.compiling import compiled_on_gpu
from sepdist.models.dual_path import Gate, GlobalNorm, merge, run_lstm, segment, swapped


class PathTransformer(nn.Module):
    """Attention, then bi-LSTM, ReLU and linear layer; a residual and a gLN after each (eq. 6 to 9).

    [R, L, F] -> [R, L, F]. As in paper 1's code, the norms are over a sequence, not over the item.
    """

    def __init__(self, num_features: int, num_heads: int, num_hidden: int) -> None:
        super().__init__()
        self.attention = Attention(num_features, num_heads)
        self.attention_norm = GlobalNorm(num_features)
        self.lstm = nn.LSTM(num_features, num_hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * num_hidden, num_features)
        self.norm = GlobalNorm(num_features)

    def forward(self, x_RLF: Tensor) -> Tensor:
        """Transform each sequence by itself."""
        x_RLF = self._attend(x_RLF)
        return self._residual(x_RLF, run_lstm(self.lstm, x_RLF))

    @compiled_on_gpu
    def _attend(self, x_RLF: Tensor) -> Tensor:
        return self.attention_norm(x_RLF + self.attention(x_RLF))

    @compiled_on_gpu
    def _residual(self, x_RLF: Tensor, hidden: Tensor) -> Tensor:
        return self.norm(x_RLF + self.linear(F.relu(hidden)))


class DPTNet(nn.Module):
    """Encoder, Transformers within and across chunks that mask the encoded frames, decoder."""

    # Prefixes of the parameters that belong to particular speakers, which a new task starts afresh.
    output_parameters: tuple[str, ...] = ("mask_conv",)

    def __init__(
        self,
        num_speakers: int = 2,
        num_filters: int = 64,
        kernel_size: int = 2,
        stride: int = 1,
        num_heads: int = 4,
        num_hidden: int = 256,
        chunk_size: int = 250,
        num_repeats: int = 6,
        padding: str = "end",
        mask_activation: str = "relu",
    ) -> None:
        super().__init__()
        frames.check_counts(locals())
        frames.check_sizes(kernel_size, stride, chunk_size)
        frames.check_variant(padding, mask_activation)
        self.padding, self.mask_activation = padding, mask_activation
        self.num_speakers, self.chunk_size = num_speakers, chunk_size
        self.min_length, self.stride = kernel_size, stride
        self.encoder = nn.Linear(kernel_size, num_filters, bias=False)
        self.norm = GlobalNorm(num_filters)
        sizes = (num_filters, num_heads, num_hidden)
        self.intra = nn.ModuleList(PathTransformer(*sizes) for _ in range(num_repeats))
        self.inter = nn.ModuleList(PathTransformer(*sizes) for _ in range(num_repeats))
        self.prelu = nn.PReLU()
        self.mask_conv = nn.Linear(num_filters, num_speakers * num_filters)
        self.gate = Gate(num_filters)
        self.decoder = nn.Linear(num_filters, kernel_size, bias=False)
        frames.init_filterbank(self.encoder, self.decoder)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T] of the speakers, in no particular order."""
        encoded_BNF = F.relu(frames.encode(mixture_BT, self.encoder, self.stride, self.padding))
        x = segment(self.norm(encoded_BNF), self.chunk_size)
        for intra, inter in zip(self.intra, self.inter, strict=True):
            x = swapped(intra(x.flatten(0, 1)).view_as(x))
            x = swapped(inter(x.flatten(0, 1)).view_as(x))
        # The 1x1 convolution is linear, so it may follow the overlap-add, which is a mean here, and
        # work on half as many frames.
        y = self.mask_conv(merge(self.prelu(x), encoded_BNF.shape[1]) / 2)
        masks_BNSF = frames.MASKS[self.mask_activation](
            self.gate(y.unflatten(-1, (self.num_speakers, -1)))
        )
        masked_BNSF = masks_BNSF * encoded_BNF.unsqueeze(2)
        return frames.decode(
            masked_BNSF, self.decoder, self.stride, mixture_BT.shape[1], self.padding
        )
