"""Multi-task training: separation and enhancement by one model (paper 1, section 3.3, figure 1 c).

The model has one output more than there are speakers. The tasks have no weights in the loss: the
share of each is that of its data set (`data.extra`), as in the paper's experiments.
"""

from torch import Tensor, nn

from sepdist.data.records import MAIN, Batch
from sepdist.objectives.contract import Metrics, check_data_set, sources_of
from sepdist.objectives.enhancement import Enhancement
from sepdist.objectives.separation import Separation


class MultiTask:
    """PIT over all outputs but the last on the main data set; SE with the last on `data_set`.

    Metrics per item: those of `Separation`, and those of `Enhancement` as `enhancement_si_snr` and
    `enhancement_si_snri`; empty for the task that a batch does not train. `threshold` is of both.
    """

    num_extra_outputs = 1

    def __init__(self, data_set: str = "enhancement", threshold: float | None = None) -> None:
        self.data_set = data_set
        self.data_sets = (MAIN, data_set)
        self.separation = Separation(threshold)
        self.enhancement = Enhancement(threshold)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics of the task of `batch.data_set`; needs `batch.sources`."""
        check_data_set(batch, self.data_sets)
        num_outputs = sources_of(batch).shape[1] + 1
        estimates_BST = model(batch.mixture)
        nothing = batch.mixture.new_zeros(0)
        if batch.data_set == self.data_set:
            loss, found = self.enhancement(lambda mixture_BT: estimates_BST[:, -1:], batch)
            metrics = {f"enhancement_{name}": values for name, values in found.items()}
            return loss, {"si_snr": nothing, "si_snri": nothing} | metrics
        if estimates_BST.shape[1] != num_outputs:
            raise ValueError(
                f"the model has {estimates_BST.shape[1]} outputs, separation of {num_outputs - 1} "
                f"speakers and enhancement need {num_outputs}: set model.num_speakers={num_outputs}"
            )
        loss, found = self.separation(lambda mixture_BT: estimates_BST[:, :-1], batch)
        return loss, found | {"enhancement_si_snr": nothing, "enhancement_si_snri": nothing}
