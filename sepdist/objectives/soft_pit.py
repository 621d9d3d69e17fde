"""Soft PIT: separation in which every permutation counts by its likelihood.

Yousefi, Khorram and Hansen, "Probabilistic Permutation Invariant Training for Speech Separation",
2019 (paper 1, section 2.2): the permutation is a hidden variable with a uniform prior, and the loss
its negative log-likelihood, a soft minimum. They use squared errors; here it is negative SI-SNR.
"""

import math

import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.metrics.permutation import best_permutation, total_scores
from sepdist.objectives.contract import Metrics
from sepdist.objectives.separation import pair_scores, report


class SoftPit:
    """Soft minimum over permutations of the negative mean SI-SNR, mean over items.

    A `temperature` towards 0 dB gives PIT, a high one the mean over all permutations. Metrics as in
    `Separation`, of the best permutation.
    """

    mean_of_items = True

    def __init__(self, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(
                f"temperature={temperature} dB must be above 0; for PIT use objective=separation"
            )
        self.temperature = temperature

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; `batch.sources` must be as many as the model's outputs."""
        scores_BSS = pair_scores(model, batch)
        means_BP = total_scores(scores_BSS) / scores_BSS.shape[1]
        evidence_B = torch.logsumexp(means_BP / self.temperature, 1) - math.log(means_BP.shape[1])
        _, order_BS = best_permutation(scores_BSS)
        return -self.temperature * evidence_B.mean(), report(scores_BSS.detach(), order_BS, batch)
