"""Scale-invariant signal-to-noise ratio (SI-SNR) in dB, differentiable, in fp32 or wider.

The mean over time is removed first and 1e-8 guards every division and the logarithm, as in
published systems: a silent source gives -80 dB and a perfect estimate about 80 dB plus its energy
in dB, never NaN.

Shapes: B batch, S sources, T samples.
"""

import torch
from torch import Tensor


def si_snr(estimates: Tensor, sources: Tensor, eps: float = 1e-8) -> Tensor:
    """SI-SNR in dB over the last axis, [..., T] and [..., T] -> [...]; leading axes broadcast."""
    if estimates.shape[-1] != sources.shape[-1]:
        raise ValueError(
            f"estimates have {estimates.shape[-1]} samples, sources {sources.shape[-1]}"
        )
    estimates, sources = _centred(estimates), _centred(sources)
    energy = sources.square().sum(-1, keepdim=True)
    projection = (estimates * sources).sum(-1, keepdim=True) / (energy + eps) * sources
    error = estimates - projection
    return 10 * torch.log10(projection.square().sum(-1) / (error.square().sum(-1) + eps) + eps)


def pairwise_si_snr(estimates_BST: Tensor, sources_BST: Tensor) -> Tensor:
    """SI-SNR [B, S, S] in dB of each estimate (axis 1) against each source (axis 2)."""
    return si_snr(estimates_BST.unsqueeze(2), sources_BST.unsqueeze(1))


def _centred(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x - x.mean(-1, keepdim=True)
