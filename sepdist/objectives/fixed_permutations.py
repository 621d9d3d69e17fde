"""Separation under given permutations: each utterance keeps the one that an earlier run chose.

The second stage of Yang et al., "Interrupted and Cascaded Permutation Invariant Training for Speech
Separation", 2020 (paper 1, section 2.2). Cascaded: PIT; then this stage from fresh weights with the
permutations of that run; then PIT from the weights of this stage. Interrupted: the same, but this
stage starts from the weights of the first run.
"""

import csv
import io

import torch
from torch import Tensor, nn

from sepdist import storage
from sepdist.data.records import Batch
from sepdist.metrics.permutation import all_orders, best_permutation
from sepdist.objectives.contract import Metrics
from sepdist.objectives.separation import pair_scores, report


class FixedPermutations:
    """Negative mean SI-SNR under the table's permutation; in evaluation under the best one (PIT).

    `permutations` is a CSV, local or s3://, with the columns `id` and `permutation` (lexicographic
    rank, as in the metric of `Separation`). Metrics as in `Separation`, of the best permutation,
    and in training `agreement`: whether that is the table's.
    """

    path_arguments = ("permutations",)

    def __init__(self, permutations: str) -> None:
        self.url = permutations
        self.ranks = read_permutations(permutations)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; needs `batch.sources`, and in training a row for each id."""
        scores_BSS = pair_scores(model, batch)
        best_B, order_BS = best_permutation(scores_BSS)
        metrics = report(scores_BSS.detach(), order_BS, batch)
        if not model.training:
            return -best_B.mean(), metrics
        given_BS = self._orders(batch.ids, scores_BSS.shape[1]).to(
            order_BS.device, non_blocking=True
        )
        given_B = scores_BSS.gather(1, given_BS.unsqueeze(1)).squeeze(1).mean(-1)
        return -given_B.mean(), metrics | {"agreement": (given_BS == order_BS).all(1).float()}

    def _orders(self, ids: list[str], num_sources: int) -> Tensor:
        orders = all_orders(num_sources)
        for id_ in ids:
            if id_ not in self.ranks:
                raise ValueError(
                    f"{self.url} has {len(self.ranks)} permutations, none for {id_}: "
                    "it belongs to another training set"
                )
            if not 0 <= self.ranks[id_] < len(orders):
                raise ValueError(
                    f"{self.url}: permutation {self.ranks[id_]} of {id_}, but {num_sources} "
                    f"sources have {len(orders)}"
                )
        return orders[torch.tensor([self.ranks[id_] for id_ in ids])]


def read_permutations(url: str) -> dict[str, int]:
    """Read utterance id -> permutation rank from a CSV; ValueError names the line of a fault."""
    ranks: dict[str, int] = {}
    rows = csv.DictReader(io.StringIO(storage.read_bytes(url).decode()))
    for row in rows:
        place = f"{url}, line {rows.line_num}"
        try:
            id_, rank = row["id"], int(row["permutation"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: no id and permutation ({error!r})") from error
        if ranks.setdefault(id_, rank) != rank:
            raise ValueError(f"{place}: {id_} is {rank} here and {ranks[id_]} above")
    if not ranks:
        raise ValueError(f"{url} is empty; expected a CSV with the header id,permutation")
    return ranks
