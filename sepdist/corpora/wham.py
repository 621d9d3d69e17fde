"""WHAM! noise as published: wham_noise/{tr,cv,tt}/*.wav, as Utterances of the speaker "noise".

`root` is the unpacked folder (wham.whisper.ai), or any folder of audio files per split.
Shards of it serve objectives that add noise of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sepdist import audio
from sepdist.corpora.files import load, require_unique, sample_key
from sepdist.data.records import Utterance


@dataclass
class Wham:
    """The noises below `root`; a split is the name of any of its folders.

    An id is the path below the split without suffix, with '-' for '/' and 'p' for '.'. Noises are
    resampled as in the LibriMix recipe.
    """

    root: str
    sample_rate: int = 8000
    name = "wham"

    def records(self, split: str) -> Iterator[Utterance]:
        """Yield the noises of a split in the order of their paths."""
        folder = Path(self.root).expanduser() / split
        paths = {
            path: sample_key("-".join(path.relative_to(folder).with_suffix("").parts))
            for path in audio.find_files(folder)
        }
        require_unique(paths.values(), str(folder))
        for path, key in paths.items():
            read = partial(load, str(path), self.sample_rate, audio.resample_poly)
            yield Utterance(key, "noise", self.sample_rate, read)
