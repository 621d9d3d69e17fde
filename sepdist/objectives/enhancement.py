"""Speech enhancement (SE), the pre-training task of paper 1: noisy speech of one person in, negative SI-SNR out.

Paper 1, section 3.1. The model has one output; the target is the first source, and whatever else is in the mixture
(noise, as a rule) is to be removed.
"""

import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.metrics.si_snr import si_snr
from sepdist.objectives.separation import mean_above


class Enhancement:
    """Minus the SI-SNR of the only estimate against the clean `s1`, mean over items, in fp32 whatever the autocast.

    Metrics per item: `si_snr` and `si_snri` (dB). `threshold` as in the separation objective.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; needs `batch.sources`, of which it reads the first."""
        if batch.sources is None:
            raise ValueError(
                "objective enhancement needs a clean source; this data set has mixtures only"
            )
        estimates_BST = model(batch.mixture)
        clean_BST = batch.sources[:, :1]
        if estimates_BST.shape != clean_BST.shape:
            raise ValueError(
                f"the model gives {tuple(estimates_BST.shape)}, enhancement expects {tuple(clean_BST.shape)} [B, 1, T]"
                ": set num_speakers=1"
            )
        with torch.autocast(batch.mixture.device.type, enabled=False):
            scores_B = si_snr(estimates_BST.float(), clean_BST).squeeze(1)
            loss = mean_above(-scores_B, self.threshold)
            before_B = si_snr(batch.mixture.unsqueeze(1), clean_BST).squeeze(1)
        return loss, {"si_snr": scores_B.detach(), "si_snri": scores_B.detach() - before_B}
