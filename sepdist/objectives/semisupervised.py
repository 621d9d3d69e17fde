"""Semi-supervised separation (SSLM-SS): a labelled or an unlabelled batch in, its share of the weighted loss out.

Paper 2, section 3.1 and figure 1: labelled batches are scored by their sources (uPIT), unlabelled ones by a frozen
judge that predicts the SI-SNR of estimates from mixture and estimates alone (SSQP-Net). Only the separator is trained,
but its gradient comes through the judge, so it may learn what pleases the judge instead of what separates. Therefore
validation, which has sources, measures both, and the objective may act where they part.

Shapes: B batch, S sources, T samples.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sepdist.data.records import MAIN, Batch
from sepdist.metrics.permutation import best_permutation
from sepdist.objectives.separation import report, score_pairs

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "down-weight", "stop")
LEAST_FACTOR = 2.0**-6  # of f: from here six good validations bring all of it back


class SemiSupervised:
    """(1 - f) L_sup + f L_unsup (eq. 5), f = epoch / `ramp_epochs` (eq. 9), at most `max_weight`.

    L_sup is minus the SI-SNR of the best assignment, mean over the labelled batches of a step (the main data set's);
    L_unsup minus the SI-SNR that `judge(mixture_BT, estimates_BST) -> [B, S]` predicts, mean over the unlabelled ones
    (those of `data_set`). The engine takes the mean over all V batches, of which the share p = `labelled_share` are
    labelled. So the loss of a labelled batch is multiplied by (1 - f) / p and that of the others by f / (1 - p), which
    is eq. 5 exactly where a step holds p V labelled batches: with `data.interleave=even`, p of all batches of an epoch
    labelled, and p V whole. An epoch, counted from 0, is `epoch_samples` positions, samples of both sets.

    Metrics per item: in training `si_snr`, `si_snri`, `permutation` of labelled and `predicted_si_snr` of unlabelled
    batches, and the `unsupervised_weight` f. In evaluation the first four and `gap`, predicted minus true SI-SNR in dB.

    `gap` is what a judge that is fooled shows: where its validation mean is above `max_gap_db`, there is a warning, and
    with `on_gap` down-weight f is halved, once more after every such validation, down to 1/64, and doubled again, up to
    what it was, after every other one; with stop the run ends.
    """

    def __init__(
        self,
        judge: nn.Module,
        *,
        epoch_samples: int,
        labelled_share: float,
        data_set: str = "unlabelled",
        ramp_epochs: int = 300,
        max_weight: float = 1.0,
        max_gap_db: float | None = None,
        on_gap: str = "warn",
    ) -> None:
        if (
            not 0 < labelled_share < 1
            or epoch_samples < 1
            or ramp_epochs < 1
            or not 0 <= max_weight <= 1
        ):
            raise ValueError(
                f"labelled_share={labelled_share} (between 0 and 1), epoch_samples={epoch_samples}, "
                f"ramp_epochs={ramp_epochs} (from 1 up), max_weight={max_weight} (0 to 1)"
            )
        if on_gap not in ACTIONS:
            raise ValueError(f"on_gap={on_gap!r}: it is one of {', '.join(ACTIONS)}")
        self.judge = judge.requires_grad_(False).eval()
        self.epoch_samples, self.labelled_share = epoch_samples, labelled_share
        self.ramp_epochs, self.max_weight = ramp_epochs, max_weight
        self.max_gap_db, self.on_gap = max_gap_db if max_gap_db is not None else math.inf, on_gap
        self.data_set = data_set
        self.data_sets = (MAIN, data_set)
        self.factor = 1.0  # of f
        self.stop_reason: str | None = None

    def check_model(self, model: nn.Module) -> None:
        """Refuse a judge that is none, whatever the model."""
        if not getattr(self.judge, "estimates_si_snr", False):
            what = f"objective.judge is a {type(self.judge).__name__}, which judges no estimates"
            raise ValueError(f"{what}: set objective.judge.url to a run of an SSQP-Net")

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; needs `batch.data_set`, and `batch.sources` but for the unlabelled."""
        if batch.data_set not in self.data_sets:
            raise ValueError(
                f"objective semisupervised has no use for {batch.data_set!r}, only for {self.data_sets}"
            )
        nothing = batch.mixture.new_zeros(0)
        metrics = dict.fromkeys(("si_snr", "si_snri", "predicted_si_snr"), nothing)
        estimates_BST = model(batch.mixture)
        share, f = self.labelled_share, self.weight(int(batch.positions[0]))
        if model.training:
            metrics["unsupervised_weight"] = torch.tensor(f, dtype=torch.float64)
            if batch.data_set == self.data_set:
                predicted_B = self.predict(batch.mixture, estimates_BST)
                return -f / (1 - share) * predicted_B.mean(), metrics | {
                    "predicted_si_snr": predicted_B.detach()
                }
        best_B, order_BS = best_permutation(score_pairs(estimates_BST, batch))
        metrics |= report(best_B, order_BS, batch)
        if model.training:
            return -(1 - f) / share * best_B.mean(), metrics
        predicted_B = self.predict(batch.mixture, estimates_BST)
        return -best_B.mean(), metrics | {
            "predicted_si_snr": predicted_B,
            "gap": predicted_B - best_B,
        }

    def weight(self, position: int) -> float:
        """f at a global position of the data order."""
        return self.factor * min(self.max_weight, position // self.epoch_samples / self.ramp_epochs)

    def predict(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        """What the judge says, mean over sources, [B] in dB, in fp32 whatever the autocast."""
        with torch.autocast(mixture_BT.device.type, enabled=False):
            predicted_BS = self.judge.to(mixture_BT.device)(mixture_BT, estimates_BST.float())
        if predicted_BS.shape != estimates_BST.shape[:2]:
            raise ValueError(
                f"the judge gives {tuple(predicted_BS.shape)} for estimates {tuple(estimates_BST.shape)} [B, S, T]: it "
                "must give [B, S], so have been made for as many sources as the model has outputs"
            )
        return predicted_BS.mean(1)

    def observe(self, validation_means: Mapping[str, float]) -> None:
        """Act on the gap that a validation found."""
        true, predicted, gap = (
            validation_means[name] for name in ("si_snr", "predicted_si_snr", "gap")
        )
        if gap <= self.max_gap_db:
            self.factor = min(1.0, 2 * self.factor)
            return
        told = f"the judge predicts {predicted:.2f} dB where {true:.2f} dB are true: a gap of {gap:.2f} dB, above "
        told += f"objective.max_gap_db={self.max_gap_db}"
        if self.on_gap == "down-weight":
            self.factor = max(LEAST_FACTOR, self.factor / 2)
        if self.on_gap == "stop":
            self.stop_reason = told
        logger.warning("%s; factor of the unsupervised loss: %g", told, self.factor)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"factor": self.factor, "stop_reason": self.stop_reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.factor, self.stop_reason = float(state["factor"]), state["stop_reason"]
