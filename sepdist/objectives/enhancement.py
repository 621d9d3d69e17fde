"""Speech enhancement (SE), a pre-training task of paper 1, section 3.1.

The model has one output, and the target is the first source: whatever else is in the mixture,
usually noise, is to be removed.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from sepdist.data.records import Batch
from sepdist.objectives.contract import Metrics, check_outputs, sources_of
from sepdist.objectives.separation import Separation


class Enhancement:
    """Negative SI-SNR of the only estimate against the clean `s1`, mean over items, always in fp32.

    Metrics per item: `si_snr` and `si_snri` (dB). `threshold` and `skip_silent` as in `Separation`.
    """

    mean_of_items = property(lambda self: self.separation.mean_of_items)

    def __init__(self, threshold: float | None = None, skip_silent: bool | None = None) -> None:
        self.separation = Separation(threshold, skip_silent)

    def __call__(self, model: Callable[[Tensor], Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; reads the first of `batch.sources`."""
        clean_BST = sources_of(batch)[:, :1]
        estimates_BST = model(batch.mixture)
        check_outputs(estimates_BST, clean_BST, "set num_speakers=1")
        clean = replace(batch, sources=clean_BST)
        loss, metrics = self.separation(lambda mixture_BT: estimates_BST, clean)
        return loss, {name: metrics[name] for name in ("si_snr", "si_snri")}
