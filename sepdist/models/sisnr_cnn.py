"""The SI-SNR estimator of REAL-M, paper 2's baseline: a mixture and estimates in, the SI-SNR in dB of each out.

Subakan et al., "REAL-M: Towards Speech Separation on Real Mixtures", 2022, as SpeechBrain published it: 329,857
parameters over the channels [estimate, mixture], one estimate at a time.

Shapes: B batch, S sources, T samples, N frames, F features.
"""

import torch
from torch import Tensor, nn

from sepdist.models.estimators import check_estimates, standardise
from sepdist.models.frames import EPS

NUM_FEATURES, KERNEL_SIZE = 128, 4
STRIDES = (1, 2, 2, 2, 2)


class SISNREstimator(nn.Module):
    """Five convolutions with ReLU between them, mean and deviation over time, two linear layers.

    `clipped`: ten times a sigmoid, so 0 to 10 dB, as published; else the number itself, at true scale.
    """

    estimates_si_snr = True
    output_parameters: tuple[str, ...] = ("head.2",)

    def __init__(self, clipped: bool = True) -> None:
        super().__init__()
        self.clipped = clipped
        self.min_length = 1
        for stride in reversed(STRIDES):
            self.min_length = (self.min_length - 1) * stride + KERNEL_SIZE
        self.convolutions = nn.Sequential()
        for number, stride in enumerate(STRIDES):
            if number:
                self.convolutions.append(nn.ReLU())
            self.convolutions.append(
                nn.Conv1d(NUM_FEATURES if number else 2, NUM_FEATURES, KERNEL_SIZE, stride)
            )
        self.head = nn.Sequential(
            nn.Linear(2 * NUM_FEATURES, 2 * NUM_FEATURES), nn.ReLU(), nn.Linear(2 * NUM_FEATURES, 1)
        )

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        """Predicted SI-SNR [B, S] in dB."""
        check_estimates(mixture_BT, estimates_BST, self.min_length)
        pairs = torch.stack([estimates_BST, mixture_BT.unsqueeze(1).expand_as(estimates_BST)], 2)
        features_BFN = self.convolutions(standardise(pairs.flatten(0, 1).float())).float()
        deviation_BF = (features_BFN.var(2, correction=0) + EPS).sqrt()
        logits = (
            self.head(torch.cat([features_BFN.mean(2), deviation_BF], 1))
            .float()
            .view(estimates_BST.shape[:2])
        )
        return 10 * torch.sigmoid(logits) if self.clipped else logits
