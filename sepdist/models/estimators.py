"""Input checks and level normalisation shared by the SI-SNR estimators.

Shapes: B batch, S sources, T samples.
"""

import torch
from torch import Tensor

from sepdist.models.checks import check_mixture


def check_estimates(mixture_BT: Tensor, estimates_BST: Tensor, min_length: int) -> None:
    """Raise ValueError unless the shapes are [B, T] and [B, S, T] with T >= `min_length`."""
    check_mixture(mixture_BT, min_length)
    if estimates_BST.ndim != 3 or estimates_BST[:, 0].shape != mixture_BT.shape:
        raise ValueError(
            f"estimates of shape {tuple(estimates_BST.shape)} for a mixture of shape"
            f" {tuple(mixture_BT.shape)}: expected [B, S, T] for [B, T]"
        )


def standardise(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last axis; silence stays silence."""
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-10)
