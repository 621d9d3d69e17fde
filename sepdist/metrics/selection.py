"""Which outputs of a model are speakers, where it has more: the estimates of all outputs in, those of the speakers out.

Shapes: B batch, M outputs of the model, S speakers, T samples.
"""

import torch
from torch import Tensor


def speakers_of(estimates_BMT: Tensor, num_extra_outputs: int = 0, num_loudest: int = 0) -> Tensor:
    """[B, S, T]: all but the last `num_extra_outputs`, and of these the `num_loudest` (0: all), by the whole signal.

    They stay in the order of the outputs; of equally loud ones the first are taken.
    """
    kept_BST = estimates_BMT[:, : estimates_BMT.shape[1] - num_extra_outputs]
    if not num_loudest:
        return kept_BST
    energy_BM = kept_BST.detach().double().square().sum(-1)
    chosen_BS = (
        energy_BM.argsort(dim=1, descending=True, stable=True)[:, :num_loudest].sort(dim=1).values
    )
    return torch.take_along_dim(kept_BST, chosen_BS.unsqueeze(-1), dim=1)
