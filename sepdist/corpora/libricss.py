"""LibriCSS (Chen et al. 2020), utterance-wise and of one channel -> Mixtures of "mix" alone, each with its transcript.

In, one of two layouts: (a) as published, after its segment_libricss.py has cut the utterances:
<condition>/<meeting>/record/utterances/utterance_<i>.wav with <meeting>/transcription/utterance_transcription.txt;
(b) what its dataprep.py makes: [monaural/]utterances/<meeting>/utterance_<i>.wav, with one utterance_transcription.txt
of all meetings, whose keys are <meeting>_utterance_<i>. Out: one Mixture per utterance, the first channel.

A meeting is overlap_ratio_<percent>_sil<a>_<b>_session<n>_actual<x>; splits are the conditions.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sepdist.audio import AudioError
from sepdist.corpora.librispeech import load
from sepdist.corpora.recipes import sample_key
from sepdist.data.records import Mixture

SPLITS = ("0L", "0S", "OV10", "OV20", "OV30", "OV40")
TRANSCRIPTS = "utterance_transcription.txt"
_MEETING = re.compile(r"overlap_ratio_(\d+)\.\d+_sil(\d+)\.\d+_[\d.]+_session(\d+)_actual[\d.]+")
_FILE = re.compile(r"utterance_(\d+)\.wav")


def parse_meeting(name: str) -> tuple[str, int] | None:
    """(condition, session) of a meeting; without overlap, 0L has silences of about 3 s and 0S of less than 1 s."""
    found = _MEETING.fullmatch(name)
    if found is None:
        return None
    return f"OV{found[1]}" if int(found[1]) else "0L" if int(found[2]) else "0S", int(found[3])


def read_transcripts(path: Path) -> dict[str, str]:
    """Key without .wav -> text, of a file of <key>TAB<text> lines; AudioError where it is missing or another file."""
    if not path.is_file():
        raise AudioError(
            f"{path}: no such transcript; LibriCSS's segment_libricss.py writes it beside the utterances"
        )
    texts: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        key, tab, text = line.partition("\t")
        if not (tab and text.strip()):
            raise AudioError(f"{path}, line {number}: {line!r} is not <utterance>TAB<text>")
        texts[key.removesuffix(".wav")] = text.strip()
    return texts


def load_mixture(path: str, sample_rate: int) -> dict[str, np.ndarray]:
    """The first channel of one utterance as "mix", float32 [T] at `sample_rate`."""
    return {"mix": load(path, sample_rate)}


class LibriCss:
    """The corpus below `root`: for_release, or a folder that dataprep.py wrote.

    A record's id is <meeting>_utterance_<i> with 'p' for '.'. Who speaks is not told: `speakers` is empty.
    """

    def __init__(self, root: str, sample_rate: int = 8000) -> None:
        self.name = "libricss"
        self.root = Path(root).expanduser()
        self.sample_rate = sample_rate

    def records(self, split: str) -> Iterator[Mixture]:
        """The utterances of a condition, by session and number."""
        if split not in SPLITS:
            raise ValueError(f"LibriCSS: no condition {split!r}, it has {', '.join(SPLITS)}")
        for meeting, folder, texts in self._meetings(split):
            numbered = {
                int(found[1]): path
                for path in folder.glob("*.wav")
                if (found := _FILE.fullmatch(path.name))
            }
            alone = sorted({path.stem for path in numbered.values()} ^ texts.keys())
            if alone or not numbered:
                lacks = "transcript" if alone and alone[0] not in texts else "audio"
                raise AudioError(
                    f"{folder}: {alone[0] if alone else meeting} has no {lacks} ({len(numbered)} files, {len(texts)} "
                    "transcripts); run segment_libricss.py again"
                )
            for _, path in sorted(numbered.items()):
                yield Mixture(
                    id=sample_key(f"{meeting}_{path.stem}"),
                    speakers=(),
                    sample_rate=self.sample_rate,
                    load=partial(load_mixture, str(path), self.sample_rate),
                    texts=(texts[path.stem],),
                )

    def _meetings(self, split: str) -> Iterator[tuple[str, Path, dict[str, str]]]:
        """(name, folder of audio, texts by file stem) of each meeting of a condition, in the order of the sessions."""
        published = (self.root / split).is_dir()
        prepared = self.root / "monaural" if (self.root / "monaural").is_dir() else self.root
        base = self.root / split if published else prepared / "utterances"
        parsed = {path: parse_meeting(path.name) for path in base.glob("*") if path.is_dir()}
        meetings = {
            facts[1]: path for path, facts in sorted(parsed.items()) if facts and facts[0] == split
        }
        if not meetings:
            raise AudioError(
                f"{base}: no meeting overlap_ratio_<r>_sil<a>_<b>_session<n>_actual<x> of condition {split}; root is "
                "the folder of 0L, 0S, OV10, ... (for_release), or what dataprep.py wrote"
            )
        merged: dict[str, str] = {}
        if not published:
            places = [
                folder / TRANSCRIPTS
                for folder in (prepared, prepared / "utterances", prepared.parent)
            ]
            merged = read_transcripts(next((path for path in places if path.is_file()), places[0]))
        for _, path in sorted(meetings.items()):
            if published:
                yield (
                    path.name,
                    path / "record" / "utterances",
                    read_transcripts(path / "transcription" / TRANSCRIPTS),
                )
            else:
                prefix = f"{path.name}_"
                own = {
                    key.removeprefix(prefix): text
                    for key, text in merged.items()
                    if key.startswith(prefix)
                }
                yield path.name, path, own
