"""A finished data set as a corpus, to write a subset of it as a data set of its own."""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np

from sepdist.config import ConfigError
from sepdist.data.dataset import Dataset
from sepdist.data.members import split_members
from sepdist.data.records import Mixture
from sepdist.data.shards import read_index, read_manifest

WHOLE_SECONDS = 1e6  # longer than any sample
open_data = lru_cache(maxsize=4)(Dataset)  # records of a data set share one


class Stored:
    """The samples of the finished data set at `data`, in the order of its manifest.

    `noise=False` leaves the noise out, as `data.noise=false` does; ConfigError for stored mixtures.
    """

    def __init__(
        self,
        data: str,
        noise: bool = True,
        cache_dir: str = "~/.cache/sepdist",
        cache_gigabytes: float = 50.0,
    ) -> None:
        self.url, self.manifest = data, read_manifest(data)
        open_data.cache_clear()  # another data set may lie there by now
        self.name, self.sample_rate = self.manifest.corpus, self.manifest.sample_rate
        if not noise and "mix" in self.manifest.members:
            has = "mixtures as they are (mix), with whatever noise is in them"
            raise ConfigError(f"corpus.noise=false: {data} has {has}")
        sources, _, others = split_members(self.manifest.members)
        self.options = {"url": data, "num_sources": len(sources) or 1}
        self.options |= {"noise": noise and "noise" in others}
        self.options |= {"cache_dir": cache_dir, "cache_gigabytes": cache_gigabytes}

    def identity(self) -> str:
        """Identify the audio behind the records."""
        return self.manifest.digest()

    def records(self, split: str) -> Iterator[Mixture]:
        """Yield every sample, its audio and texts to be read later; `split` has no effect."""
        indexes = (read_index(self.url, shard) for shard in self.manifest.shards)
        for number, sample in enumerate(chain.from_iterable(indexes)):
            yield Mixture(
                id=sample.key,
                speakers=sample.speakers,
                sample_rate=self.sample_rate,
                load=partial(load, self.options, number),
                metadata=partial(texts, self.options, number),
                may_be_silent=True,
            )


def load(options: Mapping[str, Any], number: int) -> Mapping[str, np.ndarray]:
    """Read the members of a sample, whole."""
    return open_data(**options).item(number, WHOLE_SECONDS).members


def texts(options: Mapping[str, Any], number: int, members: Any) -> dict[str, Any]:
    """Read the transcripts of a sample."""
    return {"texts": open_data(**options).metadata(number)["texts"]}
