"""The continuous contrastive task (CC), pre-training on clean speech (paper 1, section 3.1).

After wav2vec 2.0 (Baevski et al. 2020, section 3) without its quantiser: spans of the features are
hidden, a context network predicts them, and each prediction is to be closer to the hidden feature
than to features of other hidden frames of the same utterance.

Shapes: B batch, N frames, F features, K targets of an item, M negatives of a target.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sepdist.data.records import Batch, send
from sepdist.objectives.contract import Metrics
from sepdist.objectives.spans import draw_spans, noisy
from sepdist.seeding import rng


@dataclass(eq=False)
class Contrastive:
    """Cross-entropy over cosine similarities divided by a temperature, mean over targets and items.

    Targets are the features at the centre of each hidden span, or with `all_frames` at every hidden
    frame; the gradient flows through them too. The negatives of a target are `num_negatives` of the
    item's other targets, or half as many as it has targets where these are too few. The temperature
    is multiplied by `temperature_decay` after every `epoch_samples` positions, if given.

    Metric per item: `accuracy`, the share of targets closer to their prediction than all negatives.
    """

    seed: int
    share: float = 0.15
    span: int = 7
    all_frames: bool = False
    num_negatives: int = 100
    temperature: float = 0.1
    temperature_decay: float = 0.98
    epoch_samples: int | None = None
    noise_probability: float = 0.2

    def __post_init__(self) -> None:
        positive = min(self.share, self.span, self.num_negatives, self.temperature) > 0
        if not positive or self.share >= 1:
            raise ValueError(f"{self}: share (below 1), span, num_negatives, temperature above 0")

    def check_model(self, model: Any) -> None:
        """Raise ValueError for a model that does not predict features."""
        if not hasattr(model, "num_frames"):
            raise ValueError("objective contrastive needs a sepdist.models.context.ContextModel")

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; reads the first source and the noise, not the mixture."""
        draws = [rng(self.seed, "contrastive", position) for position in batch.positions.tolist()]
        given_BT, _ = noisy(batch, draws, self.noise_probability, 1.0)
        device = given_BT.device
        hidden_BN = torch.zeros(len(draws), model.num_frames(given_BT.shape[1]), dtype=torch.bool)
        targets, negatives = [], []
        for hidden_N, draw, length in zip(hidden_BN, draws, batch.lengths.tolist(), strict=True):
            spans = draw_spans(draw, model.num_frames(length), self.span, self.share, least=2)
            hidden_N[spans] = True
            centres_K = torch.from_numpy(spans[:, self.span // 2])
            targets_K = hidden_N.nonzero()[:, 0] if self.all_frames else centres_K
            targets.append(send(targets_K, device))
            negatives_KM = self._negatives(draw, len(targets_K))
            negatives.append(send(negatives_KM, device))
        features_BNF, predictions_BNF = model(given_BT, send(hidden_BN, device))
        losses, accuracies = [], []
        with torch.autocast(device.type, enabled=False):
            for item, (targets_K, negatives_KM) in enumerate(zip(targets, negatives, strict=True)):
                features_KF = F.normalize(features_BNF[item, targets_K].float(), dim=-1)
                predictions_KF = F.normalize(predictions_BNF[item, targets_K].float(), dim=-1)
                similar_KK = predictions_KF @ features_KF.T
                scores_K1M = torch.cat(
                    [similar_KK.diagonal()[:, None], similar_KK.gather(1, negatives_KM)], dim=1
                )
                logits_K1M = scores_K1M / self._temperature(int(batch.positions[item]))
                losses.append((logits_K1M.logsumexp(1) - logits_K1M[:, 0]).mean())
                accuracies.append((scores_K1M[:, 0] > scores_K1M[:, 1:].amax(1)).float().mean())
        return torch.stack(losses).mean(), {"accuracy": torch.stack(accuracies)}

    def _temperature(self, position: int) -> float:
        epoch = position // self.epoch_samples if self.epoch_samples else 0
        return self.temperature * self.temperature_decay**epoch

    def _negatives(self, draw: np.random.Generator, num_targets: int) -> Tensor:
        """Draw for each target the indices of other targets to compare it with, int64 [K, M]."""
        count = self.num_negatives if self.num_negatives < num_targets else num_targets // 2
        keys = draw.bit_generator.random_raw(num_targets * (num_targets - 1))
        others = np.argsort(keys.reshape(num_targets, -1), axis=1, kind="stable")[:, :count]
        return torch.from_numpy(others + (others >= np.arange(num_targets)[:, None]))
