"""A finished data set as a corpus, to write a subset of it as a data set of its own."""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np

from sepdist.config import ConfigError
from sepdist.data.dataset import Dataset
from sepdist.data.members import split_members
from sepdist.data.records import Mixture
from sepdist.data.shards import read_index, read_manifest

WHOLE_SECONDS = 1e6  # longer than any sample


class Stored:
    """The samples of the finished data set at `data`, in the order of its manifest.

    `noise=False` leaves the noise out, as training with `data.noise=false` does.

    Raises:
        DataError: there is no finished data set.
        ConfigError: the noise cannot be left out, because only mixtures are stored.
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
        self.source = (data, noise, cache_dir, cache_gigabytes)

    def records(self, split: str) -> Iterator[Mixture]:
        """Yield every sample, its audio and texts to be read later; `split` has no effect."""
        shards = self.manifest.shards
        samples = (one for shard in shards for one in read_index(self.source[0], shard))
        for number, sample in enumerate(samples):
            yield Mixture(
                id=sample.key,
                speakers=sample.speakers,
                sample_rate=self.sample_rate,
                load=partial(load, self.source, number),
                metadata=partial(texts, self.source, number),
            )


@lru_cache(maxsize=4)
def open_data(url: str, noise: bool, cache_dir: str, cache_gigabytes: float) -> Dataset:
    """Open a data set with all its members, the noise only if wanted; once per process."""
    members = read_manifest(url).members
    return Dataset(
        url,
        num_sources=len(split_members(members)[0]) or 1,
        noise=noise and "noise" in members,
        cache_dir=cache_dir,
        cache_gigabytes=cache_gigabytes,
    )


def load(source: tuple[Any, ...], number: int) -> Mapping[str, np.ndarray]:
    """Read the members of a sample, whole."""
    return open_data(*source).item(number, WHOLE_SECONDS).members


def texts(source: tuple[Any, ...], number: int, members: Any) -> dict[str, Any]:
    """Read the transcripts of a sample."""
    return {"texts": open_data(*source).metadata(number)["texts"]}
