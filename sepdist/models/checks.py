"""Checks of sizes and inputs that the models share."""

from torch import Tensor

MAX_CHUNK = 10_000  # frames; the time of attention grows with its square
MAX_OVERLAP = 64  # frames at one place; joining them takes as many passes over the signal


def check_sizes(num_speakers: int, kernel_size: int, stride: int, chunk_size: int = 2) -> None:
    """Raise ValueError for sizes that no mask network can have."""
    if not 1 <= stride <= kernel_size:
        raise ValueError(
            f"stride={stride} with kernel_size={kernel_size}: choose 1 <= stride <= kernel_size"
        )
    if kernel_size > MAX_OVERLAP * stride:
        raise ValueError(
            f"kernel_size={kernel_size} with stride={stride}: more than {MAX_OVERLAP} frames would"
            " overlap"
        )
    if num_speakers < 1:
        raise ValueError(f"num_speakers={num_speakers}: choose at least one")
    if not 2 <= chunk_size <= MAX_CHUNK or chunk_size % 2:
        raise ValueError(
            f"chunk_size={chunk_size}: chunks overlap by half, choose an even number from 2 to"
            f" {MAX_CHUNK}"
        )


def check_mixture(mixture_BT: Tensor, least: int) -> None:
    """Raise ValueError unless the shape is [B, T] with T >= `least`."""
    if mixture_BT.ndim != 2 or mixture_BT.shape[1] < least:
        raise ValueError(
            f"mixture of shape {tuple(mixture_BT.shape)}: expected [B, T] with T >= {least} samples"
        )


def check_estimates(mixture_BT: Tensor, estimates_BST: Tensor, min_length: int) -> None:
    """Raise ValueError unless the shapes are [B, T] and [B, S, T] with T >= `min_length`."""
    check_mixture(mixture_BT, min_length)
    if estimates_BST.ndim != 3 or estimates_BST[:, 0].shape != mixture_BT.shape:
        raise ValueError(
            f"estimates of shape {tuple(estimates_BST.shape)} for a mixture of shape"
            f" {tuple(mixture_BT.shape)}: expected [B, S, T] for [B, T]"
        )
