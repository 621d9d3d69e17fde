"""TF-GridNet: separates a mixture [B, T] into S waveforms [B, S, T] on its complex spectrum.

Wang, Cornell, Choi, Lee, Kim and Watanabe, "TF-GridNet: Integrating Full- and Sub-Band Modeling for
Speech Separation", 2023, as in ESPnet's TFGridNetV2 (with one microphone, and a transposed
convolution even where the kernel is the stride). The defaults are the size of the paper's results
on WSJ0-2mix: 14,435,602 parameters for two speakers. Tensors inside are channels-last.

Shapes: B batch, T samples, N frames, Q frequency bins, F features, R sequences of L places,
H heads, E features of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.compiling import compiled_on_gpu
from sepdist.models.dual_path import run_lstm, swapped
from sepdist.models.frames import check_counts, check_sizes, widen
from sepdist.models.spectra import NORM_EPS, Spectra, init_xavier


class PathLSTM(nn.Module):
    """Norm, bi-LSTM over overlapping windows of places, transposed convolution, residual.

    [B, R, L, F] -> [B, R, L, F]: along L; places behind the last whole window stay as they are.
    """

    def __init__(self, num_features: int, num_hidden: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.norm = nn.LayerNorm(num_features, eps=NORM_EPS)
        sizes = (num_features * kernel_size, num_hidden)
        self.lstm = nn.LSTM(*sizes, batch_first=True, bidirectional=True)
        self.deconv = nn.ConvTranspose1d(2 * num_hidden, num_features, kernel_size, stride)

    def forward(self, x_BRLF: Tensor) -> Tensor:
        """Run along L."""
        rows_RLF = self.norm(widen(x_BRLF)).flatten(0, 1)
        hidden = run_lstm(self.lstm, rows_RLF.unfold(1, self.kernel_size, self.stride).flatten(2))
        y_RLF = self.deconv(hidden.mT).mT
        if self.stride > 1:  # longer than needed at any length: a tracer knows that it is cut
            y_RLF = F.pad(y_RLF, (0, 0, 0, self.stride))[:, : x_BRLF.shape[2]]
        return x_BRLF + y_RLF.view_as(x_BRLF)


class Heads(nn.Module):
    """Linear layer, PReLU and layer norm over all bins, [B, N, Q, F] -> [B, H, N, Q, E]."""

    def __init__(self, num_features: int, num_heads: int, num_outputs: int, num_bins: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_heads * num_outputs)
        self.slopes = nn.Parameter(torch.full((num_heads,), 0.25))
        self.gain = nn.Parameter(torch.ones(num_heads, 1, num_bins, num_outputs))
        self.shift = nn.Parameter(torch.zeros(num_heads, 1, num_bins, num_outputs))

    def forward(self, x_BNQF: Tensor) -> Tensor:
        """Project, then normalise each head of each frame."""
        y = widen(self.linear(x_BNQF)).unflatten(-1, (len(self.slopes), -1)).movedim(3, 1)
        y = F.prelu(y, self.slopes)
        return F.layer_norm(y, y.shape[-2:], eps=NORM_EPS) * self.gain + self.shift


class GridBlock(nn.Module):
    """LSTMs along the bins and along the frames, then attention among whole frames."""

    def __init__(self, sizes: tuple[int, ...], num_heads: int, num_keys: int, bins: int) -> None:
        super().__init__()
        num_features, _, self.kernel_size, self.stride = sizes
        if num_features % num_heads:
            raise ValueError(f"{num_features} features do not divide into num_heads={num_heads}")
        self.bins, self.frames = PathLSTM(*sizes), PathLSTM(*sizes)
        per_bin = -(-num_keys // bins)
        self.query = Heads(num_features, num_heads, per_bin, bins)
        self.key = Heads(num_features, num_heads, per_bin, bins)
        self.value = Heads(num_features, num_heads, num_features // num_heads, bins)
        self.out = Heads(num_features, 1, num_features, bins)

    def forward(self, x_BNQF: Tensor) -> Tensor:
        """[B, N, Q, F] -> [B, N, Q, F]; the LSTMs see zeros around the spectrum."""
        reach, (frames, bins) = self.kernel_size - self.stride, x_BNQF.shape[1:3]
        around = [0, 0] + 2 * [reach, reach + self.stride - 1]
        x = swapped(self.frames(swapped(self.bins(F.pad(x_BNQF, around)))))
        return self._attend(x[:, reach : reach + frames, reach : reach + bins])

    @compiled_on_gpu
    def _attend(self, x_BNQF: Tensor) -> Tensor:
        query, key, value = (part(x_BNQF).flatten(3) for part in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value)  # [B, H, N, Q * F / H]
        heads = attended.unflatten(-1, (x_BNQF.shape[2], -1)).movedim(1, 3)
        return x_BNQF + self.out(heads.flatten(3)).squeeze(1)


class TFGridNet(nn.Module):
    """Complex spectral mapping by blocks of full-band, sub-band and frame-wise networks."""

    output_parameters: tuple[str, ...] = ("spectra.deconv",)

    def __init__(
        self,
        num_speakers: int = 2,
        fft_size: int = 128,
        stride: int = 64,
        num_layers: int = 6,
        num_features: int = 64,
        num_hidden: int = 256,
        kernel_size: int = 4,
        kernel_stride: int = 1,
        num_heads: int = 4,
        num_keys: int = 512,
        padding: str = "end",
    ) -> None:
        super().__init__()
        check_counts(locals())
        check_sizes(kernel_size, kernel_stride)
        self.spectra = Spectra(num_speakers, num_features, fft_size, stride, padding)
        self.num_speakers, self.masking = num_speakers, False
        self.min_length, self.stride = self.spectra.least, stride
        sizes = (num_features, num_hidden, kernel_size, kernel_stride)
        bins = fft_size // 2 + 1
        blocks = (GridBlock(sizes, num_heads, num_keys, bins) for _ in range(num_layers))
        self.blocks = nn.Sequential(*blocks)
        init_xavier(self)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T] of the speakers, in no particular order."""
        return self.spectra(mixture_BT, self.blocks)
