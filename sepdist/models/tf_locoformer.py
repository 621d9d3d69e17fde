"""TF-Locoformer: separates a mixture [B, T] into S waveforms [B, S, T] on its complex spectrum.

Saijo, Wichern, Germain, Pan and Le Roux, "TF-Locoformer: Transformer with Local Modeling by
Convolution for Speech Separation and Enhancement", 2024, in the form that its authors released for
ESPnet: the feed-forward networks have no factor of 1/2. The defaults are the medium size (M) on
8 kHz: 14,975,620 parameters for two speakers. Tensors inside are channels-last.

Shapes: B batch, T samples, R sequences of L places, F features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm

from sepdist.models.attention import Attention
from sepdist.models.compiling import compiled_by_shape
from sepdist.models.dual_path import swapped
from sepdist.models.frames import check_counts, check_sizes, widen
from sepdist.models.spectra import NORM_EPS, Spectra, init_xavier

NUM_GROUPS = 4  # of every published size


class RMSGroupNorm(nn.Module):
    """Divide each group of a place's features by its root mean square, in fp32 or wider; scale."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        if num_features % NUM_GROUPS:
            raise ValueError(f"num_features={num_features}: choose a multiple of {NUM_GROUPS}")
        self.gain = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., F]."""
        groups = widen(x).unflatten(-1, (NUM_GROUPS, -1))
        rms = vector_norm(groups, dim=-1, keepdim=True) * groups.shape[-1] ** -0.5
        return (groups / (rms + NORM_EPS)).flatten(-2) * self.gain


class ConvSwiGLU(nn.Module):
    """Convolution, SwiGLU, transposed convolution along L of [B, R, L, F] (section 2.3)."""

    def __init__(self, num_features: int, num_hidden: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        sizes = (1, kernel_size), (1, stride), (0, kernel_size - stride)
        self.up = nn.Conv2d(num_features, 2 * num_hidden, *sizes)  # 2-D: no copy of channels-last
        self.down = nn.ConvTranspose2d(num_hidden, num_features, *sizes)

    def forward(self, x_BRLF: Tensor) -> Tensor:
        """Transform each sequence by itself."""
        length = x_BRLF.shape[2]
        padded = F.pad(x_BRLF, (0, 0, 0, self.stride - 1))  # for a last window, or left out
        values, gates = self.up(padded.permute(0, 3, 1, 2)).chunk(2, dim=1)
        y_BRLF = self.down(values * F.silu(gates)).permute(0, 2, 3, 1)
        if self.stride > 1:  # longer than needed at any length: a tracer knows that it is cut
            y_BRLF = F.pad(y_BRLF, (0, 0, 0, 1))
        return y_BRLF[:, :, :length]


class PathBlock(nn.Module):
    """Feed-forward, attention, feed-forward along L of [B, R, L, F]: pre-norm, residual."""

    def __init__(self, num_features: int, num_heads: int, *sizes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSGroupNorm(num_features) for _ in range(3))
        self.before = ConvSwiGLU(num_features, *sizes)
        self.attention = Attention(num_features, num_heads, rotary=True)
        self.after = ConvSwiGLU(num_features, *sizes)

    @compiled_by_shape
    def forward(self, x_BRLF: Tensor) -> Tensor:
        """Transform each sequence by itself."""
        before, between, after = self.norms
        x = x_BRLF + self.before(before(x_BRLF))
        x = x + self.attention(between(x).flatten(0, 1)).view_as(x)
        return x + self.after(after(x))


class TFLocoformer(nn.Module):
    """Blocks along the frequency bins of each frame and along the frames of each bin, in turns.

    A `kernel_stride` above 1 makes the feed-forward networks skip places.
    """

    output_parameters: tuple[str, ...] = ("spectra.deconv",)

    def __init__(
        self,
        num_speakers: int = 2,
        fft_size: int = 128,
        stride: int = 64,
        num_layers: int = 6,
        num_features: int = 128,
        num_heads: int = 4,
        num_hidden: int = 384,
        kernel_size: int = 4,
        kernel_stride: int = 1,
        padding: str = "end",
    ) -> None:
        super().__init__()
        check_counts(locals())
        check_sizes(kernel_size, kernel_stride)
        self.spectra = Spectra(num_speakers, num_features, fft_size, stride, padding)
        self.num_speakers, self.masking = num_speakers, False
        self.min_length, self.stride = self.spectra.least, stride
        sizes = (num_features, num_heads, num_hidden, kernel_size, kernel_stride)
        self.blocks = nn.ModuleList(PathBlock(*sizes) for _ in range(2 * num_layers))
        init_xavier(self)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T] of the speakers, in no particular order."""
        return self.spectra(mixture_BT, self._network)

    def _network(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = swapped(block(x))
        return x
