"""What surrounds a network on complex spectra: Fourier transform, 3x3 convolutions and the way back.

TF-Locoformer and TF-GridNet take the real and imaginary parts of a short-time Fourier transform (a
Hann window, frames centred on multiples of the stride, the ends mirrored), and estimate those of
every speaker. The mixture is divided by its standard deviation and the estimates multiplied by it.
All of this runs in fp32 or wider.

Shapes: B batch, S speakers, T samples, N frames, Q frequency bins, F features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.frames import check_mixture, check_sizes, widen

NORM_EPS = 1e-5


class Spectra(nn.Module):
    """`encode` a mixture [B, T] as features [B, N, Q, F]; `decode` them as estimates [B, S, T].

    The mixture is continued by its mirror image to whole strides (`padding` "end"), or not ("none",
    as in ESPnet, whose last samples are divided by the edge of the window, 1/1660 at worst).
    """

    def __init__(
        self, num_speakers: int, num_features: int, fft_size: int, stride: int, padding: str
    ) -> None:
        super().__init__()
        check_sizes(num_speakers, fft_size, stride, fft_size)
        if 2 * stride > fft_size:
            raise ValueError(f"stride={stride} with fft_size={fft_size}: choose at most half of it")
        if padding not in ("end", "none"):
            raise ValueError(f"padding={padding!r}: choose end or none")
        self.padded = padding == "end"
        self.fft_size, self.stride, self.num_speakers = fft_size, stride, num_speakers
        self.conv = nn.Conv2d(2, num_features, 3, padding=1)
        self.norm = nn.GroupNorm(1, num_features, eps=NORM_EPS)
        self.deconv = nn.ConvTranspose2d(num_features, 2 * num_speakers, 3, padding=1)

    def encode(self, mixture_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, N, Q, F] and the standard deviation [B, 1] of each mixture."""
        check_mixture(mixture_BT, self.fft_size // 2 + 1)
        with torch.autocast(mixture_BT.device.type, enabled=False):
            wave_BT = widen(mixture_BT)
            scale_B1 = (wave_BT.var(1, keepdim=True) + 1e-16).sqrt()  # finite gradients at silence
            behind = -wave_BT.shape[1] % self.stride if self.padded else 0
            padded_BT = F.pad(wave_BT / scale_B1, (0, behind), "reflect")
            spectrum_BQN = torch.stft(padded_BT, return_complex=True, **self._transform(padded_BT))
            parts_B2NQ = torch.view_as_real(spectrum_BQN).permute(0, 3, 2, 1)
            return self.norm(self.conv(parts_B2NQ)).permute(0, 2, 3, 1).contiguous(), scale_B1

    def decode(self, x_BNQF: Tensor, scale_B1: Tensor, num_samples: int) -> Tensor:
        """Estimates [B, S, T] of features, multiplied by `scale_B1`."""
        with torch.autocast(x_BNQF.device.type, enabled=False):
            parts = self.deconv(widen(x_BNQF).permute(0, 3, 1, 2)).unflatten(1, (-1, 2))
            spectra = torch.complex(parts[:, :, 0], parts[:, :, 1]).flatten(0, 1).mT
            length = None if self.padded else num_samples
            waves = torch.istft(spectra, length=length, **self._transform(parts))
            waves_BST = waves.unflatten(0, (-1, self.num_speakers))[..., :num_samples]
            return waves_BST * scale_B1.unsqueeze(1)

    def _transform(self, like: Tensor) -> dict[str, int | Tensor]:
        window = torch.hann_window(self.fft_size, dtype=like.dtype, device=like.device)
        return {"n_fft": self.fft_size, "hop_length": self.stride, "window": window}


def init_xavier(model: nn.Module) -> None:
    """Start as ESPnet's recipes do: uniform Xavier weights, no biases, norms as torch has them."""
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind.startswith("weight") and parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        elif kind.startswith("bias"):
            nn.init.zeros_(parameter)
