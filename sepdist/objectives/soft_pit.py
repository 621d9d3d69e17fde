"""Soft PIT: separation in which every assignment of estimates to sources counts by its likelihood.

Yousefi, Khorram and Hansen, "Probabilistic Permutation Invariant Training for Speech Separation", 2019 (paper 1,
section 2.2): the assignment is a hidden variable with equal prior probabilities, and the loss its negative
log-likelihood, a soft minimum. Theirs is of squared errors; this one is of minus the SI-SNR in dB.
"""

import math

import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.metrics.permutation import best_permutation, total_scores
from sepdist.objectives.separation import pair_scores, report


class SoftPit:
    """The soft minimum over assignments of minus the mean SI-SNR, mean over items.

    With a `temperature` near 0 dB it is that of PIT, with a high one the mean over all assignments. Metrics as in the
    separation objective, of the best assignment.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(
                f"temperature={temperature} dB: above 0; for PIT itself take objective=separation"
            )
        self.temperature = temperature

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; needs `batch.sources`, as many as the model has outputs."""
        scores_BSS = pair_scores(model, batch)
        means_BP = total_scores(scores_BSS) / scores_BSS.shape[1]
        evidence_B = torch.logsumexp(means_BP / self.temperature, 1) - math.log(means_BP.shape[1])
        return -self.temperature * evidence_B.mean(), report(*best_permutation(scores_BSS), batch)
