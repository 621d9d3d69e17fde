"""Multi-task training: separation and enhancement at once, a batch of either in, that task's negative SI-SNR out.

Paper 1, section 3.3 and figure 1 (c). The model has one output more than there are speakers. Tasks have no weights in
the loss: how often each is trained is decided by the data (`data.extra`), as in the paper's experiments.
"""

from torch import Tensor, nn

from sepdist.data.records import MAIN, Batch
from sepdist.objectives.enhancement import Enhancement
from sepdist.objectives.separation import Separation


class MultiTask:
    """PIT over all outputs but the last on batches of the main data set; on those of `data_set`, SE by the last one.

    Metrics per item: those of separation, and those of enhancement as `enhancement_si_snr`, `enhancement_si_snri`; a
    batch has one kind, the other is empty. `threshold` as in the separation objective, for both tasks.
    """

    num_extra_outputs = 1

    def __init__(self, data_set: str = "enhancement", threshold: float | None = None) -> None:
        self.data_set = data_set
        self.data_sets = (MAIN, data_set)
        self.separation = Separation(threshold)
        self.enhancement = Enhancement(threshold)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; needs `batch.data_set` and `batch.sources`."""
        if batch.data_set not in self.data_sets:
            raise ValueError(
                f"objective multitask has no task for the data set {batch.data_set!r}, only {self.data_sets}"
            )
        nothing = batch.mixture.new_zeros(0)
        if batch.data_set == self.data_set:
            loss, found = self.enhancement(_Outputs(model, slice(-1, None)), batch)
            return loss, {"si_snr": nothing, "si_snri": nothing} | {
                f"enhancement_{k}": v for k, v in found.items()
            }
        num_sources = 0 if batch.sources is None else batch.sources.shape[1]
        loss, found = self.separation(_Outputs(model, slice(num_sources), num_sources + 1), batch)
        return loss, found | {"enhancement_si_snr": nothing, "enhancement_si_snri": nothing}


class _Outputs(nn.Module):
    """Some outputs of a model, which must have `num_outputs` of them (0: any number)."""

    def __init__(self, model: nn.Module, which: slice, num_outputs: int = 0) -> None:
        super().__init__()
        self.model, self.which, self.num_outputs = model, which, num_outputs

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T]."""
        estimates_BST = self.model(mixture_BT)
        if self.num_outputs not in (0, estimates_BST.shape[1]):
            raise ValueError(
                f"the model has {estimates_BST.shape[1]} outputs, multi-task training of {self.num_outputs - 1} "
                f"speakers and enhancement needs {self.num_outputs}: set model.num_speakers={self.num_outputs}"
            )
        return estimates_BST[:, self.which]
