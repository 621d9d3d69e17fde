"""SI-SNR estimation: predict the SI-SNR of a separator's estimates without their sources.

Paper 2, section 4.1: mean absolute error in dB. Estimates come in the order of the sources, so the
true SI-SNR is that of estimate i against source i.

Shapes: B batch, S sources, T samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.metrics.permutation import best_permutation, reorder
from sepdist.metrics.si_snr import mean_audible, pairwise_si_snr, si_snr, silent_sources
from sepdist.objectives.contract import Metrics, measured, sources_of
from sepdist.objectives.spans import uniform
from sepdist.seeding import rng


class Quality:
    """Mean absolute error of the predicted SI-SNR over audible sources and items.

    `limits` ([low, high] in dB) clip the targets of the loss. In training the estimates of a share
    `altered` of the items are altered (`alter`), so that an estimator also knows what a separator
    may try to please it; not in the paper. Metrics per item, means over sources in dB, never
    clipped: `mae`, `bias` (predicted minus true), `predicted` and `true_si_snr`.
    """

    def __init__(self, limits: Sequence[float] | None = None, altered: float = 0.0) -> None:
        if not 0 <= altered <= 1:
            raise ValueError(f"altered={altered}: give a share of the items, 0 to 1")
        self.altered = altered
        if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
            raise ValueError(f"limits={limits}: give [low, high] in dB with low < high, or null")
        self.limits = limits

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError for a separator."""
        if not getattr(model, "estimates_si_snr", False):
            raise ValueError(
                f"objective quality trains an SI-SNR estimator, but a {type(model).__name__} does "
                "not estimate SI-SNR: set model=ssqp_wav2vec2, another ssqp_* or sisnr_cnn"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; needs `batch.sources` and `batch.estimates`."""
        sources_BST = sources_of(batch)
        if batch.estimates is None:
            raise ValueError(
                "objective quality needs a separator's estimates, but this data set has none: "
                "write one with corpus=separated"
            )
        estimates_BST = self._altered(batch) if self.altered and model.training else batch.estimates
        true_BS = si_snr(estimates_BST, sources_BST)
        predicted_BS = model(batch.mixture, estimates_BST).float()
        if predicted_BS.shape != true_BS.shape:
            raise ValueError(
                f"the model predicts {tuple(predicted_BS.shape)} values for "
                f"{tuple(true_BS.shape)} [B, S] estimates"
            )
        target_BS = true_BS if self.limits is None else true_BS.clamp(*self.limits)
        silent_BS = silent_sources(sources_BST)
        errors = (predicted_BS - target_BS).abs().view(1, -1)
        loss = mean_audible(errors, silent_BS.view(1, -1)).sum()  # 0 without any
        error_BS = predicted_BS.detach() - true_BS
        metrics = {
            "mae": error_BS.abs(),
            "bias": error_BS,
            "predicted": predicted_BS.detach(),
            "true_si_snr": true_BS,
        }
        has_value_B = ~silent_BS.all(1)
        return loss, {
            name: measured(mean_audible(values_BS, silent_BS), has_value_B)
            for name, values_BS in metrics.items()
        }

    def _altered(self, batch: Batch) -> Tensor:
        """Alter some items, [B, S, T]; the estimates keep the best order of the sources."""
        sources_BST, estimates_BST = sources_of(batch), batch.estimates
        assert estimates_BST is not None
        items = []
        for item, position in enumerate(batch.positions.tolist()):
            draw = rng(0, "altered", position)
            given = batch.mixture[item], estimates_BST[item], sources_BST[item]
            if uniform(draw) < self.altered:
                kind = ALTERATIONS[int(uniform(draw) * len(ALTERATIONS))]
                items.append(alter(*given, kind, uniform(draw)))
            else:
                items.append(given[1])
        altered_BST = torch.stack(items)
        _, order_BS = best_permutation(pairwise_si_snr(altered_BST, sources_BST))
        return reorder(altered_BST, order_BS)


ALTERATIONS = ("mixed", "leaking", "exchanged", "smoothed", "cleaned")


def alter(
    mixture_T: Tensor, estimates_ST: Tensor, sources_ST: Tensor, kind: str, amount: float
) -> Tensor:
    """Alter the estimates of an item, [S, T], by an `amount` from 0 to 1.

    They first get the level at which they explain most of the mixture. "mixed" goes that far to the
    mixture, "leaking" to the other speaker, "cleaned" to the source; "exchanged" gives them to each
    other from there on, and "smoothed" keeps the frequencies below that share.
    """
    energy_S1 = estimates_ST.square().sum(1, keepdim=True) + 1e-8
    fitted_ST = estimates_ST * (estimates_ST * mixture_T).sum(1, keepdim=True) / energy_S1
    place = round(amount * len(mixture_T))
    if kind == "exchanged":
        return torch.cat([fitted_ST[:, :place], fitted_ST.roll(1, 0)[:, place:]], 1)
    if kind == "smoothed":
        spectrum_SK = torch.fft.rfft(fitted_ST)
        spectrum_SK[:, max(2, place // 2 + 1) :] = 0
        return torch.fft.irfft(spectrum_SK, n=len(mixture_T))
    ends = {"mixed": mixture_T, "leaking": fitted_ST.roll(1, 0), "cleaned": sources_ST}
    return fitted_ST + amount * (ends[kind] - fitted_ST)
