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
    """Rotary positions (Su et al. 2021): turn features 2i and 2i + 1 of place p, [..., L, F].

    The angle is p / 10000^(2i/F), as in `sinusoids`.
    """
    waves = sinusoids(x.shape[-2], widen(x))
    sine, cosine = waves[:, 0::2], waves[:, 1::2]
    even, odd = widen(x)[..., 0::2], widen(x)[..., 1::2]
    pairs = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention without a mask, [R, L, F] -> [R, L, F].

    `num_hidden` is the size of all heads together (default F); `rotary` turns queries and keys.
    """

    def __init__(
        self,
        num_features: int,
        num_heads: int,
        num_hidden: int | None = None,
        bias: bool = True,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        num_hidden = num_hidden or num_features
        if num_hidden % num_heads or (rotary and num_hidden // num_heads % 2):
            wanted = " of an even size" if rotary else ""
            raise ValueError(
                f"{num_hidden} features do not divide into num_heads={num_heads}{wanted}"
            )
        self.num_heads, self.rotary = num_heads, rotary
        self.qkv = nn.Linear(num_features, 3 * num_hidden, bias)
        self.out = nn.Linear(num_hidden, num_features, bias)
        nn.init.xavier_uniform_(self.qkv.weight)
        if bias:
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
        if self.rotary:
            query, key = rotate(query), rotate(key)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))
