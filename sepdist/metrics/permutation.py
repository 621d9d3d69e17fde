"""Which estimate belongs to which source: a score for every pair in, the best assignment of each item out.

Shapes: B batch, S sources.
"""

import functools
import itertools
import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MAX_EXHAUSTIVE = 3  # 6 assignments; above, the Hungarian method on the CPU is quicker


def best_permutation(scores_BSS: Tensor) -> tuple[Tensor, Tensor]:
    """The highest mean score [B], differentiable, and its order [B, S]: source j is estimate `order[:, j]`.

    `scores_BSS[:, i, j]` is the score of estimate i against source j. Of equal assignments the lexicographically
    first wins, up to 3 sources.
    """
    if scores_BSS.ndim != 3 or scores_BSS.shape[1] != scores_BSS.shape[2]:
        raise ValueError(
            f"scores of shape {tuple(scores_BSS.shape)}: expected [B, S, S], one estimate per source"
        )
    num_sources = scores_BSS.shape[1]
    order_BS = (_exhaustive if num_sources <= MAX_EXHAUSTIVE else _hungarian)(scores_BSS.detach())
    return scores_BSS.gather(1, order_BS.unsqueeze(1)).squeeze(1).mean(-1), order_BS


def reorder(estimates_BST: Tensor, order_BS: Tensor) -> Tensor:
    """The estimates in the order of the sources."""
    return torch.take_along_dim(estimates_BST, order_BS.unsqueeze(-1), dim=1)


def permutation_rank(order_BS: Tensor) -> Tensor:
    """The lexicographic rank of each order among all permutations, int64 [B]; 0 is the identity."""
    num_sources = order_BS.shape[1]
    rank = torch.zeros_like(order_BS[:, 0])
    for j in range(num_sources):
        smaller_later = (order_BS[:, j + 1 :] < order_BS[:, j : j + 1]).sum(1)
        rank = rank + smaller_later * math.factorial(num_sources - 1 - j)
    return rank


@functools.cache
def all_orders(num_sources: int) -> Tensor:
    """All permutations, int64 [S!, S], each at its lexicographic rank."""
    return torch.tensor(list(itertools.permutations(range(num_sources))))


def total_scores(scores_BSS: Tensor) -> Tensor:
    """The summed score of each of the S! assignments, [B, S!], differentiable, in the order of `all_orders`."""
    num_sources = scores_BSS.shape[1]
    orders_PS = all_orders(num_sources).to(scores_BSS.device)
    return scores_BSS[:, orders_PS, torch.arange(num_sources, device=scores_BSS.device)].sum(-1)


def _exhaustive(scores_BSS: Tensor) -> Tensor:
    return all_orders(scores_BSS.shape[1]).to(scores_BSS.device)[total_scores(scores_BSS).argmax(1)]


def _hungarian(scores_BSS: Tensor) -> Tensor:
    # A score that is not finite must not stop the method: the loss stays not finite, and the engine skips the step.
    scores = torch.nan_to_num(scores_BSS.double(), nan=-1e9, posinf=1e9, neginf=-1e9).cpu().numpy()
    orders = [linear_sum_assignment(matrix.T, maximize=True)[1] for matrix in scores]
    return torch.from_numpy(np.stack(orders).astype(np.int64)).to(scores_BSS.device)
