"""Supervised separation with utterance-level permutation-invariant training (uPIT) on SI-SNR.

Kolbaek et al., "Multitalker Speech Separation with Utterance-level Permutation Invariant Training",
2017; paper 1, section 2. Items of a batch have equal lengths; a padded tail counts as silence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sepdist.data.records import Batch
from sepdist.metrics.permutation import best_permutation, permutation_rank
from sepdist.metrics.si_snr import mean_audible, pairwise_si_snr, si_snr, silent_sources
from sepdist.objectives.contract import Metrics, check_outputs, measured, sources_of


class Separation:
    """Negative SI-SNR of the best permutation, mean over sources and items, always in fp32.

    Items whose loss in dB is below `threshold` count as solved and get no gradient (SepFormer:
    -30). With `skip_silent` the mean leaves out silent sources, which give 80 dB each. Metrics per
    item: `si_snr`, `si_snri` (dB, mean over sources but `unscored`), `permutation` (its rank).
    """

    mean_of_items = property(lambda self: self.threshold is None and not self.skip_silent)

    def __init__(self, threshold: float | None = None, skip_silent: bool | None = None) -> None:
        self.threshold, self.skip_silent = threshold, skip_silent

    def __call__(self, model: Callable[[Tensor], Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; `batch.sources` must be as many as the model's outputs."""
        scores_BSS = pair_scores(model, batch)
        best_B, order_BS = best_permutation(scores_BSS)
        counts_B = None
        if self.skip_silent:
            scores_BS = scores_BSS.gather(1, order_BS.unsqueeze(1)).squeeze(1)
            silent_BS = silent_sources(sources_of(batch))
            best_B, counts_B = mean_audible(scores_BS, silent_BS), ~silent_BS.all(1)
        metrics = report(scores_BSS.detach(), order_BS, batch)
        return mean_above(-best_B, self.threshold, counts_B), metrics


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


def report(scores_BSS: Tensor, order_BS: Tensor, batch: Batch) -> Metrics:
    """Metrics of a permutation: `permutation` [B]; `si_snr` and `si_snri` in dB, `measured`."""
    unscored_BS = unscored(batch)
    scores_BS = scores_BSS.gather(1, order_BS.unsqueeze(1)).squeeze(1)
    before_BS = si_snr(batch.mixture.unsqueeze(1), sources_of(batch))
    scores_B, before_B = (mean_audible(one, unscored_BS) for one in (scores_BS, before_BS))
    pair = {"si_snr": scores_B, "si_snri": scores_B - before_B}
    found = {name: measured(values_B, ~unscored_BS.all(1)) for name, values_B in pair.items()}
    return found | {"permutation": permutation_rank(order_BS)}


def unscored(batch: Batch) -> Tensor:
    """Sources [B, S] that no score includes: silent ones, and one without anything to separate."""
    silent_BS = silent_sources(sources_of(batch))
    alone_BS = silent_sources(batch.mixture.unsqueeze(1) - sources_of(batch))
    return silent_BS | (alone_BS & silent_BS.any(1, keepdim=True))


def mean_above(losses_B: Tensor, threshold: float | None, counts_B: Tensor | None = None) -> Tensor:
    """Mean of the losses that count and exceed the threshold; zero without gradient if none do."""
    kept_B = torch.ones_like(losses_B, dtype=torch.bool) if counts_B is None else counts_B
    if threshold is not None:
        # `~(<=)` keeps NaN: a broken item must be noticed, not skipped.
        kept_B = kept_B & ~(losses_B <= threshold)
    return torch.where(kept_B, losses_B, 0.0).sum() / kept_B.sum().clamp_min(1)
