"""The continuous contrastive task (CC), pre-training of paper 1, section 3.1: clean speech in, cross-entropy out.

After wav2vec 2.0 (Baevski et al. 2020, section 3), without its quantiser: spans of the features are hidden, a context
network predicts them, and each prediction is to be closer to the feature that was there than to features of other
hidden places of the same utterance. The model is a `models.context.ContextModel`.

Shapes: B batch, N frames, F features, K targets of an item, M negatives of a target.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sepdist.data.records import Batch
from sepdist.objectives.spans import generators, noisy, span_starts


class Contrastive:
    """Cross-entropy over cosine similarities divided by a temperature, mean over targets, then over items.

    Targets are the features at the centre of each hidden span, or with `all_frames` at every hidden frame; the gradient
    reaches the model through them too. The negatives of a target are `num_negatives` of the item's other targets, or,
    of an item without so many, half as many as it has targets. With `epoch_samples` the temperature is multiplied by
    `temperature_decay` after every so many positions.

    Metric per item: `accuracy`, the share of targets that are closer to their prediction than all of its negatives.
    """

    def __init__(
        self,
        seed: int,
        share: float = 0.15,
        span: int = 7,
        all_frames: bool = False,
        num_negatives: int = 100,
        temperature: float = 0.1,
        temperature_decay: float = 0.98,
        epoch_samples: int | None = None,
        noise_probability: float = 0.2,
    ) -> None:
        if not 0 < share < 1 or span < 1 or num_negatives < 1 or temperature <= 0:
            raise ValueError(
                f"share={share}, span={span}, num_negatives={num_negatives}, temperature={temperature}"
            )
        self.seed = seed
        self.share, self.span, self.all_frames = share, span, all_frames
        self.num_negatives = num_negatives
        self.temperature, self.temperature_decay, self.epoch_samples = (
            temperature,
            temperature_decay,
            epoch_samples,
        )
        self.noise_probability = noise_probability

    def check_model(self, model: Any) -> None:
        """Refuse a model that predicts nothing."""
        if not hasattr(model, "num_frames"):
            raise ValueError(
                "objective contrastive needs a model of sepdist.models.context.ContextModel"
            )

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; reads the first source and the noise, not the mixture."""
        draws = generators(batch, self.seed, "contrastive")
        given_BT, _ = noisy(batch, draws, self.noise_probability, 1.0)
        hidden_BN = torch.zeros(len(draws), model.num_frames(given_BT.shape[1]), dtype=torch.bool)
        targets, negatives = [], []
        for hidden_N, draw, length in zip(hidden_BN, draws, batch.lengths.tolist(), strict=True):
            starts = span_starts(draw, model.num_frames(length), self.span, self.share, least=2)
            hidden_N[starts[:, None] + np.arange(self.span)] = True
            places_K = (
                hidden_N.nonzero()[:, 0]
                if self.all_frames
                else torch.from_numpy(starts + self.span // 2)
            )
            targets.append(places_K.to(given_BT.device))
            negatives.append(self._negatives(draw, len(places_K)).to(given_BT.device))
        features_BNF, predictions_BNF = model(given_BT, hidden_BN.to(given_BT.device))
        losses, accuracies = [], []
        with torch.autocast(given_BT.device.type, enabled=False):
            for item, (places_K, negatives_KM) in enumerate(zip(targets, negatives, strict=True)):
                features_KF = F.normalize(features_BNF[item, places_K].float(), dim=-1)
                predictions_KF = F.normalize(predictions_BNF[item, places_K].float(), dim=-1)
                similar_KK = predictions_KF @ features_KF.T
                scores_K1M = torch.cat(
                    [similar_KK.diagonal()[:, None], similar_KK.gather(1, negatives_KM)], dim=1
                )
                epoch = (
                    int(batch.positions[item]) // self.epoch_samples if self.epoch_samples else 0
                )
                logits_K1M = scores_K1M / (self.temperature * self.temperature_decay**epoch)
                losses.append((logits_K1M.logsumexp(1) - logits_K1M[:, 0]).mean())
                accuracies.append((scores_K1M[:, 0] > scores_K1M[:, 1:].amax(1)).float().mean())
        return torch.stack(losses).mean(), {"accuracy": torch.stack(accuracies)}

    def _negatives(self, draw: np.random.Generator, num_targets: int) -> Tensor:
        """For each target the numbers of the other targets that it is compared with, int64 [K, M]."""
        count = self.num_negatives if self.num_negatives < num_targets else num_targets // 2
        keys = draw.bit_generator.random_raw(num_targets * (num_targets - 1)).reshape(
            num_targets, -1
        )
        others = np.argsort(keys, axis=1, kind="stable")[:, :count]
        return torch.from_numpy(others + (others >= np.arange(num_targets)[:, None]))
