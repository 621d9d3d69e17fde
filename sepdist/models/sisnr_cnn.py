"""REAL-M's SI-SNR estimator, the baseline of paper 2: five convolutions, statistics, a small MLP.

Subakan et al., "REAL-M: Towards Speech Separation on Real Mixtures", 2022, as SpeechBrain published
it: 329,857 parameters over the channels [estimate, mixture], one estimate at a time.

Shapes: B batch, S sources, T samples, N frames, F features.
"""

import torch
from torch import Tensor, nn

from sepdist.models.frames import EPS, check_estimates, standardise

NUM_FEATURES, KERNEL_SIZE = 128, 4
STRIDES = (1, 2, 2, 2, 2)


class SISNREstimator(nn.Module):
    """Five convolutions with ReLU between them, mean and deviation over time, two linear layers.

    With `clipped`, as published, predictions are ten times a sigmoid, 0 to 10 dB; else unbounded.
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
            num_inputs = NUM_FEATURES if number else 2
            self.convolutions.append(nn.Conv1d(num_inputs, NUM_FEATURES, KERNEL_SIZE, stride))
        self.head = nn.Sequential(
            nn.Linear(2 * NUM_FEATURES, 2 * NUM_FEATURES), nn.ReLU(), nn.Linear(2 * NUM_FEATURES, 1)
        )

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        """Predicted SI-SNR [B, S] in dB."""
        check_estimates(mixture_BT, estimates_BST, self.min_length)
        pairs = torch.stack([estimates_BST, mixture_BT.unsqueeze(1).expand_as(estimates_BST)], 2)
        features_BFN = self.convolutions(standardise(pairs.flatten(0, 1).float())).float()
        deviation_BF = (features_BFN.var(2, correction=0) + EPS).sqrt()
        statistics = torch.cat([features_BFN.mean(2), deviation_BF], 1)
        logits_BS = self.head(statistics).float().view(estimates_BST.shape[:2])
        return 10 * torch.sigmoid(logits_BS) if self.clipped else logits_BS
