"""A corpus of a data set's mixtures with a separator's estimates, to train SI-SNR estimators on."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from sepdist import audio, storage
from sepdist.config import ConfigError
from sepdist.corpora.stored import Stored
from sepdist.data.dataset import Item, collate
from sepdist.data.members import split_members
from sepdist.data.records import Mixture
from sepdist.data.shards import read_manifest
from sepdist.inference import scoring
from sepdist.inference.export import load_separator
from sepdist.metrics.permutation import best_permutation, reorder
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr
from sepdist.training.handoff import find_export

MAX_PEAK = 0.99  # of a stored estimate, where full scale is 1.0
open_export = lru_cache(maxsize=2)(load_separator)


class Separated:
    """The samples of `data` with the estimates of the separator `model`, a run_dir or an export.

    Each mixture is separated whole. Its estimates have the order of the sources (the permutation
    with the best mean SI-SNR) and the level of the mixture, because their own is arbitrary. A
    sample's JSON has the `si_snr` of each stored estimate in dB. On `device` cpu one thread gives
    the same bits everywhere; cuda needs `gpus_per_worker`. `noise=False` leaves the noise out of
    the mixtures, for separators trained with `data.noise=false`. ConfigError without sources.
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
        open_export.cache_clear()  # another model may lie there by now

    def identity(self) -> str:
        """Identify the audio behind the records: mixtures, weights and torch's version."""
        folder = find_export(self.model)
        weights = storage.read_bytes(storage.join(folder, "model.safetensors"))
        sha256 = hashlib.sha256(weights).hexdigest()
        return f"{self.stored.identity()}, weights {sha256}, torch {torch.__version__}"

    def records(self, split: str) -> Iterator[Mixture]:
        """Every sample; it is separated when it is loaded."""
        for record in self.stored.records(split):
            assert record.metadata is not None
            read = partial(separate, record, self.model, self.device)
            yield replace(record, load=read, metadata=partial(add_si_snr, record.metadata))


def separate(record: Mixture, model: str, device: str) -> Mapping[str, np.ndarray]:
    """The members of a record with the estimates e1, e2, ... of its sources."""
    members = record.load()
    sources, _, rest = split_members(list(members))
    waves = {name: members[name] for name in (*sources, *rest)}
    batch = collate([Item(record.id, record.speakers, waves)], range(1))
    assert batch.sources is not None
    export, place = open_export(model), torch.device(device)
    if export.sample_rate != record.sample_rate:
        has = f"the data has {record.sample_rate} Hz"
        raise ConfigError(f"corpus=separated: {model} works at {export.sample_rate} Hz, {has}")
    separator = export.model.to(place)
    with scoring.single_threaded():
        estimates_BST = scoring.separate_batch(separator, batch, place)[None]
        if estimates_BST.shape != batch.sources.shape:
            raise scoring.EvaluationError(
                f"{record.id}: {model} gives estimates {list(estimates_BST.shape[1:])} of sources "
                f"{list(batch.sources.shape[1:])}; it must have one output for each speaker"
            )
        _, order_BS = best_permutation(pairwise_si_snr(estimates_BST, batch.sources))
    mixture_T = batch.mixture[0].numpy()
    for i, wave_T in enumerate(reorder(estimates_BST, order_BS)[0].numpy(), start=1):
        waves[f"e{i}"] = audio.at_level_of(mixture_T, wave_T, MAX_PEAK)
    return waves


def add_si_snr(
    metadata: Callable[[Any], dict[str, Any]], members: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Add `si_snr` (dB, one per estimate) to the sample's metadata."""
    names, estimates, _ = split_members(list(members))
    sources_ST, estimates_ST = (
        torch.from_numpy(np.stack([members[name] for name in some]).astype(np.float64) / 2**15)
        for some in (names, estimates)
    )
    values = si_snr(estimates_ST, sources_ST).tolist()
    return metadata(members) | {"si_snr": [round(value, 4) for value in values]}
