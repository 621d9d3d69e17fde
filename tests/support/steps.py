"""A small model, an objective and batches for single steps of the engine."""

import torch
from torch import Tensor, nn

from sepdist.data.records import Batch

NUM_SHARDS, MICRO_BATCH, LENGTH = 4, 2, 40


class Toy(nn.Module):
    """A convolution with dropout, a head that only some batches use, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv1d(1, 8, 5, padding=2)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Conv1d(8, 1, 1)
        self.other = nn.Conv1d(8, 1, 1)
        self.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)

    def forward(self, mixture_BT: Tensor, other: bool = False) -> Tensor:
        hidden = self.drop(torch.tanh(self.scale * self.body(mixture_BT[:, None])))
        return (self.other if other else self.head)(hidden)


class SquaredError:
    """Every other `branching` virtual shards use the other head; step `poisoned` has loss inf."""

    def __init__(self, branching: int, poisoned: int = -1) -> None:
        self.branching = branching
        self.poisoned = range(
            poisoned * NUM_SHARDS * MICRO_BATCH, (poisoned + 1) * NUM_SHARDS * MICRO_BATCH
        )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        odd = self.branching and int(batch.positions[0]) // MICRO_BATCH // self.branching % 2 == 1
        error = (model(batch.mixture, other=odd)[:, 0].float() - batch.sources[:, 0]) ** 2
        if int(batch.positions[0]) == self.poisoned[-MICRO_BATCH]:  # on the last rank alone
            error = error * torch.inf
        return error.mean(), {"error": error.mean(1)}


def batch_of(step: int, shard: int, num_shards: int = NUM_SHARDS) -> Batch:
    first = (step * num_shards + shard) * MICRO_BATCH
    generator = torch.Generator().manual_seed(first)
    mixture = torch.randn(MICRO_BATCH, LENGTH, generator=generator)
    return Batch(
        ids=[f"utterance-{first + item}" for item in range(MICRO_BATCH)],
        positions=torch.arange(first, first + MICRO_BATCH),
        mixture=mixture,
        sources=torch.roll(mixture, 1, -1)[:, None],
        noise=None,
        lengths=torch.full((MICRO_BATCH,), LENGTH),
    )
