"""WHAM! noise as published: wham_noise/{tr,cv,tt}/*.wav -> noise records, shaped as Utterances of speaker "noise".

In: the unpacked folder (wham.whisper.ai), or any folder of .wav and .flac files per split. Out: one record per file,
its first channel, in the order of paths; as shards they serve objectives that add noise of their own.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sepdist import audio
from sepdist.corpora.recipes import sample_key, unique
from sepdist.data.records import Utterance


def load(path: str, sample_rate: int) -> np.ndarray:
    """One noise, float32 [T] at `sample_rate`, resampled as the LibriMix recipe does."""
    wave, rate = audio.load_channel(path)
    audio.require_rate(rate, sample_rate, path)
    return np.clip(audio.resample_poly(wave, rate, sample_rate), -1.0, 1.0)


class Wham:
    """The noises below `root`; a split is the name of any of its folders.

    A record's id is the path below the split without its suffix, '-' for '/', 'p' for '.' (`mixing.sample_key`).
    """

    def __init__(self, root: str, sample_rate: int = 8000) -> None:
        self.name = "wham"
        self.root = Path(root).expanduser()
        self.sample_rate = sample_rate

    def records(self, split: str) -> Iterator[Utterance]:
        """The noises of a split, in the order of their paths."""
        folder = self.root / split
        paths = audio.find_files(folder)
        keys = [
            sample_key("-".join(path.relative_to(folder).with_suffix("").parts)) for path in paths
        ]
        unique(keys, str(folder))
        for key, path in zip(keys, paths, strict=True):
            yield Utterance(
                id=key,
                speaker="noise",
                sample_rate=self.sample_rate,
                load=partial(load, str(path), self.sample_rate),
            )
