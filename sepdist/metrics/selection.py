"""Select the outputs of a model that are speakers.

Shapes: B batch, M outputs of the model, S speakers, T samples.
"""

import torch
from torch import Tensor


def speakers_of(estimates_BMT: Tensor, num_extra_outputs: int = 0, num_loudest: int = 0) -> Tensor:
    """Drop the last `num_extra_outputs` and keep the `num_loudest` others (0: all), [B, S, T].

    Loudness is energy over the whole signal; the first of equals are kept, the order unchanged.
    """
    kept_BST = estimates_BMT[:, : estimates_BMT.shape[1] - num_extra_outputs]
    if not num_loudest:
        return kept_BST
    energy_BM = kept_BST.detach().double().square().sum(-1)
    ranked_BM = energy_BM.argsort(dim=1, descending=True, stable=True)
    chosen_BS = ranked_BM[:, :num_loudest].sort(dim=1).values
    return torch.take_along_dim(kept_BST, chosen_BS.unsqueeze(-1), dim=1)
