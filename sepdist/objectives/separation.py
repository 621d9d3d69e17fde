"""Supervised separation: a batch with sources in, the permutation-invariant negative SI-SNR out (uPIT).

Kolbaek et al., "Multitalker Speech Separation with Utterance-level Permutation Invariant Training", 2017; paper 1,
section 2. Items of a batch have equal lengths; a padded tail counts as silence.
"""

import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.metrics.permutation import best_permutation, permutation_rank
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr


class Separation:
    """Minus the SI-SNR of the best assignment, mean over sources and items, in fp32 whatever the autocast.

    Metrics per item: `si_snr`, `si_snri` (dB, mean over sources) and `permutation`, the rank of the assignment.
    `threshold`: items whose loss is below it, in dB, are solved already and get no gradient (SepFormer uses -30).
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; needs `batch.sources`, as many as the model has outputs."""
        scores_BSS = pair_scores(model, batch)
        best_B, order_BS = best_permutation(scores_BSS)
        return mean_above(-best_B, self.threshold), report(best_B, order_BS, batch)


def pair_scores(model: nn.Module, batch: Batch) -> Tensor:
    """`score_pairs` of the model's estimates; a batch without sources never reaches the model."""
    sources_of(batch)
    return score_pairs(model(batch.mixture), batch)


def sources_of(batch: Batch) -> Tensor:
    """The sources [B, S, T] of a batch that must have some."""
    if batch.sources is None:
        raise ValueError("this objective needs sources; this data set has mixtures only")
    return batch.sources


def score_pairs(estimates_BST: Tensor, batch: Batch) -> Tensor:
    """The SI-SNR [B, S, S] in dB of each estimate (axis 1) against each source, in fp32 whatever the autocast."""
    sources_BST = sources_of(batch)
    if estimates_BST.shape != sources_BST.shape:
        raise ValueError(
            f"the model gives {tuple(estimates_BST.shape)}, the sources are {tuple(sources_BST.shape)} [B, S, T]"
            ": make model.num_speakers and data.num_sources equal"
        )
    with torch.autocast(batch.mixture.device.type, enabled=False):
        return pairwise_si_snr(estimates_BST.float(), sources_BST)


def report(best_B: Tensor, order_BS: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The metrics of the best assignment: `si_snr`, `si_snri` (dB, mean over sources) and `permutation`."""
    before_B = si_snr(batch.mixture.unsqueeze(1), sources_of(batch)).mean(1)
    scores_B = best_B.detach()
    return {
        "si_snr": scores_B,
        "si_snri": scores_B - before_B,
        "permutation": permutation_rank(order_BS),
    }


def mean_above(losses_B: Tensor, threshold: float | None) -> Tensor:
    """The mean of the losses above the threshold; zero, with zero gradient, where there is none."""
    if threshold is None:
        return losses_B.mean()
    # `~(<=)` keeps NaN, so that a broken item is seen and not skipped.
    kept = ~(losses_B <= threshold)
    return torch.where(kept, losses_B, 0.0).sum() / kept.sum().clamp_min(1)
