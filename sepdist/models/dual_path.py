"""What the dual-path models share: frames [B, N, F] in, half-overlapping chunks [B, C, K, F] out, and back.

A dual-path network (Luo, Chen and Yoshioka, "Dual-path RNN", 2020, section 2) works in turns along the frames of each
chunk (intra) and along the chunks at each place (inter), so that no sequence is longer than about the square root of
the mixture. Everything is channels-last. Padding is a whole chunk of zeros on either side, as paper 1's models have
it, so that every frame lies in exactly two chunks.

Shapes: B batch, N frames, F features, C chunks, K frames of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.frames import EPS, widen


def segment(frames_BNF: Tensor, chunk_size: int) -> Tensor:
    """Chunks [B, C, K, F] of K = `chunk_size` frames, each half a chunk after the one before; C = 2 N // K + 3."""
    assert chunk_size % 2 == 0, chunk_size
    hop = chunk_size // 2
    num_frames = frames_BNF.shape[1]
    behind = hop * (num_frames // hop + 2) - num_frames
    halves = F.pad(frames_BNF, (0, 0, chunk_size, behind)).unflatten(1, (-1, hop))
    return torch.cat([halves[:, :-1], halves[:, 1:]], dim=2)


def merge(chunks_BCKF: Tensor, num_frames: int) -> Tensor:
    """The frames [B, N, F] of which `segment` made the chunks, each the sum of its two places (so segment, doubled)."""
    hop = chunks_BCKF.shape[2] // 2
    return (chunks_BCKF[:, 2:, :hop] + chunks_BCKF[:, 1:-1, hop:]).flatten(1, 2)[:, :num_frames]


def split(merged_BNF: Tensor, mask_conv: nn.Linear, num_speakers: int) -> Tensor:
    """Features [B, N, S, F] of each speaker by a 1x1 convolution, from what `merge` gave.

    The convolution is linear, so it may come after the overlap-add, on half as many frames. It sees the mean of a
    frame's two places, and is doubled behind it, because its bias is in both.
    """
    return (2 * mask_conv(merged_BNF / 2)).unflatten(-1, (num_speakers, -1))


def swapped(x_BCKF: Tensor) -> Tensor:
    """[B, K, C, F]: the sequences along the chunks in the place of those along the frames of a chunk, or back."""
    return x_BCKF.transpose(1, 2).contiguous()


class GlobalNorm(nn.Module):
    """gLN of [B, ..., F]: zero mean and unit variance over all but the batch, then a gain and a shift per feature."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))
        self.shift = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised tensor, in fp32 or wider."""
        # One group of torch's kernel, which takes [B, F, 1, M] in channels-last memory, our [B, M, F], as it is.
        rows_BMF = widen(x).reshape(x.shape[0], -1, x.shape[-1])
        channels_BF1M = rows_BMF.transpose(1, 2).unsqueeze(2)
        with torch.autocast(x.device.type, enabled=False):
            normalised = F.group_norm(channels_BF1M, 1, self.gain, self.shift, EPS)
        return normalised.squeeze(2).transpose(1, 2).reshape(x.shape)


class Gate(nn.Module):
    """A tanh of one 1x1 convolution times a sigmoid of another, [..., F] -> [..., F], ahead of the masks."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, 2 * num_features)

    def forward(self, x: Tensor) -> Tensor:
        """The gated features."""
        values, gates = self.linear(x).chunk(2, dim=-1)
        return torch.tanh(values) * torch.sigmoid(gates)
