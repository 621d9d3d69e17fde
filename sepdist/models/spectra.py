"""What surrounds a network on complex spectra: Fourier transform, 3x3 convolutions, the way back.

TF-Locoformer and TF-GridNet take the real and imaginary parts of a short-time Fourier transform (a
Hann window, frames centred on multiples of the stride, the ends mirrored), and estimate those of
every speaker. The mixture is divided by its standard deviation and the estimates multiplied by it.

Shapes: B batch, S speakers, T samples, N frames, Q frequency bins, F features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.frames import check_mixture, check_sizes, overlap_add, widen

NORM_EPS = 1e-5


class Spectra(nn.Module):
    """Estimates [B, S, T] of a mixture [B, T] by a network on features [B, N, Q, F].

    All but the network runs in fp32 or wider. The mixture is continued by its mirror image to whole
    strides (`padding` "end"), or not ("none", as in ESPnet, which divides the last samples by the
    edge of the window, 1/1660 at worst).
    """

    def __init__(
        self, num_speakers: int, num_features: int, fft_size: int, stride: int, padding: str
    ) -> None:
        super().__init__()
        check_sizes(fft_size, stride, fft_size)
        if 2 * stride > fft_size:
            raise ValueError(f"stride={stride} with fft_size={fft_size}: choose at most half of it")
        if padding not in ("end", "none"):
            raise ValueError(f"padding={padding!r}: choose end or none")
        self.fft_size, self.stride = fft_size, stride
        # The fewest samples: one more than are mirrored at the end.
        self.least = fft_size // 2 + (stride if padding == "end" else 1)
        self.conv = nn.Conv2d(2, num_features, 3, padding=1)
        self.norm = nn.GroupNorm(1, num_features, eps=NORM_EPS)
        self.deconv = nn.ConvTranspose2d(num_features, 2 * num_speakers, 3, padding=1)

    def forward(self, mixture_BT: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Transform, run the network, transform back."""
        check_mixture(mixture_BT, self.least)
        device, num_samples = mixture_BT.device, mixture_BT.shape[1]
        with torch.autocast(device.type, enabled=False):
            wave_BT = widen(mixture_BT)
            window = torch.hann_window(self.fft_size, dtype=wave_BT.dtype, device=device)
            scale_B1 = (wave_BT.var(1, keepdim=True) + 1e-16).sqrt()  # finite gradients at silence
            around = (self.fft_size // 2, self.least - 1)
            frames = F.pad(wave_BT / scale_B1, around, "reflect").unfold(
                1, self.fft_size, self.stride
            )
            spectra_BNQ2 = torch.view_as_real(torch.fft.rfft(frames * window))
            x_BFNQ = self.conv(spectra_BNQ2.permute(0, 3, 1, 2))
            if torch.is_grad_enabled() and not x_BFNQ.requires_grad:  # see dual_path.global_norm
                x_BFNQ = x_BFNQ.detach().requires_grad_()
            x_BNQF = self.norm(x_BFNQ).permute(0, 2, 3, 1).contiguous()
        x_BNQF = network(x_BNQF)
        with torch.autocast(device.type, enabled=False):
            parts = self.deconv(widen(x_BNQF).permute(0, 3, 1, 2)).unflatten(1, (-1, 2))
            spectra_BSNQ = torch.complex(parts[:, :, 0], parts[:, :, 1])
            # Not torch.istft, which looks at the window's sums: a GPU would be waited for.
            frames = torch.fft.irfft(spectra_BSNQ, self.fft_size) * window
            windows = window.square().expand(frames.shape[2:])
            first, last = self.fft_size // 2, self.fft_size // 2 + num_samples
            waves, sums = (overlap_add(one, self.stride, last) for one in (frames, windows))
            return waves[..., first:] / sums[first:] * scale_B1.unsqueeze(1)


def init_xavier(model: nn.Module) -> None:
    """Start as ESPnet's recipes do: uniform Xavier weights, no biases, norms as torch has them."""
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind.startswith("weight") and parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        elif kind.startswith("bias"):
            nn.init.zeros_(parameter)
