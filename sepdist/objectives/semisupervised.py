"""Semi-supervised separation (SSLM-SS): train on unlabelled mixtures through an SI-SNR estimator.

Paper 2, section 3.1 and figure 1. Labelled batches are scored by their sources (uPIT), unlabelled
ones by a frozen model that estimates the SI-SNR from mixture and estimates alone (SSQP-Net). The
gradient comes through that estimator, so the separator may learn to fool it instead of to separate.
Validation has sources and measures both scores; the objective can act when they diverge.

Shapes: B batch, S sources, T samples.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sepdist.data.records import MAIN, Batch
from sepdist.metrics.permutation import best_permutation
from sepdist.metrics.si_snr import silent_sources
from sepdist.objectives.contract import Metrics, check_data_set, measured, sources_of
from sepdist.objectives.separation import report, score_pairs

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "down-weight", "stop")
LEAST_FACTOR = 2.0**-6  # six good validations restore the full weight


@dataclass(eq=False)
class SemiSupervised:
    """(1 - f) L_sup + f L_unsup (eq. 5), f = epoch / `ramp_epochs` (eq. 9) up to `max_weight`.

    L_sup is the negative SI-SNR of the best permutation, mean over a step's labelled batches (the
    main data set). L_unsup is the negative of `estimator(mixture_BT, estimates_BST)`, [B, S] in dB,
    mean over the unlabelled ones (`data_set`). The engine averages over all V batches, of which the
    share p = `labelled_share` is labelled, so labelled losses are multiplied by (1 - f) / p and the
    others by f / (1 - p). That is eq. 5 exactly if each step has p V labelled batches: with
    `data.interleave=even` and a whole p V. An epoch, counted from 0, is `epoch_samples` positions
    of both sets together.

    Metrics per item: in training `si_snr`, `si_snri`, `permutation` (labelled), `predicted_si_snr`
    (unlabelled) and `unsupervised_weight`, f; in validation the first four and `gap`, predicted
    minus true SI-SNR in dB. A validation whose mean gap exceeds `max_gap_db` is logged as a
    warning; with `on_gap` "down-weight" it also halves f (to 1/64 at least), and every other
    validation doubles it again (to its full value at most); with "stop" it ends the run.
    """

    parts: ClassVar = {"estimator": "estimator"}
    estimator: nn.Module
    _: KW_ONLY
    epoch_samples: int
    labelled_share: float
    data_set: str = "unlabelled"
    ramp_epochs: int = 300
    max_weight: float = 1.0
    max_gap_db: float | None = None
    on_gap: str = "warn"

    def __post_init__(self) -> None:
        shares = 0 < self.labelled_share < 1 and 0 <= self.max_weight <= 1
        if not shares or self.epoch_samples < 1 or self.ramp_epochs < 1:
            raise ValueError(
                f"labelled_share={self.labelled_share} (between 0 and 1), "
                f"max_weight={self.max_weight} (0 to 1), epoch_samples={self.epoch_samples}, "
                f"ramp_epochs={self.ramp_epochs} (both at least 1)"
            )
        if self.on_gap not in ACTIONS:
            raise ValueError(f"on_gap={self.on_gap!r}: use one of {', '.join(ACTIONS)}")
        self.estimator.requires_grad_(False).eval()
        self.data_sets = (MAIN, self.data_set)
        self.factor = 1.0  # of f
        self.stop_reason: str | None = None

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError if the estimator is not an SI-SNR estimator, whatever the model."""
        if not getattr(self.estimator, "estimates_si_snr", False):
            raise ValueError(
                f"objective.estimator is a {type(self.estimator).__name__}, no SI-SNR estimator: "
                "set objective.estimator.url to a run of an SSQP-Net"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; unlabelled batches need no `batch.sources`."""
        check_data_set(batch, self.data_sets)
        names = ("si_snr", "si_snri", "predicted_si_snr")
        metrics = dict.fromkeys(names, batch.mixture.new_zeros(0))
        estimates_BST = model(batch.mixture)
        share, f = self.labelled_share, self.weight(int(batch.positions[0]))
        if model.training:
            metrics["unsupervised_weight"] = batch.mixture.new_full((), f, dtype=torch.float64)
            if batch.data_set == self.data_set:
                predicted_B = self.predict(batch.mixture, estimates_BST)
                metrics["predicted_si_snr"] = predicted_B.detach()
                return -f / (1 - share) * predicted_B.mean(), metrics
        scores_BSS = score_pairs(estimates_BST, batch)
        best_B, order_BS = best_permutation(scores_BSS)
        metrics |= report(scores_BSS.detach(), order_BS, batch)
        if model.training:
            return -(1 - f) / share * best_B.mean(), metrics
        predicted_B = self.predict(batch.mixture, estimates_BST)
        true_B = ~silent_sources(sources_of(batch)).any(1)  # others have no true score of the whole
        pair = {"predicted_si_snr": predicted_B, "gap": predicted_B - best_B}
        metrics |= {name: measured(values_B, true_B) for name, values_B in pair.items()}
        return -best_B.mean(), metrics

    def weight(self, position: int) -> float:
        """Return f at a global position of the data order."""
        return self.factor * min(self.max_weight, position // self.epoch_samples / self.ramp_epochs)

    def predict(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        """Return the estimated SI-SNR, mean over sources, [B] in dB, always in fp32."""
        with torch.autocast(mixture_BT.device.type, enabled=False):
            predicted_BS = self.estimator.to(mixture_BT.device)(mixture_BT, estimates_BST.float())
        if predicted_BS.shape != estimates_BST.shape[:2]:
            raise ValueError(
                f"the SI-SNR estimator gives {tuple(predicted_BS.shape)} for estimates "
                f"{tuple(estimates_BST.shape)} [B, S, T]: it must give [B, S], trained for as many "
                "sources as the model has outputs"
            )
        return predicted_BS.mean(1)

    def observe(self, validation_means: Mapping[str, float]) -> None:
        """Act on the gap of a validation; without one, every mixture has a silent source."""
        names = ("si_snr", "predicted_si_snr", "gap")
        true, predicted, gap = (validation_means.get(name, -math.inf) for name in names)
        limit = math.inf if self.max_gap_db is None else self.max_gap_db
        if gap <= limit:
            self.factor = min(1.0, 2 * self.factor)
            return
        reason = (
            f"the SI-SNR estimator predicts {predicted:.2f} dB where {true:.2f} dB are true: a gap "
            f"of {gap:.2f} dB, above objective.max_gap_db={limit}"
        )
        if self.on_gap == "down-weight":
            self.factor = max(LEAST_FACTOR, self.factor / 2)
        if self.on_gap == "stop":
            self.stop_reason = reason
        logger.warning("%s; factor of the unsupervised loss: %g", reason, self.factor)

    def lineage(self) -> dict[str, Any]:
        """Return where the estimator comes from."""
        origin = getattr(self.estimator, "origin", None)
        return {"estimator": origin} if origin else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-able state."""
        return {"factor": self.factor, "stop_reason": self.stop_reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.factor, self.stop_reason = float(state["factor"]), state["stop_reason"]
