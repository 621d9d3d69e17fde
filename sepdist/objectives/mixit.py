"""Mixture invariant training (MixIT): learn to separate from mixtures without sources.

Wisdom et al., "Unsupervised Sound Separation Using Mixture Invariant Training", 2020; the baseline
of paper 2, section 5.2. The model separates the sum of two mixtures into M outputs, and each output
is assigned to one of the two so that both are restored best. Labelled batches are separated as
usual.

Shapes: B batch, P = B / 2 pairs, M outputs, K = 2^M ways to divide them, S sources, T samples.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sepdist.data.records import MAIN, Batch
from sepdist.metrics.permutation import best_permutation
from sepdist.metrics.si_snr import mean_audible, pairwise_si_snr, silent_sources
from sepdist.objectives.contract import Metrics, check_data_set, measured, sources_of, speakers_of
from sepdist.objectives.separation import report, unscored


@dataclass(eq=False)
class MixIT:
    """Negative SNR, at most `max_snr_db`, of both mixtures of a pair, mean over mixtures.

    Pairs are items 0 and 1, 2 and 3, ... of a batch, so `data.micro_batch` must be even. Without
    `data_set` all training is unlabelled. With it, only batches of that extra data set are, and
    their loss is multiplied by `unlabelled_weight`; the main data set is labelled: PIT over all M
    outputs with the sources and M - S silences as references, where the loss against silence is
    bounded by the level of the mixture. Validation always needs sources.

    An export keeps the `num_speakers` loudest outputs, a choice that needs no sources. Metrics per
    item: `mixture_snr` (dB) of unlabelled batches; of labelled ones and in validation `si_snr` and
    `si_snri` of the loudest outputs and `oracle_si_snr` of the outputs that fit the sources best.
    """

    num_speakers: int = 2
    data_set: str | None = None
    unlabelled_weight: float = 1.0
    max_snr_db: float = 30.0

    def __post_init__(self) -> None:
        self.num_loudest = self.num_speakers
        self.data_sets = (MAIN,) if self.data_set is None else (MAIN, self.data_set)

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError for a model with fewer outputs than two mixtures have speakers."""
        needed = 2 * self.num_loudest
        if (num_outputs := getattr(model, "num_speakers", needed)) < needed:
            raise ValueError(
                f"objective mixit adds two mixtures, which takes more than {num_outputs} outputs: "
                f"set model.num_speakers={needed}"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics; only labelled batches need `batch.sources`."""
        check_data_set(batch, self.data_sets)
        names = ("mixture_snr", "si_snr", "si_snri", "oracle_si_snr")
        metrics = dict.fromkeys(names, batch.mixture.new_zeros(0))
        if model.training and batch.data_set == self.data_sets[-1]:
            losses_B = self.unlabelled(model, batch.mixture)
            metrics["mixture_snr"] = -losses_B.detach()
            return self.unlabelled_weight * losses_B.mean(), metrics
        loss, found = self.labelled(model, batch)
        return loss, metrics | found

    def unlabelled(self, model: nn.Module, mixture_BT: Tensor) -> Tensor:
        """Return the loss in dB, [B], of each mixture under the best division of the outputs."""
        if len(mixture_BT) % 2:
            raise ValueError(
                f"objective mixit adds mixtures in pairs: data.micro_batch={len(mixture_BT)} must "
                "be even"
            )
        mixtures_P2T = mixture_BT.unflatten(0, (-1, 2))
        estimates_PMT = model(mixtures_P2T.sum(1))
        with torch.autocast(mixture_BT.device.type, enabled=False):
            estimates_PMT = estimates_PMT.float()
            divisions_K2M = divisions(estimates_PMT.shape[1])
            divisions_K2M = divisions_K2M.to(estimates_PMT.device, non_blocking=True)
            with torch.no_grad():  # one division at a time: all together take K times the memory
                tried = [
                    self.loss(division @ estimates_PMT - mixtures_P2T, mixtures_P2T)
                    for division in divisions_K2M
                ]
                best_P = torch.stack(tried).sum(2).argmin(0)
            restored_P2T = divisions_K2M[best_P] @ estimates_PMT
            return self.loss(restored_P2T - mixtures_P2T, mixtures_P2T).flatten()

    def labelled(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return loss and metrics of a batch with sources."""
        sources_BST = sources_of(batch)
        estimates_BMT = model(batch.mixture)
        num_sources, num_outputs = sources_BST.shape[1], estimates_BMT.shape[1]
        if num_sources != self.num_loudest or num_outputs < num_sources:
            raise ValueError(
                f"the model has {num_outputs} outputs, the data {num_sources} sources, objective "
                f"mixit num_speakers={self.num_loudest}: set model.num_speakers=4 for 2 sources"
            )
        with torch.autocast(batch.mixture.device.type, enabled=False):
            estimates_BMT = estimates_BMT.float()
            sources_B1ST, mixture_B1T = sources_BST[:, None], batch.mixture[:, None]
            losses_BMS = self.loss(sources_B1ST - estimates_BMT[:, :, None], sources_B1ST)
            # Up to a constant, the loss against silence has the mixture as its reference.
            silences_BM1 = self.loss(estimates_BMT, mixture_B1T).unsqueeze(2)
            silent_BS = silent_sources(sources_BST)
            losses_BMS = torch.where(silent_BS[:, None], silences_BM1, losses_BMS)
            losses_BMM = torch.cat([losses_BMS, *[silences_BM1] * (num_outputs - num_sources)], 2)
            loss = -best_permutation(-losses_BMM)[0].mean()
            with torch.no_grad():
                loudest_BST = speakers_of(estimates_BMT, num_loudest=num_sources)
                scores_BSS = pairwise_si_snr(loudest_BST, sources_BST)
                metrics = report(scores_BSS, best_permutation(scores_BSS)[1], batch)
                scores_BMS = pairwise_si_snr(estimates_BMT, sources_BST)
                choices = itertools.permutations(range(num_outputs), num_sources)
                chosen = ([scores_BMS[:, i, j] for j, i in enumerate(one)] for one in choices)
                unscored_BS = unscored(batch)
                totals = [mean_audible(torch.stack(one, 1), unscored_BS) for one in chosen]
                oracle_B = torch.stack(totals).amax(0)
        del metrics["permutation"]  # of the loudest outputs, which the loss does not know
        return loss, metrics | {"oracle_si_snr": measured(oracle_B, ~unscored_BS.all(1))}

    def loss(self, error: Tensor, reference: Tensor, eps: float = 1e-8) -> Tensor:
        """10 log10((|error|^2 + tau |reference|^2) / |reference|^2), over the last axis.

        tau = 10^(-max_snr_db / 10), so it is -`max_snr_db` at least.
        """
        energy = reference.square().sum(-1)
        bound = 10 ** (-self.max_snr_db / 10) * energy
        bounded = error.square().sum(-1) + bound + eps
        return 10 * torch.log10(bounded) - 10 * torch.log10(energy + eps)


@functools.cache
def divisions(num_outputs: int) -> Tensor:
    """All assignments of the outputs to two mixtures, 0 or 1, [2^M, 2, M]."""
    first_KM = torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_outputs)))
    return torch.stack([first_KM, 1 - first_KM], dim=1)
