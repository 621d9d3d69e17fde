"""Frames of a waveform and back: the encoder and decoder that the mask networks share; checks.

Shapes: B batch, S speakers, T samples, N frames, F features.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8
MAX_CHUNK = 10_000  # frames; the time of attention grows with its square
PADDINGS = ("end", "none", "both")  # of cut_frames
MASKS: dict[str, Any] = {"relu": F.relu, "sigmoid": torch.sigmoid}
MAX_OVERLAP = 64  # frames at one place; joining them takes as many passes over the signal


def num_frames(num_samples: int, kernel_size: int, stride: int) -> int:
    """The number of frames that cover `num_samples` samples; the last one may be zero-padded."""
    return 1 + max(0, (num_samples - kernel_size + stride - 1) // stride)


def cut_frames(signal_BT: Tensor, kernel_size: int, stride: int, padding: str = "end") -> Tensor:
    """Overlapping frames [B, N, kernel_size] of at least that many samples.

    Zeros fill the last frame (`padding` "end"), or what fills no frame is left out ("none", as in
    Asteroid and SpeechBrain), or zeros surround the signal, `stride` at each side ("both", as in
    torchaudio).
    """
    front = stride if padding == "both" else 0
    behind = 0 if padding == "none" else front + stride - 1  # unfold leaves out what is too much
    # A sample more, cut off again: else a tracer asks whether disjoint frames fill the signal.
    padded = F.pad(signal_BT, (front, behind + 1))[..., :-1]
    return padded.unfold(-1, kernel_size, stride).contiguous()


def overlap_add(frames: Tensor, stride: int, num_samples: int, padding: str = "end") -> Tensor:
    """The sum [..., num_samples] of overlapping frames [..., N, K], cut with the same padding."""
    *lead, count, kernel_size = frames.shape
    pieces = -(-kernel_size // stride)
    frames = F.pad(frames, (0, pieces * stride - kernel_size)).unflatten(-1, (pieces, stride))
    total = sum(
        F.pad(frames[..., piece, :], (0, 0, piece, pieces - piece)) for piece in range(pieces)
    )
    assert isinstance(total, Tensor)
    signal = total.reshape(*lead, (count + pieces) * stride)  # longer than needed, at any length
    front = stride if padding == "both" else 0
    return signal[..., front : front + num_samples].clone(memory_format=torch.contiguous_format)


def init_filterbank(encoder: nn.Linear, decoder: nn.Linear) -> None:
    """Draw both weights as Asteroid does: Xavier normal for [F, 1, K], whose fans are K and F K."""
    num_filters, kernel_size = encoder.weight.shape
    deviation = math.sqrt(2 / (kernel_size + num_filters * kernel_size))
    for weight in (encoder.weight, decoder.weight):
        nn.init.normal_(weight, std=deviation)


def encode(mixture_BT: Tensor, encoder: nn.Linear, stride: int, padding: str = "end") -> Tensor:
    """Features [B, N, F] of the frames; ValueError unless [B, T] with at least one frame."""
    check_mixture(mixture_BT, encoder.in_features)
    return encoder(cut_frames(mixture_BT, encoder.in_features, stride, padding))


def decode(
    features_BNSF: Tensor, decoder: nn.Linear, stride: int, num_samples: int, padding: str = "end"
) -> Tensor:
    """Waveforms [B, S, T] of the speakers' features, in fp32 or wider."""
    return overlap_add(widen(decoder(features_BNSF)).transpose(1, 2), stride, num_samples, padding)


def widen(x: Tensor) -> Tensor:
    """x itself, or in fp32 if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def standardise(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last axis; silence stays silence."""
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-10)


def check_counts(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a count, num_*, below 1; `arguments` are the locals of a constructor."""
    for name, value in arguments.items():
        if name.startswith("num_") and value < 1:
            raise ValueError(f"{name}={value}: choose at least 1")


def check_sizes(kernel_size: int, stride: int, chunk_size: int = 2) -> None:
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
    if not 2 <= chunk_size <= MAX_CHUNK or chunk_size % 2:
        raise ValueError(
            f"chunk_size={chunk_size}: chunks overlap by half, choose an even number from 2 to"
            f" {MAX_CHUNK}"
        )


def check_variant(padding: str, mask_activation: str = "relu") -> None:
    """Raise ValueError for a padding or an activation of masks that no mask network has."""
    given = {"padding": (padding, PADDINGS), "mask_activation": (mask_activation, [*MASKS])}
    for name, (value, known) in given.items():
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")


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
