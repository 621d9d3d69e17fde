"""Scale-invariant signal-to-noise ratio: estimates and sources in, decibels out; differentiable, in fp32 or wider.

The mean over time is removed first and 1e-8 guards every division and the logarithm, as in the published systems:
a silent source gives -80 dB and a perfect estimate ends near 80 dB plus the level of its energy, never NaN.

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


def si_snri(estimates: Tensor, sources: Tensor, mixture: Tensor) -> Tensor:
    """Improvement in dB over the mixture taken as the estimate: [B, S, T], [B, S, T], [B, T] -> [B, S]."""
    return si_snr(estimates, sources) - si_snr(mixture.unsqueeze(-2), sources)


def pairwise_si_snr(estimates_BST: Tensor, sources_BST: Tensor) -> Tensor:
    """SI-SNR in dB of every estimate against every source: [B, S, S], estimates along axis 1, sources along axis 2."""
    return si_snr(estimates_BST.unsqueeze(2), sources_BST.unsqueeze(1))


def _centred(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x - x.mean(-1, keepdim=True)
