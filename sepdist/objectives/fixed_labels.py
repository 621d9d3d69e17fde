"""Separation with labels that are fixed: the assignment of each utterance as an earlier run chose it.

The second stage of Yang et al., "Interrupted and Cascaded Permutation Invariant Training for Speech Separation", 2020
(paper 1, section 2.2). Cascaded: PIT, then this from fresh weights with the labels of that run, then PIT from the
weights of this. Interrupted: the same, but this begins with the weights of the first run.
"""

import csv
import io

import torch
from torch import Tensor, nn

from sepdist import storage
from sepdist.data.records import Batch
from sepdist.metrics.permutation import all_orders, best_permutation
from sepdist.objectives.separation import pair_scores, report


class FixedLabels:
    """Minus the mean SI-SNR under the assignment of the table; in evaluation mode under the best one, as in PIT.

    `labels`: a CSV, on disk or s3://, with the columns `id` and `permutation` (lexicographic rank, as the metric of the
    separation objective). Metrics as there, of the best assignment, and in training `agreement`: whether it is
    the table's.
    """

    path_arguments = ("labels",)

    def __init__(self, labels: str) -> None:
        self.url = labels
        self.labels = read_labels(labels)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; needs `batch.sources`, and in training a label for each of `batch.ids`."""
        scores_BSS = pair_scores(model, batch)
        best_B, order_BS = best_permutation(scores_BSS)
        metrics = report(best_B, order_BS, batch)
        if not model.training:
            return -best_B.mean(), metrics
        given_BS = self._orders(batch.ids, scores_BSS.shape[1]).to(order_BS.device)
        given_B = scores_BSS.gather(1, given_BS.unsqueeze(1)).squeeze(1).mean(-1)
        return -given_B.mean(), metrics | {"agreement": (given_BS == order_BS).all(1).float()}

    def _orders(self, ids: list[str], num_sources: int) -> Tensor:
        missing = [id_ for id_ in ids if id_ not in self.labels]
        if missing:
            raise ValueError(
                f"{self.url} has {len(self.labels)} labels, none for {missing[0]}: it is not of this training set"
            )
        orders, ranks = all_orders(num_sources), [self.labels[id_] for id_ in ids]
        for id_, rank in zip(ids, ranks, strict=True):
            if not 0 <= rank < len(orders):
                raise ValueError(
                    f"{self.url}: permutation {rank} of {id_}, but {num_sources} sources have {len(orders)}"
                )
        return orders[torch.tensor(ranks)]


def read_labels(url: str) -> dict[str, int]:
    """Utterance id -> rank of its permutation, from a CSV with the header `id,permutation`."""
    labels: dict[str, int] = {}
    rows = csv.DictReader(io.StringIO(storage.read_bytes(url).decode()))
    for row in rows:
        try:
            id_, rank = row["id"], int(row["permutation"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{url}, line {rows.line_num}: no id and permutation ({error!r})"
            ) from error
        if labels.setdefault(id_, rank) != rank:
            raise ValueError(
                f"{url}, line {rows.line_num}: {id_} is {rank} here and {labels[id_]} above"
            )
    if not labels:
        raise ValueError(f"{url}: no labels; expected a CSV with the header id,permutation")
    return labels
