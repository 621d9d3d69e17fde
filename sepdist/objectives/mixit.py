"""Mixture invariant training (MixIT): mixtures without sources in, the SNR of mixtures put together again out.

Wisdom et al., "Unsupervised Sound Separation Using Mixture Invariant Training", 2020; the baseline of paper 2, section
5.2. Two mixtures are added up, the model takes the sum apart into M outputs, and every output is given to one of the
two, so that they come out best. It never sees a source. Labelled batches, where there are some, are separated as usual.

Shapes: B batch, P = B / 2 pairs, M outputs of the model, K = 2^M ways to divide them, S sources, T samples.
"""

import functools
import itertools

import torch
from torch import Tensor, nn

from sepdist.data.records import MAIN, Batch
from sepdist.metrics.permutation import best_permutation
from sepdist.metrics.selection import speakers_of
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr


class MixIT:
    """Minus the SNR, bounded at `max_snr_db`, of two mixtures from the outputs for their sum; mean over mixtures.

    Items 0 and 1, 2 and 3, ... of a batch are added up as they are, so `data.micro_batch` is even. With `data_set` only
    batches of that extra data set are trained on so, their loss times `unlabelled_weight`; those of the main one are
    labelled: PIT over all M outputs, with the sources and M - S times silence as references, the loss against silence
    being bounded by the level of the mixture. Without it every batch is unlabelled. Validation has sources in any case.

    An export keeps the `num_speakers` loudest outputs, which alone does not ask the sources. Metrics per item:
    `mixture_snr` (dB) of unlabelled batches; of labelled ones, and in evaluation, `si_snr` and `si_snri` of the loudest
    outputs, and `oracle_si_snr` of those outputs that fit the sources best.
    """

    def __init__(
        self,
        num_speakers: int = 2,
        data_set: str | None = None,
        unlabelled_weight: float = 1.0,
        max_snr_db: float = 30.0,
    ) -> None:
        self.num_loudest = num_speakers
        self.data_set = data_set
        self.data_sets = (MAIN,) if data_set is None else (MAIN, data_set)
        self.unlabelled_weight = unlabelled_weight
        self.max_snr_db = max_snr_db

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model with fewer outputs than a mixture of mixtures has speakers."""
        needed = 2 * self.num_loudest
        if (num_outputs := getattr(model, "num_speakers", needed)) < needed:
            raise ValueError(
                f"mixit adds up two mixtures: {num_outputs} outputs are few; model.num_speakers={needed}"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch; reads `batch.sources` of labelled ones only."""
        metrics = dict.fromkeys(
            ("mixture_snr", "si_snr", "si_snri", "oracle_si_snr"), batch.mixture.new_zeros(0)
        )
        if batch.data_set not in self.data_sets:
            raise ValueError(
                f"objective mixit has no use for {batch.data_set!r}, only for {self.data_sets}"
            )
        if model.training and batch.data_set == (self.data_set or MAIN):
            losses_B = self.unlabelled(model, batch.mixture)
            return self.unlabelled_weight * losses_B.mean(), metrics | {
                "mixture_snr": -losses_B.detach()
            }
        loss, found = self.labelled(model, batch)
        return loss, metrics | found

    def unlabelled(self, model: nn.Module, mixture_BT: Tensor) -> Tensor:
        """The loss [B] in dB of each mixture, by the best of all divisions of the outputs between the two of a pair."""
        if len(mixture_BT) % 2:
            raise ValueError(
                f"MixIT adds mixtures up in pairs: make data.micro_batch={len(mixture_BT)} even"
            )
        mixtures_P2T = mixture_BT.unflatten(0, (-1, 2))
        estimates_PMT = model(mixtures_P2T.sum(1))
        with torch.autocast(mixture_BT.device.type, enabled=False):
            estimates_PMT = estimates_PMT.float()
            divisions_K2M = divisions(estimates_PMT.shape[1]).to(estimates_PMT)
            with torch.no_grad():  # one by one, as all together are K times the memory
                tried = [
                    self.loss(division @ estimates_PMT - mixtures_P2T, mixtures_P2T)
                    for division in divisions_K2M
                ]
                best_P = torch.stack(tried).sum(2).argmin(0)
            return self.loss(
                divisions_K2M[best_P] @ estimates_PMT - mixtures_P2T, mixtures_P2T
            ).flatten()

    def labelled(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch with sources."""
        if batch.sources is None:
            raise ValueError(
                "labelled batches and validation of mixit need sources; this data set has mixtures only"
            )
        estimates_BMT = model(batch.mixture)
        num_sources, num_outputs = batch.sources.shape[1], estimates_BMT.shape[1]
        if num_sources != self.num_loudest or num_outputs < num_sources:
            raise ValueError(
                f"the model has {num_outputs} outputs, the data {num_sources} sources, the objective num_speakers="
                f"{self.num_loudest}: MixIT takes model.num_speakers=4 outputs for 2 sources"
            )
        with torch.autocast(batch.mixture.device.type, enabled=False):
            estimates_BMT = estimates_BMT.float()
            losses_BMS = self.loss(
                batch.sources[:, None] - estimates_BMT[:, :, None], batch.sources[:, None]
            )
            silences_BM1 = self.loss(estimates_BMT, batch.mixture[:, None]).unsqueeze(2)
            losses_BMM = torch.cat(
                [losses_BMS, *[silences_BM1] * (num_outputs - num_sources)], dim=2
            )
            loss = -best_permutation(-losses_BMM)[0].mean()
            with torch.no_grad():
                loudest_BST = speakers_of(estimates_BMT, num_loudest=num_sources)
                scores_B, _ = best_permutation(pairwise_si_snr(loudest_BST, batch.sources))
                before_B = si_snr(batch.mixture.unsqueeze(1), batch.sources).mean(1)
                scores_BMS = pairwise_si_snr(estimates_BMT, batch.sources)
                choices = itertools.permutations(range(num_outputs), num_sources)
                totals = [scores_BMS[:, choice, range(num_sources)].mean(1) for choice in choices]
        found = {
            "si_snr": scores_B,
            "si_snri": scores_B - before_B,
            "oracle_si_snr": torch.stack(totals).amax(0),
        }
        return loss, found

    def loss(self, error: Tensor, reference: Tensor, eps: float = 1e-8) -> Tensor:
        """10 log10 (|error|^2 + tau |reference|^2) - 10 log10 |reference|^2 over the last axis: from -`max_snr_db` up.

        With an estimate for the error and the mixture for the reference it is, less a constant, the loss of silence.
        """
        energy = reference.square().sum(-1)
        bound = 10 ** (-self.max_snr_db / 10) * energy
        return 10 * torch.log10(error.square().sum(-1) + bound + eps) - 10 * torch.log10(
            energy + eps
        )


@functools.cache
def divisions(num_outputs: int) -> Tensor:
    """All ways to give each output to one of two mixtures, 0 or 1, [2^M, 2, M]."""
    first_KM = torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_outputs)))
    return torch.stack([first_KM, 1 - first_KM], dim=1)
