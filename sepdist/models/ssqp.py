"""SSQP-Net: a mixture and what a separator made of it in, the SI-SNR in dB of each estimate out, without any source.

Dang et al. 2023 (paper 2), section 3.2: a speech encoder over mixture and estimates in a row, the mean over frames, one
linear layer. In a row means in time: [m; s1; s2] at once (OTFP), or [m; s] for each estimate alone (OTFS).

Shapes: B batch, S sources, T samples, K segments in a row, F features.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sepdist.models.estimators import check_estimates, standardise
from sepdist.models.speech_encoders import SAMPLE_RATE, speech_encoder, upsample


class SSQPNet(nn.Module):
    """Encoder, mean over frames, linear head (equation 8). `mode` is otfp or otfs, `num_speakers` the S of otfp.

    The mixture is heard at variance 1, every estimate at the level at which it fits that best (`as_heard`). A frozen
    encoder stays in eval mode. `node_changes` are the arguments that build this model where `pretrained` is not.

    `window_seconds`: inputs longer than that are cut into equal windows, each judged by itself. An encoder of absolute
    positions (Whisper) needs the length of the crops that it is trained on here: at others it is far off.
    """

    estimates_si_snr = True
    output_parameters: tuple[str, ...] = ("head",)

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
            raise ValueError(
                f"sample_rate={sample_rate}: the encoder works at {SAMPLE_RATE} Hz, a multiple is needed"
            )
        self.num_speakers, self.mode, self.freeze = num_speakers, mode, freeze
        self.factor = SAMPLE_RATE // sample_rate
        self.max_window = None if window_seconds is None else round(window_seconds * SAMPLE_RATE)
        self.encoder, config = speech_encoder(
            pretrained,
            encoder,
            num_layers=num_layers,
            freeze=freeze,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.node_changes = {"pretrained": None, "encoder": config}
        self.min_length = -(-self.encoder.min_samples // self.factor)
        if self.max_window is not None and self.max_window < 2 * self.encoder.min_samples:
            raise ValueError(
                f"window_seconds={window_seconds}: the encoder needs {2 * self.encoder.min_samples} samples"
            )
        self.head = nn.Linear(self.encoder.num_features, num_speakers if mode == "otfp" else 1)

    def train(self, mode: bool = True) -> "SSQPNet":
        """As every module, but for a frozen encoder."""
        super().train(mode)
        if self.freeze == "encoder":
            self.encoder.eval()
        return self

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        """Predicted SI-SNR [B, S] in dB."""
        check_estimates(mixture_BT, estimates_BST, self.min_length)
        batch, num_speakers, _ = estimates_BST.shape
        if self.mode == "otfs":
            pairs = torch.stack(
                [mixture_BT.unsqueeze(1).expand_as(estimates_BST), estimates_BST], 2
            )
            segments_BKT = pairs.flatten(0, 1)
        elif num_speakers == self.num_speakers:
            segments_BKT = torch.cat([mixture_BT.unsqueeze(1), estimates_BST], 1)
        else:
            raise ValueError(
                f"{num_speakers} estimates for model.num_speakers={self.num_speakers} (mode=otfp)"
            )
        return self.head(self.mean_features(segments_BKT)).float().view(batch, num_speakers)

    def mean_features(self, segments_BKT: Tensor) -> Tensor:
        """[B, F], the mean over the frames of the segments in a row.

        Where the encoder takes no more than so much at once (Whisper: 30 s), or where segments are longer than
        `window_seconds`, they are cut into as few equal windows as fit, each window of all segments is a row of its
        own, and the mean is over the frames of all.
        """
        with torch.autocast(segments_BKT.device.type, enabled=False):
            segments_BKT = upsample(as_heard(segments_BKT.float()), self.factor)
        _, num_segments, length = segments_BKT.shape
        most = min(
            length,
            self.max_window or length,
            (self.encoder.max_samples or num_segments * length) // num_segments,
        )
        num_windows = -(-length // most)
        features = [
            self.encoder(window.flatten(1)) for window in segments_BKT.tensor_split(num_windows, 2)
        ]
        return torch.cat(features, 1).float().mean(1)


def as_heard(segments_BKT: Tensor) -> Tensor:
    """Segments [m; s1; ...] at mean 0, the mixture at variance 1, an estimate s as <m, s> / <s, s> times s.

    The level at which a separator gives an estimate is arbitrary, and no factor of it, negative ones included, changes
    anything here. How much of the mixture an estimate explains is not: where nothing is separated, all explain all.
    """
    segments_BKT = standardise(segments_BKT)
    return segments_BKT * (segments_BKT * segments_BKT[:, :1]).mean(2, keepdim=True)
