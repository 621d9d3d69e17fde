"""Multi-head self-attention over sequences, and sinusoidal positional encodings.

Vaswani et al., "Attention Is All You Need", 2017, sections 3.2 and 3.5. Queries, keys and values
come from one matrix product, and torch's fused kernel never writes the [L, L] scores.

Shapes: R sequences, L places, F features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.frames import widen


def sinusoids(length: int, like: Tensor) -> Tensor:
    """Positional encoding [length, F] in the type of `like` [..., F].

    Features 2i and 2i + 1 of place p are sin(p / 10000^(2i/F)) and cos(p / 10000^(2i/F)).
    """
    num_features = like.shape[-1]
    places = torch.arange(length, device=like.device, dtype=torch.float32)
    even = torch.arange(0, num_features, 2, device=like.device, dtype=torch.float32)
    angles = torch.outer(places, torch.exp(even * (-math.log(10000) / num_features)))
    pairs = torch.stack([angles.sin(), angles.cos()], dim=-1)
    return pairs.flatten(1)[:, :num_features].to(like.dtype)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): turn each pair of features of [..., L, F] by its place.

    The angles are those of `sinusoids`.
    """
    (sine, cosine), (even, odd) = (
        wave.unflatten(-1, (-1, 2)).unbind(-1) for wave in (sinusoids(x.shape[-2], widen(x)), x)
    )
    pairs = (even * cosine - odd * sine, odd * cosine + even * sine)
    return torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention without a mask, [R, L, F] -> [R, L, F].

    `rotary` turns queries and keys by their places; then there are no biases.
    """

    def __init__(self, num_features: int, num_heads: int, rotary: bool = False) -> None:
        super().__init__()
        if num_features % num_heads or (rotary and num_features // num_heads % 2):
            wrong = f"{num_features} features do not divide into num_heads={num_heads}"
            raise ValueError(wrong + " of an even size" * rotary)
        self.num_heads, self.rotary = num_heads, rotary
        self.qkv = nn.Linear(num_features, 3 * num_features, bias=not rotary)
        self.out = nn.Linear(num_features, num_features, bias=not rotary)
        nn.init.xavier_uniform_(self.qkv.weight)
        for layer in () if rotary else (self.qkv, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, x_RLF: Tensor) -> Tensor:
        """Attend within each sequence."""
        # The gradients of three chunks are joined in one pass; with a dimension of size three they
        # would be joined and then transposed.
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in self.qkv(x_RLF).chunk(3, dim=-1)
        )
        if self.rotary:
            query, key = rotate(query), rotate(key)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))
