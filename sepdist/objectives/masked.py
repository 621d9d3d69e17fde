"""Masked acoustic model with alteration (MAMA), pre-training of paper 1, section 3.1: clean speech in, L1 out.

A few spans of the waveform are altered, noise is added to some items, and the model is to give back the clean
waveform; only the altered samples count. After TERA (Liu et al. 2020, section III), in the time domain. A network that
multiplies its input by masks can put nothing where the input is zero: use Conv-TasNet with `masking=False`.

Shapes: B batch, T samples, K frequency bins.
"""

import numpy as np
import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.objectives.spans import generators, noisy, span_starts, uniform


class Masked:
    """Mean absolute error on the altered samples, per item, then mean over items; a model of one output.

    The spans of an item, about `share` of it, are set to zero, or with probability `replace` are other spans of the
    same item, or with probability `keep` stay as they are. With `band_share` > 0 a band of up to that share of all
    frequencies is taken out as well, and of an item with such a band all samples count (TERA's channel masks).

    Metrics per item: `l1`, and `masked_snr`, clean speech against error on the samples that count, in dB.
    """

    def __init__(
        self,
        seed: int,
        sample_rate: int = 8000,
        share: float = 0.15,
        span_seconds: float = 0.01,
        replace: float = 0.1,
        keep: float = 0.1,
        noise_probability: float = 0.15,
        noise_gain: float = 0.5,
        band_share: float = 0.0,
    ) -> None:
        if (
            not 0 < share < 1
            or replace < 0
            or keep < 0
            or replace + keep > 1
            or not 0 <= band_share < 1
        ):
            raise ValueError(
                f"share={share}, replace={replace}, keep={keep}, band_share={band_share}: not shares of 1"
            )
        self.seed = seed
        self.share, self.span = share, max(1, round(span_seconds * sample_rate))
        self.replace, self.keep = replace, keep
        self.noise_probability, self.noise_gain = noise_probability, noise_gain
        self.band_share = band_share

    def check_model(self, model: nn.Module) -> None:
        """Refuse a network that masks its input, where spans are set to zero: it cannot learn to fill them."""
        if self.replace + self.keep < 1 and getattr(model, "masking", True):
            raise ValueError(
                f"objective masked sets spans to zero (replace={self.replace}, keep={self.keep}), and "
                f"{type(model).__name__} multiplies its input by masks, so that its output is zero there too: use "
                "Conv-TasNet with model.masking=false"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; reads the first source and the noise, not the mixture."""
        altered_BT, clean_BT, counts_BT = self.alter(batch)
        estimates_BST = model(altered_BT)
        if estimates_BST.shape != clean_BT.unsqueeze(1).shape:
            raise ValueError(
                f"the model gives {tuple(estimates_BST.shape)}, this objective expects "
                f"{tuple(clean_BT.unsqueeze(1).shape)} [B, 1, T]: set num_speakers=1"
            )
        errors_BT = torch.where(counts_BT, estimates_BST[:, 0].float() - clean_BT, 0.0)
        l1_B = errors_BT.abs().sum(1) / counts_BT.sum(1)
        with torch.no_grad():
            speech_B = torch.where(counts_BT, clean_BT, 0.0).square().sum(1)
            snr_B = 10 * torch.log10((speech_B + 1e-8) / (errors_BT.square().sum(1) + 1e-8))
        return l1_B.mean(), {"l1": l1_B.detach(), "masked_snr": snr_B}

    def alter(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the model gets and is to give back, float32 [B, T], and which samples count, bool [B, T]."""
        draws = generators(batch, self.seed, "masked")
        given_BT, clean_BT = noisy(batch, draws, self.noise_probability, self.noise_gain)
        num_samples, device = clean_BT.shape[1], clean_BT.device
        plans = [
            self._plan(draw, n, num_samples)
            for draw, n in zip(draws, batch.lengths.tolist(), strict=True)
        ]
        taken_BT, shown_BT, counts_BT, passed_BK = (
            torch.from_numpy(np.stack(rows)).to(device) for rows in zip(*plans, strict=True)
        )
        altered_BT = given_BT.gather(1, taken_BT) * shown_BT
        if self.band_share:
            altered_BT = torch.fft.irfft(torch.fft.rfft(altered_BT) * passed_BK, n=num_samples)
        return altered_BT, clean_BT, counts_BT

    def _plan(
        self, draw: np.random.Generator, length: int, num_samples: int
    ) -> tuple[np.ndarray, ...]:
        """For one item: from where each sample is taken, whether it is shown and counts; which bins pass."""
        taken, shown = np.arange(num_samples), np.ones(num_samples, np.float32)
        counts, passed = np.zeros(num_samples, bool), np.ones(num_samples // 2 + 1, np.float32)
        action = uniform(draw)
        inside = _spread(span_starts(draw, length, self.span, self.share), self.span)
        counts[inside] = True
        if action < self.replace:
            taken[inside] = _spread(span_starts(draw, length, self.span, self.share), self.span)
        elif action < 1 - self.keep:
            shown[inside] = 0.0
        if self.band_share:
            width = int(uniform(draw) * (int(self.band_share * len(passed)) + 1))
            first = int(uniform(draw) * (len(passed) - width + 1))
            passed[first : first + width] = 0.0
            counts[:length] |= width > 0
        return taken, shown, counts, passed


def _spread(starts: np.ndarray, span: int) -> np.ndarray:
    return starts[:, None] + np.arange(span)
