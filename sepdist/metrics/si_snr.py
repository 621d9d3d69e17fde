"""Scale-invariant signal-to-noise ratio (SI-SNR) in dB, differentiable, in fp32 or wider.

The mean over time is removed first and 1e-8 guards every division and the logarithm, as in
published systems: a silent source gives -80 dB and a perfect estimate about 80 dB plus its energy
in dB, never NaN. Those -80 dB mean nothing, so means leave silent sources out; Wisdom et al.,
"What's All the FUSS About Free Universal Sound Separation Data?", 2021, score them apart too.

Shapes: B batch, S sources, T samples.
"""

import torch
from torch import Tensor

from sepdist.audio import SILENCE


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


def silent_sources(sources: Tensor) -> Tensor:
    """Tell which sources [..., T] stay within one 16-bit step, so have no SI-SNR: bool [...]."""
    return sources.amax(-1) - sources.amin(-1) < 2 * SILENCE


def mean_audible(values_BS: Tensor, silent_BS: Tensor) -> Tensor:
    """Mean over the audible sources of each item, [B]; 0 for an item that has none."""
    num_audible_B = (~silent_BS).sum(-1).clamp_min(1).to(values_BS.dtype)
    # A factor, exactly 1 without silence, so that the bits are those of a plain mean.
    return values_BS.masked_fill(silent_BS, 0.0).mean(-1) * (silent_BS.shape[-1] / num_audible_B)


def _centred(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x - x.mean(-1, keepdim=True)
