"""Self-attention over sequences [N, L, F] without masks, and the sinusoids that tell its places apart.

Vaswani et al., "Attention Is All You Need", 2017, sections 3.2 and 3.5. Queries, keys and values come from one matrix
product, and torch's fused kernel never writes the [L, L] scores.

Shapes: N sequences, L places, F features, H heads, D = F / H features of a head.
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
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(like.dtype)


def attend(x_NLF: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Multi-head self-attention, [N, L, F] -> [N, L, F], with the parameters of `attention_parameters`."""
    num_heads = in_weight.shape[1]
    projected = F.linear(x_NLF, in_weight.flatten(0, 2), in_bias).unflatten(-1, (3, num_heads, -1))
    query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)  # [N, H, L, D] each
    attended = F.scaled_dot_product_attention(query, key, value)
    return F.linear(attended.transpose(1, 2).flatten(2), out_weight, out_bias)


def attention_parameters(num_features: int, num_heads: int) -> tuple[nn.Parameter, ...]:
    """Fresh weights and biases: into [3, H, D, F] and [3 F], out of the heads [F, F] and [F]."""
    if num_features % (2 * num_heads):
        raise ValueError(f"{num_features} features in {num_heads} heads: choose an even number of features per head")
    shapes = (3, num_heads, num_features // num_heads, num_features), (num_features, num_features)
    in_weight, out_weight = (nn.Parameter(torch.empty(shape)) for shape in shapes)
    # One Xavier for the three at once, and none for the output, as torch's nn.MultiheadAttention starts.
    nn.init.xavier_uniform_(in_weight.data.flatten(0, 2))
    nn.init.uniform_(out_weight, -(num_features**-0.5), num_features**-0.5)
    biases = (nn.Parameter(torch.zeros(count)) for count in (3 * num_features, num_features))
    in_bias, out_bias = biases
    return in_weight, in_bias, out_weight, out_bias
