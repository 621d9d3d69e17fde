"""Speech enhancement (SE), a pre-training task of paper 1, section 3.1.

The model has one output, and the target is the first source: whatever else is in the mixture,
usually noise, is to be removed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sepdist.data.records import Batch
from sepdist.metrics.si_snr import mean_audible, si_snr, silent_sources
from sepdist.objectives.contract import Metrics, check_outputs, sources_of
from sepdist.objectives.separation import mean_above


class Enhancement:
    """Negative SI-SNR of the only estimate against the clean `s1`, mean over items, always in fp32.

    Metrics per item: `si_snr` and `si_snri` (dB). `threshold` as in `Separation`.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold

    def __call__(self, model: Callable[[Tensor], Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; reads the first of `batch.sources`."""
        clean_BST = sources_of(batch)[:, :1]
        estimates_BST = model(batch.mixture)
        check_outputs(estimates_BST, clean_BST, "set num_speakers=1")
        with torch.autocast(batch.mixture.device.type, enabled=False):
            scores_BS = si_snr(estimates_BST.float(), clean_BST)
            loss = mean_above(-scores_BS.squeeze(1), self.threshold)
            before_BS = si_snr(batch.mixture.unsqueeze(1), clean_BST)
        scores_K = mean_audible(scores_BS.detach(), silent_sources(clean_BST))
        before_K = mean_audible(before_BS, silent_sources(clean_BST))
        return loss, {"si_snr": scores_K, "si_snri": scores_K - before_K}
