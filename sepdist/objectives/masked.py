"""Masked acoustic model with alteration (MAMA), a pre-training task of paper 1, section 3.1.

A few spans of clean speech are altered, noise is added to some items, and the model is to restore
the clean waveform; only the altered samples count. After TERA (Liu et al. 2020, section III), in
the time domain.

Shapes: B batch, T samples, K frequency bins.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sepdist.data.records import Batch, send
from sepdist.objectives.contract import Metrics, check_outputs
from sepdist.objectives.spans import draw_spans, noisy, uniform
from sepdist.seeding import rng


@dataclass(eq=False)
class Masked:
    """Mean absolute error on the altered samples, per item, then over items; one model output.

    The spans of an item, about `share` of it, are set to zero; with probability `replace` they are
    replaced by other spans of the item instead, and with probability `keep` left alone. With
    `band_share` > 0 a band of up to that share of all frequencies is removed as well, and all
    samples of an item with such a band count (TERA's channel masks).

    Metrics per item: `l1`, and `masked_snr` (dB), speech against error on the samples that count.
    """

    seed: int
    sample_rate: int = 8000
    share: float = 0.15
    span_seconds: float = 0.01
    replace: float = 0.1
    keep: float = 0.1
    noise_probability: float = 0.15
    noise_gain: float = 0.5
    band_share: float = 0.0

    def __post_init__(self) -> None:
        kinds = min(self.replace, self.keep) >= 0 and self.replace + self.keep <= 1
        if not (0 < self.share < 1 and kinds and 0 <= self.band_share < 1):
            raise ValueError(f"{self}: share, replace + keep and band_share are shares of 1")
        self.span = max(1, round(self.span_seconds * self.sample_rate))

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError for a network that masks its input: it cannot fill zeroed spans."""
        if self.replace + self.keep < 1 and getattr(model, "masking", True):
            raise ValueError(
                f"objective masked sets spans to zero (replace={self.replace}, keep={self.keep}), "
                f"and {type(model).__name__} multiplies its input by masks, so that its output is "
                "zero there too: use Conv-TasNet with model.masking=false"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; reads the first source and the noise, not the mixture."""
        altered_BT, clean_BT, counts_BT = self.alter(batch)
        estimates_BST = model(altered_BT)
        check_outputs(estimates_BST, clean_BT.unsqueeze(1), "set num_speakers=1")
        errors_BT = torch.where(counts_BT, estimates_BST[:, 0].float() - clean_BT, 0.0)
        l1_B = errors_BT.abs().sum(1) / counts_BT.sum(1)
        with torch.no_grad():
            speech_B = torch.where(counts_BT, clean_BT, 0.0).square().sum(1)
            snr_B = 10 * torch.log10((speech_B + 1e-8) / (errors_BT.square().sum(1) + 1e-8))
        return l1_B.mean(), {"l1": l1_B.detach(), "masked_snr": snr_B}

    def alter(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return input and target, float32 [B, T], and which samples count, bool [B, T]."""
        draws = [rng(self.seed, "masked", position) for position in batch.positions.tolist()]
        given_BT, clean_BT = noisy(batch, draws, self.noise_probability, self.noise_gain)
        size = clean_BT.shape[1]
        lengths = batch.lengths.tolist()
        plans = [self._plan(draw, n, size) for draw, n in zip(draws, lengths, strict=True)]
        from_BT, shown_BT, counts_BT, passed_BK = (
            send(torch.from_numpy(np.stack(rows)), clean_BT.device)
            for rows in zip(*plans, strict=True)
        )
        altered_BT = given_BT.gather(1, from_BT) * shown_BT
        if self.band_share:
            altered_BT = torch.fft.irfft(torch.fft.rfft(altered_BT) * passed_BK, n=size)
        return altered_BT, clean_BT, counts_BT

    def _plan(self, draw: np.random.Generator, length: int, size: int) -> tuple[np.ndarray, ...]:
        """Draw for one item the samples taken, shown and counted, [T], and bins passed, [K]."""
        from_T, shown_T = np.arange(size), np.ones(size, np.float32)
        counts_T, passed_K = np.zeros(size, bool), np.ones(size // 2 + 1, np.float32)
        action = uniform(draw)
        inside = draw_spans(draw, length, self.span, self.share)
        counts_T[inside] = True
        if action < self.replace:
            from_T[inside] = draw_spans(draw, length, self.span, self.share)
        elif action < 1 - self.keep:
            shown_T[inside] = 0.0
        if self.band_share:
            width = int(uniform(draw) * (int(self.band_share * len(passed_K)) + 1))
            first = int(uniform(draw) * (len(passed_K) - width + 1))
            passed_K[first : first + width] = 0.0
            counts_T[:length] |= width > 0
        return from_T, shown_T, counts_T, passed_K
