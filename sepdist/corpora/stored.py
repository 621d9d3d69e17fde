"""The samples of a finished data set as a corpus, to cut a subset of it into a data set of its own."""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np

from sepdist.config import ConfigError
from sepdist.data.dataset import Dataset
from sepdist.data.members import split_members
from sepdist.data.records import Mixture
from sepdist.data.shards import read_index, read_manifest
from sepdist.inference.scoring import NO_LIMIT_SECONDS


class Stored:
    """A corpus whose records are the samples of the finished data set at `data`, in the order of its manifest.

    `split` only names the new data set. `noise=False` leaves the noise out, so that the mixtures are those that
    training with `data.noise=false` knows. Raises DataError where there is no finished data set, ConfigError where its
    mixtures are stored alone and noise cannot be left out.
    """

    def __init__(
        self,
        data: str,
        noise: bool = True,
        cache_dir: str = "~/.cache/sepdist",
        cache_gigabytes: float = 50.0,
    ) -> None:
        self.manifest = read_manifest(data)
        self.name, self.sample_rate = self.manifest.corpus, self.manifest.sample_rate
        if not noise and "mix" in self.manifest.members:
            raise ConfigError(
                f"corpus.noise=false: {data} has mixtures only, with whatever noise is in them"
            )
        self.place = (data, noise, cache_dir, cache_gigabytes)

    def records(self, split: str) -> Iterator[Mixture]:
        """Every sample; its audio and its texts are read when it is loaded and written."""
        samples = (
            sample for shard in self.manifest.shards for sample in read_index(self.place[0], shard)
        )
        for number, sample in enumerate(samples):
            read, tell = partial(load, *self.place, number), partial(texts, *self.place, number)
            yield Mixture(sample.key, sample.speakers, self.sample_rate, read, metadata=tell)


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


def load(
    url: str, noise: bool, cache_dir: str, cache_gigabytes: float, number: int
) -> Mapping[str, np.ndarray]:
    """The parts of sample `number`, whole."""
    return open_data(url, noise, cache_dir, cache_gigabytes).item(number, NO_LIMIT_SECONDS).members


def texts(
    url: str, noise: bool, cache_dir: str, cache_gigabytes: float, number: int, parts: Any
) -> dict[str, Any]:
    """What was said in sample `number`."""
    return {"texts": open_data(url, noise, cache_dir, cache_gigabytes).metadata(number)["texts"]}
