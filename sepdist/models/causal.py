"""Causal blocks of Conv-TasNet, and separation block by block.

Luo and Mesgarani 2019, section II-D: convolutions that see the past only, and cumulative layer norm
(cLN), whose statistics at a frame are those of all features up to it. A whole mixture and a stream
take the same way; between the blocks of a stream, `past` holds what the next one needs, by the
parameter that needs it.

Shapes: B batch, S speakers, T samples, N frames, F features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sepdist.models.conv_block import ConvBlock
from sepdist.models.frames import EPS, decode, widen

Past = dict[Tensor, Tensor]


def cumulative_norm(x_BNF: Tensor, gain_F: Tensor, shift_F: Tensor, past: Past) -> Tensor:
    """cLN of [B, N, F] in fp32 or wider: normalise each frame with all features so far.

    The sums are kept in double precision, since they grow without end.
    """
    x = widen(x_BNF)
    count = torch.full(x.shape[:2], x.shape[2], dtype=torch.float64, device=x.device)
    sums = (count, x.sum(2, dtype=torch.float64), x.square().sum(2, dtype=torch.float64))
    so_far_3BN = torch.stack(sums).cumsum(2) + past.get(gain_F, 0.0)
    past[gain_F] = so_far_3BN[..., -1:].detach()
    count, total, squares = so_far_3BN
    mean = total / count
    rstd = torch.rsqrt((squares / count - mean.square()).clamp_min(0) + EPS)
    mean, rstd = (statistic.to(x.dtype).unsqueeze(2) for statistic in (mean, rstd))
    return (x - mean) * rstd * gain_F + shift_F


class CausalConvBlock(ConvBlock):
    """`ConvBlock` whose taps reach back only and whose norms are cumulative; uncompiled."""

    def forward(  # type: ignore[override]
        self, x_BNF: Tensor, skip_BNF: Tensor, past: Past
    ) -> tuple[Tensor, Tensor]:
        """The next x and the next skip sum."""
        y = F.prelu(widen(F.linear(x_BNF, self.in_weight, self.in_bias)), self.prelu1)
        y = cumulative_norm(y, self.gain1, self.shift1, past)
        size, reach = y.shape[1], (len(self.taps) - 1) * self.dilation
        y = torch.cat([past.get(self.taps, y.new_zeros(y.shape[0], reach, y.shape[2])), y], dim=1)
        past[self.taps] = y[:, size:].detach().clone()
        rows = (y[:, first : first + size] for first in range(0, reach + 1, self.dilation))
        y = sum((tap * row for tap, row in zip(self.taps, rows, strict=True)), self.taps_bias)
        y = cumulative_norm(F.prelu(y, self.prelu2), self.gain2, self.shift2, past)
        sizes = (x_BNF.shape[2], skip_BNF.shape[2])
        residual, skip = widen(F.linear(y, self.out_weight, self.out_bias)).split(sizes, dim=2)
        return x_BNF + residual, skip_BNF + skip


class Streamer:
    """Separates one mixture block by block; the blocks together are the model's estimates.

    A sample is final when the window of the encoder that begins with it is full, after
    `latency_samples`. The model is a ConvTasNet; there are no gradients.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.past = model, Past()
        self.latency_samples = model.kernel_size
        weight = model.decoder.weight
        self.waiting_T = weight.new_zeros(0)  # from the first sample of the next frame on
        self.tail_ST = weight.new_zeros(model.num_speakers, model.kernel_size - model.stride)

    @torch.no_grad()
    def push(self, block_T: Tensor) -> Tensor:
        """The estimates [S, T'] that the block makes final; T' may be 0."""
        size, stride = self.model.kernel_size, self.model.stride
        wave_T = torch.cat([self.waiting_T, block_T.to(self.waiting_T)])
        count = max(0, (len(wave_T) - size) // stride + 1)
        self.waiting_T = wave_T[count * stride :]
        if not count:
            return self.tail_ST[:, :0]
        encoded_1NF = self.model.encoder(wave_T.unfold(0, size, stride)[None])
        masked_1NSF, length = self.model.masked(encoded_1NF, self.past), (count - 1) * stride + size
        whole_ST = decode(masked_1NSF, self.model.decoder, stride, length)[0]
        whole_ST[:, : size - stride] += self.tail_ST
        self.tail_ST = whole_ST[:, count * stride :]
        return whole_ST[:, : count * stride]

    def finish(self) -> Tensor:
        """The estimates [S, T'] of the samples that are left, behind which silence is assumed."""
        size, left = self.model.kernel_size, len(self.waiting_T)
        covered = self.tail_ST.shape[1] if self.past else 0
        missing = size - left if left > covered else 0
        ends_ST = [self.push(self.waiting_T.new_zeros(missing)), self.tail_ST]
        return torch.cat(ends_ST, dim=1)[:, :left]
