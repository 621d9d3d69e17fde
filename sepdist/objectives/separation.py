"""Supervised separation with utterance-level permutation-invariant training (uPIT) on SI-SNR.

Kolbaek et al., "Multitalker Speech Separation with Utterance-level Permutation Invariant Training",
2017; paper 1, section 2. Items of a batch have equal lengths; a padded tail counts as silence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sepdist.data.records import Batch
from sepdist.metrics.permutation import best_permutation, permutation_rank
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr
from sepdist.objectives.contract import Metrics, check_outputs, sources_of


class Separation:
    """Negative SI-SNR of the best permutation, mean over sources and items, always in fp32.

    Items whose loss in dB is below `threshold` count as solved and get no gradient (SepFormer:
    -30). Metrics per item: `si_snr`, `si_snri` (dB, mean over sources), `permutation` (its rank).
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold

    def __call__(self, model: Callable[[Tensor], Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; `batch.sources` must be as many as the model's outputs."""
        best_B, order_BS = best_permutation(pair_scores(model, batch))
        return mean_above(-best_B, self.threshold), report(best_B, order_BS, batch)


def pair_scores(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Run the model and return `score_pairs`; a batch without sources never reaches the model."""
    sources_of(batch)
    return score_pairs(model(batch.mixture), batch)


def score_pairs(estimates_BST: Tensor, batch: Batch) -> Tensor:
    """SI-SNR [B, S, S] in dB, in fp32, of each estimate (axis 1) against each source (axis 2)."""
    sources_BST = sources_of(batch)
    advice = "make model.num_speakers and data.num_sources equal"
    check_outputs(estimates_BST, sources_BST, advice)
    with torch.autocast(batch.mixture.device.type, enabled=False):
        return pairwise_si_snr(estimates_BST.float(), sources_BST)


def report(best_B: Tensor, order_BS: Tensor, batch: Batch) -> Metrics:
    """Metrics of the best permutation: `si_snr`, `si_snri` (dB) and `permutation`, [B] each."""
    before_B = si_snr(batch.mixture.unsqueeze(1), sources_of(batch)).mean(1)
    scores_B = best_B.detach()
    return {
        "si_snr": scores_B,
        "si_snri": scores_B - before_B,
        "permutation": permutation_rank(order_BS),
    }


def mean_above(losses_B: Tensor, threshold: float | None) -> Tensor:
    """Mean of the losses above the threshold; zero with zero gradient if there are none."""
    if threshold is None:
        return losses_B.mean()
    # `~(<=)` keeps NaN: a broken item must be noticed, not skipped.
    kept = ~(losses_B <= threshold)
    return torch.where(kept, losses_B, 0.0).sum() / kept.sum().clamp_min(1)
