"""A data set with a separator's estimates beside the sources, on which SI-SNR estimators are trained."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from sepdist import audio
from sepdist.config import ConfigError
from sepdist.corpora.stored import Stored
from sepdist.data.dataset import Item, collate
from sepdist.data.members import split_members
from sepdist.data.records import Mixture
from sepdist.data.shards import read_manifest
from sepdist.inference.export import load_model
from sepdist.inference.scoring import EvaluationError, estimate, single_threaded
from sepdist.metrics.permutation import best_permutation, reorder
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr

PEAK = 0.99  # of a stored estimate at most, full scale 1.0
open_model = lru_cache(maxsize=2)(load_model)


class Separated:
    """The samples of `data` with the estimates that the separator `model` (a run_dir or an export) makes of each.

    A mixture is separated whole. Its estimates are in the order of the sources, by the assignment with the best mean
    SI-SNR, and at the level of the mixture, because that of an estimate is arbitrary. `si_snr` in the json of a sample
    is that of each stored estimate in dB. On `device` cpu one thread gives the same bits everywhere; cuda wants
    `gpus_per_worker`. `noise=False`: the mixtures are without noise, as those that the separator was trained on with
    `data.noise=false`. Raises ConfigError where `data` has no sources.
    """

    def __init__(
        self,
        data: str,
        model: str,
        noise: bool = True,
        device: str = "cpu",
        cache_dir: str = "~/.cache/sepdist",
    ) -> None:
        if "s1" not in read_manifest(data).members:
            raise ConfigError(
                f"corpus=separated: {data} has mixtures only; without sources no SI-SNR is known"
            )
        self.stored = Stored(data, noise, cache_dir)
        self.name, self.sample_rate = self.stored.name, self.stored.sample_rate
        self.model, self.device = model, device

    def records(self, split: str) -> Iterator[Mixture]:
        """Every sample; it is separated when it is loaded."""
        for record in self.stored.records(split):
            assert record.metadata is not None
            read = partial(separate, record, self.model, self.device)
            yield replace(record, load=read, metadata=partial(judge, record.metadata))


def separate(record: Mixture, model: str, device: str) -> Mapping[str, np.ndarray]:
    """The parts of a record with the estimates e1, e2, ... of its sources."""
    sources, _, rest = split_members(list(parts := record.load()))
    waves = {name: parts[name] for name in (*sources, *rest)}
    batch = collate([Item(record.id, record.speakers, waves)], range(1), len(parts["s1"]))
    assert batch.sources is not None
    with single_threaded():
        estimates_BST = estimate(open_model(model).to(device), batch, torch.device(device))[None]
        if estimates_BST.shape != batch.sources.shape:
            shapes = f"estimates {list(estimates_BST.shape[1:])} of sources {list(batch.sources.shape[1:])}"
            raise EvaluationError(
                f"{record.id}: {model} gives {shapes}; it must have one output for each speaker"
            )
        order_BS = best_permutation(pairwise_si_snr(estimates_BST, batch.sources))[1]
        matched_ST = reorder(estimates_BST, order_BS)[0].numpy()
    mixture_T = batch.mixture[0].numpy()
    return waves | {
        f"e{i}": audio.at_level_of(mixture_T, wave, PEAK)
        for i, wave in enumerate(matched_ST, start=1)
    }


def judge(tell: Callable[[Any], dict[str, Any]], parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The SI-SNR in dB of each estimate of the `parts`, beside what `tell` says."""
    names, estimates, _ = split_members(list(parts))
    sources_ST, estimates_ST = (
        torch.from_numpy(np.stack([parts[name] for name in some]).astype(np.float64) / 2**15)
        for some in (names, estimates)
    )
    return tell(parts) | {
        "si_snr": [round(value, 4) for value in si_snr(estimates_ST, sources_ST).tolist()]
    }
