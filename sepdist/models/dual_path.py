"""Building blocks of the dual-path models: half-overlapping chunks, norm, LSTM call, gate.

A dual-path network (Luo, Chen and Yoshioka, "Dual-path RNN", 2020, section 2) cuts frames [B, N, F]
into chunks [B, C, K, F] and works in turns along the frames of each chunk (intra) and along the
chunks at each place (inter), so that no sequence is longer than about the square root of the
mixture. All tensors are channels-last. Padding is a whole chunk of zeros on either side, as in
paper 1's models, so that every frame lies in exactly two chunks.

Shapes: B batch, N frames, S speakers, C chunks, K frames of a chunk, R sequences of L places,
F features, H hidden features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.compiling import compiled_if, on_gpu
from sepdist.models.frames import EPS, widen


def segment(frames_BNF: Tensor, chunk_size: int) -> Tensor:
    """Chunks [B, C, K, F] of K = `chunk_size` frames at a hop of K / 2; C = 2 N // K + 3."""
    assert chunk_size % 2 == 0, chunk_size
    hop = chunk_size // 2
    num_frames = frames_BNF.shape[1]
    count = num_frames // hop + 4  # named, so that torch.export need not divide
    behind = hop * (count - 2) - num_frames
    halves = F.pad(frames_BNF, (0, 0, chunk_size, behind)).unflatten(1, (count, hop))
    return torch.cat([halves[:, :-1], halves[:, 1:]], dim=2)


def merge(chunks_BCKF: Tensor, num_frames: int) -> Tensor:
    """Overlap-add [B, N, F] of `segment`'s chunks; unchanged chunks give twice the frames."""
    hop = chunks_BCKF.shape[2] // 2
    return (chunks_BCKF[:, 2:, :hop] + chunks_BCKF[:, 1:-1, hop:]).flatten(1, 2)[:, :num_frames]


def split(merged_BNF: Tensor, mask_conv: nn.Linear, num_speakers: int) -> Tensor:
    """Features [B, N, S, F] of each speaker: `mask_conv` applied to the output of `merge`.

    The published models apply it before the overlap-add. It is linear, so it may follow, on half
    as many frames: on the mean of a frame's two places, and doubled, as its bias is in both.
    """
    return (2 * mask_conv(merged_BNF / 2)).unflatten(-1, (num_speakers, -1))


def swapped(x_BCKF: Tensor) -> Tensor:
    """[B, K, C, F]: sequences along the chunks instead of along the frames of a chunk, or back."""
    return x_BCKF.transpose(1, 2).contiguous()


def run_lstm(lstm: nn.LSTM, x_RLF: Tensor) -> Tensor:
    """Output [R, L, 2 H] of a bidirectional LSTM, in fp32 where a CPU has no bf16 LSTM.

    Without AVX-512 oneDNN raises for bf16; with it, bf16 is 1.8 times as fast as fp32.
    """
    device = x_RLF.device.type
    narrow = device != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    with torch.autocast(device, enabled=narrow and torch.is_autocast_enabled(device)):
        return lstm(widen(x_RLF))[0]


def global_norm(x: Tensor, gain_F: Tensor, shift_F: Tensor) -> Tensor:
    """gLN of [B, ..., F], in fp32 or wider: normalise over all axes but the batch, then scale."""
    if on_gpu(x):
        return compiled_if(torch.is_grad_enabled(), _reduced_norm)(widen(x), gain_F, shift_F)
    rows_BMF = widen(x).reshape(x.shape[0], -1, x.shape[-1])
    if torch.is_grad_enabled() and not rows_BMF.requires_grad:
        # torch's backward kernel writes the gradient of its input even if nobody wants it: without
        # this, training behind a frozen encoder ends in a segmentation fault.
        rows_BMF = rows_BMF.detach().requires_grad_()
    # One group of torch's kernel, which reads [B, F, 1, M] in channels-last memory, our [B, M, F],
    # without a copy.
    channels_BF1M = rows_BMF.transpose(1, 2).unsqueeze(2)
    with torch.autocast(x.device.type, enabled=False):
        normalised = F.group_norm(channels_BF1M, 1, gain_F, shift_F, EPS)
    return normalised.squeeze(2).transpose(1, 2).reshape(x.shape)


def _reduced_norm(x: Tensor, gain_F: Tensor, shift_F: Tensor) -> Tensor:
    """`global_norm` by reductions; on GPUs group_norm copies x and has one thread block an item."""
    variance, mean = torch.var_mean(x, tuple(range(1, x.ndim)), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS) * gain_F + shift_F


class GlobalNorm(nn.Module):
    """`global_norm` with its gain and shift per feature."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))
        self.shift = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised tensor, in fp32 or wider."""
        return global_norm(x, self.gain, self.shift)


class Gate(nn.Module):
    """The tanh of one 1x1 convolution times the sigmoid of another, [..., F] -> [..., F]."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, 2 * num_features)

    def forward(self, x: Tensor) -> Tensor:
        """The gated features."""
        values, gates = self.linear(x).chunk(2, dim=-1)
        return torch.tanh(values) * torch.sigmoid(gates)
