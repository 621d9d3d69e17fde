"""The contract between training and an objective: a call, hooks with defaults, and checks.

Shapes: B batch, M outputs of a model, S speakers, T samples.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sepdist.data.records import Batch

Metrics = dict[str, Tensor]
# Hooks that an export keeps in its model.yaml, as arguments of `speakers_of`.
OUTPUT_RULES = ("num_extra_outputs", "num_loudest")


class Objective(Protocol):
    """What training minimises; `with_defaults` adds the hooks that an objective does not define.

    A class attribute `path_arguments` names constructor arguments that are paths: relative ones are
    made absolute before workers elsewhere build the objective. Another, `parts`, maps arguments
    that are parts themselves to their slots (sepdist/slots.py).
    """

    num_extra_outputs: int = 0  # trailing model outputs that are not speakers (another task's)
    num_loudest: int = 0  # how many of the other outputs are speakers, by energy; 0 = all
    data_sets: tuple[str, ...] = ()  # that `data.extra` must provide ("main" is `data.train`)
    # Whether loss and metrics of several batches as one are those of each, the loss as their mean.
    # It says so of the class's own `__call__`: a subclass with another one has to say it again.
    mean_of_items: bool = False
    stop_reason: str | None = None  # once set, training ends as after an early stop
    # Raises ValueError for a model it cannot train.
    check_model: Callable[[nn.Module], None] = lambda model: None
    # Gets the validation means, equal on all ranks.
    observe: Callable[[Mapping[str, float]], None] = lambda means: None
    state_dict: Callable[[], dict[str, Any]] = dict  # JSON-able state for the checkpoint
    load_state_dict: Callable[[Mapping[str, Any]], None] = lambda state: None
    lineage: Callable[[], dict[str, Any]] = dict  # origins of trained models inside

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss (0-d) and the metrics of one batch.

        A metric is 0-d (the batch mean), 1-D (a value per item, or none), or `measured`.
        """
        ...


def measured(values_B: Tensor, has_value_B: Tensor) -> Tensor:
    """Return a metric that some items may lack, [2, B]: the values, and 1 where there is one.

    Its shape does not depend on the data, which the host would have to wait for on a GPU.
    """
    return torch.stack([values_B, has_value_B.to(values_B.dtype)])


def mean_of(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the items that have a value, float64, and their number; both 0-d."""
    has_value_B = torch.ones_like(metric, dtype=torch.float64)
    values_B, has_value_B = metric.double() if metric.ndim == 2 else (metric.double(), has_value_B)
    count = has_value_B.sum()
    return torch.where(has_value_B > 0, values_B, 0.0).sum() / count.clamp_min(1), count


def with_defaults(objective: Any) -> Objective:
    """Set every hook that `objective` does not define to its default; returns `objective`.

    An `nn.Module` does not define hooks by methods that it has from there.
    """
    for name in Objective.__annotations__:
        of_module = getattr(nn.Module, name, None)
        foreign = of_module and getattr(type(objective), name, None) is of_module
        if foreign or not hasattr(objective, name):
            setattr(objective, name, getattr(Objective, name))
    return objective


def is_mean_of_items(objective: Any) -> bool:
    """Whether `mean_of_items` holds; what a class above that of `__call__` says does not count."""
    for scope in (getattr(objective, "__dict__", {}), *map(vars, type(objective).__mro__)):
        if "mean_of_items" in scope:
            return bool(objective.mean_of_items)
        if "__call__" in scope:
            break
    return False


def speakers_of(estimates_BMT: Tensor, num_extra_outputs: int = 0, num_loudest: int = 0) -> Tensor:
    """Drop the last `num_extra_outputs` and keep the `num_loudest` others (0: all), [B, S, T].

    Loudness is energy over the whole signal; the first of equals are kept, the order unchanged.
    """
    kept_BST = estimates_BMT[:, : estimates_BMT.shape[1] - num_extra_outputs]
    if not num_loudest:
        return kept_BST
    energy_BM = kept_BST.detach().double().square().sum(-1)
    theirs_BMM, own_BMM = energy_BM[:, None], energy_BM[..., None]  # ONNX has no stable sort
    equal_before_BMM = (theirs_BMM == own_BMM).tril(-1)
    rank_BM = ((theirs_BMM > own_BMM) | equal_before_BMM).sum(-1)
    chosen_BS = rank_BM.topk(num_loudest, largest=False).indices.sort(dim=1).values
    return kept_BST.gather(1, chosen_BS.unsqueeze(-1).expand(-1, -1, kept_BST.shape[2]))


def sources_of(batch: Batch) -> Tensor:
    """Return the sources [B, S, T]; ValueError for a data set that has mixtures only."""
    if batch.sources is None:
        raise ValueError("this objective needs sources, but this data set has mixtures only")
    return batch.sources


def check_outputs(estimates: Tensor, targets: Tensor, advice: str) -> None:
    """Raise ValueError with `advice` unless estimates and targets have the same shape."""
    if estimates.shape != targets.shape:
        shapes = f"{tuple(estimates.shape)}, but the targets are {tuple(targets.shape)} [B, S, T]"
        raise ValueError(f"the model's estimates are {shapes}: {advice}")


def check_data_set(batch: Batch, data_sets: tuple[str, ...]) -> None:
    """Raise ValueError for a batch of a data set that the objective does not train on."""
    if (name := batch.data_set) not in data_sets:
        raise ValueError(f"this objective has no use for data set {name!r}, only for {data_sets}")
