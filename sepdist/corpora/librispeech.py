"""LibriSpeech as published: <split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac -> Utterances.

In: the unpacked folder (openslr.org/12), or any tree of its shape. Out: one Utterance per file, in the order of
speaker, chapter and file name, with its transcript (<speaker>-<chapter>.trans.txt) and sex (SPEAKERS.TXT).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sepdist import audio
from sepdist.audio import AudioError
from sepdist.corpora.recipes import unique
from sepdist.data.records import Utterance


def utterance_paths(root: Path, split: str) -> list[Path]:
    """Every utterance file of a split, sorted; AudioError if one lies elsewhere than <speaker>/<chapter>/."""
    folder = root / split
    paths = audio.find_files(folder)
    for path in paths:
        if len(path.relative_to(folder).parts) != 3:
            raise AudioError(
                f"{path}: not at <speaker>/<chapter>/<file> below {folder}; is {root} LibriSpeech's root?"
            )
    unique([path.stem for path in paths], str(folder))
    return paths


def speaker_of(path: Path) -> str:
    """The speaker's id: the folder above the chapter's."""
    return path.parts[-3]


def transcripts(folder: Path) -> dict[str, str]:
    """Utterance id -> text of one chapter folder; empty where the folder has no transcript file."""
    texts: dict[str, str] = {}
    for path in sorted(folder.glob("*.trans.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            utterance, _, text = line.strip().partition(" ")
            texts[utterance] = text.strip()
    return texts


def sexes(root: Path) -> dict[str, str]:
    """Speaker id -> "F" or "M" from SPEAKERS.TXT; empty where the file is missing."""
    path = root / "SPEAKERS.TXT"
    if not path.is_file():
        return {}
    rows = [
        line.split("|")
        for line in path.read_text(encoding="utf-8").splitlines()
        if not line.startswith(";")
    ]
    return {row[0].strip(): row[1].strip() for row in rows if len(row) >= 2}


def load(path: str, sample_rate: int) -> np.ndarray:
    """One utterance, float32 [T] at `sample_rate`."""
    wave, rate = audio.load_channel(path)
    audio.require_rate(rate, sample_rate, path)
    return np.clip(audio.resample(wave, rate, sample_rate), -1.0, 1.0)


class LibriSpeech:
    """The corpus below `root`; a split is the name of any of its folders, such as train-clean-100.

    Files of a higher rate are resampled to `sample_rate` by soxr; files of a lower rate are an error.
    """

    def __init__(self, root: str, sample_rate: int = 8000) -> None:
        self.name = "librispeech"
        self.root = Path(root).expanduser()
        self.sample_rate = sample_rate

    def records(self, split: str) -> Iterator[Utterance]:
        """The utterances of a split, in the order of their paths."""
        sex_of = sexes(self.root)
        chapter, texts = Path(), dict[str, str]()
        for path in utterance_paths(self.root, split):
            if path.parent != chapter:
                chapter, texts = path.parent, transcripts(path.parent)
            speaker = speaker_of(path)
            yield Utterance(
                id=path.stem,
                speaker=speaker,
                sample_rate=self.sample_rate,
                load=partial(load, str(path), self.sample_rate),
                text=texts.get(path.stem, ""),
                sex=sex_of.get(speaker, ""),
            )
