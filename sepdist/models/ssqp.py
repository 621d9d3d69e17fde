"""SSQP-Net: estimates the SI-SNR of separated speech from mixture and estimates, without sources.

Dang et al. 2023 (paper 2), section 3.2: a speech encoder over the concatenation in time of mixture
and estimates, the mean over frames, one linear layer. The encoder sees [m; s1; s2] at once (OTFP),
or [m; s] for each estimate alone (OTFS).

Shapes: B batch, S sources, T samples, K concatenated segments, F features.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sepdist.models.frames import check_estimates, standardise
from sepdist.models.speech_encoders import SAMPLE_RATE, speech_encoder, upsample


class SSQPNet(nn.Module):
    """Encoder, mean over frames, linear head (equation 8).

    `mode` is otfp or otfs; otfp takes exactly `num_speakers` estimates. A frozen encoder stays in
    eval mode. `node_changes` are the arguments that build this model where `pretrained` is absent.

    Inputs longer than `window_seconds` are cut into equal windows that are encoded separately. An
    encoder with absolute positions (Whisper) needs the length of its training crops here: at other
    lengths its estimates are far off.
    """

    estimates_si_snr = True
    output_parameters: tuple[str, ...] = ("head",)
    outside_arguments = ("pretrained",)

    def __init__(
        self,
        num_speakers: int = 2,
        sample_rate: int = 8000,
        mode: str = "otfp",
        pretrained: str | None = None,
        encoder: Mapping[str, Any] | None = None,
        num_layers: int | None = None,
        window_seconds: float | None = None,
        freeze: str = "none",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("otfp", "otfs"):
            raise ValueError(f"mode={mode!r}: choose otfp or otfs")
        if sample_rate < 1 or SAMPLE_RATE % sample_rate:
            raise ValueError(f"sample_rate={sample_rate}: choose a divisor of {SAMPLE_RATE} Hz")
        self.num_speakers, self.mode, self.freeze = num_speakers, mode, freeze
        self.factor = SAMPLE_RATE // sample_rate
        self.max_window = None if window_seconds is None else round(window_seconds * SAMPLE_RATE)
        self.encoder, config = speech_encoder(
            pretrained, encoder, num_layers, freeze, gradient_checkpointing
        )
        self.node_changes = {"pretrained": None, "encoder": config}
        min_samples = self.encoder.min_samples
        self.min_length = -(-min_samples // self.factor)
        if self.max_window is not None and self.max_window < 2 * min_samples:
            raise ValueError(
                f"window_seconds={window_seconds}: the encoder needs {2 * min_samples} samples"
            )
        self.head = nn.Linear(self.encoder.num_features, num_speakers if mode == "otfp" else 1)

    def train(self, mode: bool = True) -> "SSQPNet":
        """Set the mode of all modules but a frozen encoder."""
        super().train(mode)
        if self.freeze == "encoder":
            self.encoder.eval()
        return self

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        """Predicted SI-SNR [B, S] in dB."""
        check_estimates(mixture_BT, estimates_BST, self.min_length)
        batch, num_speakers, _ = estimates_BST.shape
        mixture_B1T = mixture_BT.unsqueeze(1)
        if self.mode == "otfs":
            pairs = torch.stack([mixture_B1T.expand_as(estimates_BST), estimates_BST], 2)
            segments_BKT = pairs.flatten(0, 1)
        elif num_speakers == self.num_speakers:
            segments_BKT = torch.cat([mixture_B1T, estimates_BST], 1)
        else:
            raise ValueError(
                f"{num_speakers} estimates for model.num_speakers={self.num_speakers} (mode=otfp)"
            )
        return self.head(self.mean_features(segments_BKT)).float().view(batch, num_speakers)

    def mean_features(self, segments_BKT: Tensor) -> Tensor:
        """Mean over frames [B, F] of the encoded segments, concatenated in time.

        Segments longer than `window_seconds`, or longer than the encoder takes at once (Whisper:
        30 s for all of them), are cut into as few equal windows as possible. Each window of all
        segments is encoded separately, and the mean is over all frames.
        """
        with torch.autocast(segments_BKT.device.type, enabled=False):
            segments_BKT = upsample(fit_levels(segments_BKT.float()), self.factor)
        _, num_segments, length = segments_BKT.shape
        most = min(length, self.max_window or length)
        if self.encoder.max_samples is not None:
            most = min(most, self.encoder.max_samples // num_segments)
        windows = segments_BKT.tensor_split(-(-length // most), 2)
        features = [self.encoder(window.flatten(1)) for window in windows]
        return torch.cat(features, 1).float().mean(1)


def fit_levels(segments_BKT: Tensor) -> Tensor:
    """Scale [m; s1; ...]: mean 0, the mixture at variance 1, estimate s as <m, s> / <s, s> times s.

    The level of a separator's estimate is arbitrary, and no factor of it, not even a negative one,
    changes anything here. How much of the mixture an estimate explains does: where nothing is
    separated, each estimate explains all of it.
    """
    segments_BKT = standardise(segments_BKT)
    return segments_BKT * (segments_BKT * segments_BKT[:, :1]).mean(2, keepdim=True)
