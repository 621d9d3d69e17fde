"""Self-attention over sequences [R, L, F] without masks, and the sinusoids that tell its places apart.

Vaswani et al., "Attention Is All You Need", 2017, sections 3.2 and 3.5. Queries, keys and values come from one matrix
product, and torch's fused kernel never writes the [L, L] scores.

Shapes: R sequences, L places, F features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(length: int, like: Tensor) -> Tensor:
    """Positional encoding [length, F] for `like` [..., F], in its type: sin(p / 10000^(2i/F)) and cos in turns."""
    num_features = like.shape[-1]
    places = torch.arange(length, device=like.device, dtype=torch.float32)
    even = torch.arange(0, num_features, 2, device=like.device, dtype=torch.float32)
    angles = torch.outer(places, torch.exp(even * (-math.log(10000) / num_features)))
    return (
        torch.stack([angles.sin(), angles.cos()], dim=-1)
        .flatten(1)[:, :num_features]
        .to(like.dtype)
    )


class Attention(nn.Module):
    """Multi-head self-attention, [R, L, F] -> [R, L, F]."""

    def __init__(self, num_features: int, num_heads: int) -> None:
        super().__init__()
        if num_features % num_heads:
            raise ValueError(
                f"{num_features} features in num_heads={num_heads} heads: not a whole number in each"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(num_features, 3 * num_features)
        self.out = nn.Linear(num_features, num_features)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_RLF: Tensor) -> Tensor:
        """Each place's view of its own sequence."""
        # In thirds, whose gradients are joined in one pass; a dimension of three would be joined, then transposed.
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x_RLF).chunk(3, dim=-1)
        )
        return self.out(
            F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )
