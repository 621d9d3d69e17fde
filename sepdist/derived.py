"""Data sets made of data sets: a finished one, and possibly a separator, in; records to cut into shards again out.

    python tools/shard_data.py write corpus=stored corpus.data=data/train split=labelled 'part=[0.0,0.1]' output=...
    python tools/shard_data.py write corpus=separated corpus.data=data/train corpus.model=runs/dprnn split=dr output=...

`Stored` gives the samples as they are, so that a part of a data set becomes one of its own. `Separated` adds what a
separator makes of each mixture and how good that is: the data that estimators of the SI-SNR are trained on (paper 2,
section 4.1). Records are light; data set and model are opened once in each process that loads them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from sepdist import audio
from sepdist.config import ConfigError
from sepdist.data.members import split_members
from sepdist.data.records import Mixture
from sepdist.data.shards import read_index, read_manifest
from sepdist.data.stream import Dataset, Item, collate
from sepdist.evaluate import NO_LIMIT_SECONDS, EvaluationError, estimate, single_threaded
from sepdist.metrics.permutation import best_permutation, reorder
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr
from sepdist.training.export import load_model

PEAK = 0.99  # of a stored estimate at most, full scale 1.0

open_model = lru_cache(maxsize=2)(load_model)


class Stored:
    """A corpus whose records are the samples of the finished data set at `data`, in the order of its manifest.

    `split` only names the new data set. `noise=False` leaves the noise out, so that the mixtures are those that
    training with `data.noise=false` knows. Raises DataError where there is no finished data set, ConfigError where its
    mixtures are stored alone and noise cannot be left out.
    """

    def __init__(
        self, data: str, noise: bool = True, cache_dir: str = "~/.cache/sepdist", cache_gigabytes: float = 50.0
    ) -> None:
        self.manifest = read_manifest(data)
        self.name, self.sample_rate = self.manifest.corpus, self.manifest.sample_rate
        if not noise and "mix" in self.manifest.members:
            raise ConfigError(f"corpus.noise=false: {data} has mixtures only, with whatever noise is in them")
        self.place = (data, noise, cache_dir, cache_gigabytes)

    def records(self, split: str) -> Iterator[Mixture]:
        """Every sample; its audio and its texts are read when it is loaded and written."""
        samples = (sample for shard in self.manifest.shards for sample in read_index(self.place[0], shard))
        for number, sample in enumerate(samples):
            read, tell = partial(load, *self.place, number), partial(texts, *self.place, number)
            yield Mixture(sample.key, sample.speakers, self.sample_rate, read, measure=tell)


class Separated:
    """The samples of `data` with the estimates that the separator `model` (a run_dir or an export) makes of each.

    A mixture is separated whole. Its estimates are in the order of the sources, by the assignment with the best mean
    SI-SNR, and at the level of the mixture, because that of an estimate is arbitrary. `si_snr` in the json of a sample
    is that of each stored estimate in dB. On `device` cpu one thread gives the same bits everywhere; cuda wants
    `gpus_per_worker`. `noise=False`: the mixtures are without noise, as those that the separator was trained on with
    `data.noise=false`. Raises ConfigError where `data` has no sources.
    """

    def __init__(
        self, data: str, model: str, noise: bool = True, device: str = "cpu", cache_dir: str = "~/.cache/sepdist"
    ) -> None:
        if "s1" not in read_manifest(data).members:
            raise ConfigError(f"corpus=separated: {data} has mixtures only; without sources no SI-SNR is known")
        self.stored = Stored(data, noise, cache_dir)
        self.name, self.sample_rate = self.stored.name, self.stored.sample_rate
        self.model, self.device = model, device

    def records(self, split: str) -> Iterator[Mixture]:
        """Every sample; it is separated when it is loaded."""
        for record in self.stored.records(split):
            assert record.measure is not None
            read = partial(separate, record, self.model, self.device)
            yield replace(record, load=read, measure=partial(judge, record.measure))


@lru_cache(maxsize=4)
def open_data(url: str, noise: bool, cache_dir: str, cache_gigabytes: float) -> Dataset:
    """The data set with all that its samples have, but without the noise if so asked."""
    members = read_manifest(url).members
    return Dataset(
        url,
        num_sources=len(split_members(members)[0]) or 1,
        noise=noise and "noise" in members,
        cache_dir=cache_dir,
        cache_gigabytes=cache_gigabytes,
    )


def load(url: str, noise: bool, cache_dir: str, cache_gigabytes: float, number: int) -> Mapping[str, np.ndarray]:
    """The parts of sample `number`, whole."""
    return open_data(url, noise, cache_dir, cache_gigabytes).item(number, NO_LIMIT_SECONDS).members


def texts(url: str, noise: bool, cache_dir: str, cache_gigabytes: float, number: int, parts: Any) -> dict[str, Any]:
    """What was said in sample `number`."""
    return {"texts": open_data(url, noise, cache_dir, cache_gigabytes).facts(number)["texts"]}


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
            raise EvaluationError(f"{record.id}: {model} gives {shapes}; it must have one output for each speaker")
        order_BS = best_permutation(pairwise_si_snr(estimates_BST, batch.sources))[1]
        matched_ST = reorder(estimates_BST, order_BS)[0].numpy()
    mixture_T = batch.mixture[0].numpy()
    return waves | {f"e{i}": audio.at_level_of(mixture_T, wave, PEAK) for i, wave in enumerate(matched_ST, start=1)}


def judge(tell: Callable[[Any], dict[str, Any]], parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The SI-SNR in dB of each estimate of the `parts`, beside what `tell` says."""
    names, estimates, _ = split_members(list(parts))
    sources_ST, estimates_ST = (
        torch.from_numpy(np.stack([parts[name] for name in some]).astype(np.float64) / 2**15)
        for some in (names, estimates)
    )
    return tell(parts) | {"si_snr": [round(value, 4) for value in si_snr(estimates_ST, sources_ST).tolist()]}
