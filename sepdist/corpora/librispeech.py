"""LibriSpeech as published: <split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac.

`root` is the unpacked folder (openslr.org/12), or any tree of its shape. Transcripts come from
<speaker>-<chapter>.trans.txt, which may be missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from sepdist import audio
from sepdist.audio import AudioError
from sepdist.corpora.files import load, read_text, require_unique
from sepdist.data.records import Utterance


def utterance_paths(root: Path, split: str) -> list[Path]:
    """List the files of a split, sorted; AudioError for one outside <speaker>/<chapter>/."""
    folder = root / split
    paths = audio.find_files(folder)
    for path in paths:
        if len(path.relative_to(folder).parts) != 3:
            wrong = f"not at <speaker>/<chapter>/<file> below {folder}"
            raise AudioError(f"{path}: {wrong}; is {root} LibriSpeech's root?")
    require_unique((path.stem for path in paths), str(folder))
    return paths


def speaker_of(path: Path) -> str:
    """Return the speaker's id: the name of the folder above the chapter's."""
    return path.parts[-3]


def transcripts(folder: Path) -> dict[str, str]:
    """Read utterance id -> text of a chapter's folder; empty if it has no transcript file."""
    texts: dict[str, str] = {}
    for path in sorted(folder.glob("[!.]*.trans.txt")):
        for line in read_text(path).split("\n"):
            utterance, _, text = line.strip().partition(" ")
            texts[utterance] = text.strip()
    return texts


@dataclass
class LibriSpeech:
    """The corpus below `root`; a split is the name of any of its folders, e.g. train-clean-100."""

    root: str
    sample_rate: int = 8000
    name = "librispeech"

    def records(self, split: str) -> Iterator[Utterance]:
        """Yield the utterances of a split in the order of their paths."""
        texts = cache(transcripts)
        for path in utterance_paths(Path(self.root).expanduser(), split):
            said = texts(path.parent).get(path.stem, "")
            read = partial(load, str(path), self.sample_rate)
            yield Utterance(path.stem, speaker_of(path), self.sample_rate, read, said)
