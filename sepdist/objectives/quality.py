"""SI-SNR estimation: predict the SI-SNR of a separator's estimates without their sources.

Paper 2, section 4.1: mean absolute error in dB. Estimates come in the order of the sources, so the
true SI-SNR is that of estimate i against source i.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.metrics.si_snr import mean_audible, si_snr, silent_sources
from sepdist.objectives.contract import Metrics, measured, sources_of


class Quality:
    """Mean absolute error of the predicted SI-SNR over audible sources and items.

    `limits` ([low, high] in dB) clip the targets of the loss. Metrics per item, means over sources
    in dB, never clipped: `mae`, `bias` (predicted minus true), `predicted` and `true_si_snr`.
    """

    def __init__(self, limits: Sequence[float] | None = None) -> None:
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
        true_BS = si_snr(batch.estimates, sources_BST)
        predicted_BS = model(batch.mixture, batch.estimates).float()
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
