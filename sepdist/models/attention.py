"""Multi-head self-attention over sequences, and sinusoidal positional encodings.

Vaswani et al., "Attention Is All You Need", 2017, sections 3.2 and 3.5. Queries, keys and values
come from one matrix product, and torch's fused kernel never writes the [L, L] scores.

Shapes: R sequences, L places, F features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Attention(nn.Module):
    """Multi-head self-attention without a mask, [R, L, F] -> [R, L, F]."""

    def __init__(self, num_features: int, num_heads: int) -> None:
        super().__init__()
        if num_features % num_heads:
            raise ValueError(f"{num_features} features do not divide into num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(num_features, 3 * num_features)
        self.out = nn.Linear(num_features, num_features)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_RLF: Tensor) -> Tensor:
        """Attend within each sequence."""
        # The gradients of three chunks are joined in one pass; with a dimension of size three they
        # would be joined and then transposed.
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in self.qkv(x_RLF).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))
