"""SI-SNR estimation: a batch with a separator's estimates in, the error of a judge's prediction in dB out.

Paper 2, section 4.1: mean absolute error at true scale. The true SI-SNR is that of each estimate against the source
whose place it has: estimates come in the order of the sources.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.metrics.si_snr import si_snr


class Quality:
    """The mean absolute error, over sources and items, of the predicted SI-SNR; `limits` in dB clip what is learned.

    Metrics per item, means over its sources, in dB and never clipped: `mae`, `bias` (predicted minus true), and
    `predicted` and `true_si_snr` themselves.
    """

    def __init__(self, limits: Sequence[float] | None = None) -> None:
        if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
            raise ValueError(f"limits={limits}: give [low, high] in dB with low < high, or null")
        self.limits = limits

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that separates."""
        if not getattr(model, "estimates_si_snr", False):
            what = f"objective quality trains a model that judges estimates, a {type(model).__name__} makes them"
            raise ValueError(f"{what}: set model=ssqp_wav2vec2, another ssqp_* or sisnr_cnn")

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; needs `batch.sources` and `batch.estimates`."""
        if batch.sources is None or batch.estimates is None:
            lacking = "sources" if batch.sources is None else "estimates"
            raise ValueError(
                f"objective quality needs sources and a separator's estimates; this data set has no {lacking}"
            )
        true_BS = si_snr(batch.estimates, batch.sources)
        predicted_BS = model(batch.mixture, batch.estimates).float()
        if predicted_BS.shape != true_BS.shape:
            raise ValueError(
                f"the model gives {tuple(predicted_BS.shape)} for {tuple(true_BS.shape)} [B, S] estimates"
            )
        target_BS = true_BS if self.limits is None else true_BS.clamp(*self.limits)
        error_BS = predicted_BS.detach() - true_BS
        metrics = {
            "mae": error_BS.abs(),
            "bias": error_BS,
            "predicted": predicted_BS.detach(),
            "true_si_snr": true_BS,
        }
        loss = (predicted_BS - target_BS).abs().mean()
        return loss, {name: values.mean(1) for name, values in metrics.items()}
