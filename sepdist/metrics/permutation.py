"""Find the best assignment of estimates to sources from a score for every pair.

Shapes: B batch, S sources, P = S! permutations.
"""

import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor

# Sources whose permutations are all tried; for more, the Hungarian method on the CPU. It is faster
# there from 4 on, but a GPU would wait for it (8! = 40,320 permutations are little to a GPU).
MAX_EXHAUSTIVE, MAX_EXHAUSTIVE_ON_DEVICE = 3, 8


def best_permutation(scores_BSS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest mean score [B], differentiable, and its order [B, S].

    `scores_BSS[:, i, j]` is the score of estimate i against source j; in the order, source j has
    estimate `order_BS[:, j]`. Up to 3 sources the first of equal permutations wins.
    """
    if scores_BSS.ndim != 3 or scores_BSS.shape[1] != scores_BSS.shape[2]:
        raise ValueError(
            f"scores have shape {tuple(scores_BSS.shape)}, not [B, S, S]: one estimate per source"
        )
    num_sources, known_BSS = scores_BSS.shape[1], scores_BSS.detach()
    on_cpu = known_BSS.device.type == "cpu"
    if num_sources <= (MAX_EXHAUSTIVE if on_cpu else MAX_EXHAUSTIVE_ON_DEVICE):
        orders_PS = all_orders(num_sources).to(known_BSS.device, non_blocking=True)
        order_BS = orders_PS[total_scores(known_BSS).argmax(1)]
    else:
        order_BS = _hungarian(known_BSS)
    return scores_BSS.gather(1, order_BS.unsqueeze(1)).squeeze(1).mean(-1), order_BS


def reorder(estimates_BST: Tensor, order_BS: Tensor) -> Tensor:
    """Put the estimates in the order of the sources."""
    return torch.take_along_dim(estimates_BST, order_BS.unsqueeze(-1), dim=1)


def permutation_rank(order_BS: Tensor) -> Tensor:
    """Lexicographic rank of each order among all permutations, int64 [B]; 0 is the identity."""
    num_sources = order_BS.shape[1]
    rank_B = torch.zeros_like(order_BS[:, 0])
    for j in range(num_sources):
        smaller_later_B = (order_BS[:, j + 1 :] < order_BS[:, j : j + 1]).sum(1)
        rank_B = rank_B + smaller_later_B * math.factorial(num_sources - 1 - j)
    return rank_B


@functools.cache
def all_orders(num_sources: int) -> Tensor:
    """All permutations in lexicographic order, int64 [P, S]."""
    return torch.tensor(list(itertools.permutations(range(num_sources))))


def total_scores(scores_BSS: Tensor) -> Tensor:
    """Summed score of each permutation of `all_orders`, [B, P], differentiable."""
    num_sources = scores_BSS.shape[1]
    orders_PS = all_orders(num_sources).to(scores_BSS.device, non_blocking=True)
    return scores_BSS[:, orders_PS, torch.arange(num_sources, device=scores_BSS.device)].sum(-1)


def _hungarian(scores_BSS: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment  # late: SciPy takes a second to import

    # The method fails on NaN, but here the loss must stay NaN, so that the engine skips the step.
    scores = torch.nan_to_num(scores_BSS.double(), nan=-1e9, posinf=1e9, neginf=-1e9).cpu().numpy()
    orders = [linear_sum_assignment(matrix.T, maximize=True)[1] for matrix in scores]
    return torch.from_numpy(np.stack(orders).astype(np.int64)).to(scores_BSS.device)
