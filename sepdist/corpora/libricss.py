"""LibriCSS (Chen et al. 2020), utterance-wise, first channel: mixtures with their transcripts.

Two layouts are read. As published, once its segment_libricss.py has cut the utterances:
<condition>/<meeting>/record/utterances/utterance_<i>.wav with
<meeting>/transcription/utterance_transcription.txt. As its dataprep.py writes it:
[monaural/]utterances/<meeting>/utterance_<i>.wav with one utterance_transcription.txt of all
meetings, whose keys are <meeting>_utterance_<i>.

A meeting is named overlap_ratio_<percent>_sil<a>_<b>_session<n>_actual<x>; splits are conditions.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sepdist.audio import AudioError
from sepdist.corpora.files import load, read_text, report_left_out, sample_key
from sepdist.data.records import Mixture

SPLITS = ("0L", "0S", "OV10", "OV20", "OV30", "OV40")
TRANSCRIPTS = "utterance_transcription.txt"
_MEETING = re.compile(r"overlap_ratio_(\d+)\.\d+_sil(\d+)\.\d+_[\d.]+_session(\d+)_actual[\d.]+")


def parse_meeting(name: str) -> tuple[str, int] | None:
    """Parse (condition, session); without overlap, 0L has 3 s of silence, 0S less than 1 s."""
    if not (found := _MEETING.fullmatch(name)):
        return None
    return f"OV{found[1]}" if int(found[1]) else "0L" if int(found[2]) else "0S", int(found[3])


def read_transcripts(path: Path) -> dict[str, str]:
    """Read key without .wav -> text from lines of <key>TAB<text>; AudioError names a bad line."""
    if not path.is_file():
        origin = "LibriCSS's segment_libricss.py writes it with the audio"
        raise AudioError(f"{path}: no such transcript; {origin}")
    texts: dict[str, str] = {}
    for number, line in enumerate(io.StringIO(read_text(path)), start=1):
        key, _, text = line.partition("\t")
        if not text.strip():
            raise AudioError(f"{path}, line {number}: {line!r} is not <utterance>TAB<text>")
        texts[key.removesuffix(".wav")] = text.strip()
    return texts


def load_mixture(path: str, sample_rate: int) -> dict[str, np.ndarray]:
    """Load the first channel of an utterance as "mix", float32 [T]."""
    return {"mix": load(path, sample_rate)}


@dataclass
class LibriCss:
    """The corpus below `root`: for_release, or a folder that dataprep.py wrote.

    An id is <meeting>_utterance_<i> with 'p' for '.'. The speakers are not known.
    """

    root: str
    sample_rate: int = 8000
    name = "libricss"

    def records(self, split: str) -> Iterator[Mixture]:
        """Yield the utterances of a condition by session and number."""
        if split not in SPLITS:
            raise ValueError(f"LibriCSS: no condition {split!r}, it has {', '.join(SPLITS)}")
        for meeting, folder, texts in self._meetings(split):
            files = {path.stem: path for path in folder.glob("utterance_*.wav")}
            alone = sorted(files.keys() ^ texts.keys())
            if alone or not files:
                lacks = "transcript" if alone and alone[0] in files else "audio"
                counts = f"{len(files)} files, {len(texts)} transcripts"
                wrong = f"{alone[0] if alone else meeting} has no {lacks} ({counts})"
                raise AudioError(f"{folder}: {wrong}; run segment_libricss.py again")
            for name in sorted(files, key=lambda name: int(name.removeprefix("utterance_"))):
                read = partial(load_mixture, str(files[name]), self.sample_rate)
                key = sample_key(f"{meeting}_{name}")
                yield Mixture(key, (), self.sample_rate, read, texts=(texts[name],))

    def _meetings(self, split: str) -> Iterator[tuple[str, Path, dict[str, str]]]:
        """Yield (name, folder of audio, texts by file stem) of each meeting by session."""
        root = Path(self.root).expanduser()
        published = (root / split).is_dir()
        prepared = root / "monaural" if (root / "monaural").is_dir() else root
        base = root / split if published else prepared / "utterances"
        found = sorted(path for path in base.glob("[!.]*") if path.is_dir())
        parsed = [(*(parse_meeting(path.name) or ("", 0)), path) for path in found]
        report_left_out(base, sum(not name for name, *_ in parsed), "folders that are no meeting")
        meetings = sorted((session, path) for name, session, path in parsed if name == split)
        if not meetings:
            raise AudioError(
                f"{base}: no meeting overlap_ratio_<r>_sil<a>_<b>_session<n>_actual<x> of "
                f"condition {split}; root is the folder of 0L, 0S, ... (for_release), or what "
                "dataprep.py wrote"
            )
        merged: dict[str, str] = {}
        if not published:
            folders = (prepared, prepared / "utterances", prepared.parent)
            places = [folder / TRANSCRIPTS for folder in folders]
            merged = read_transcripts(next((path for path in places if path.is_file()), places[0]))
        for _, path in meetings:
            if published:
                texts = read_transcripts(path / "transcription" / TRANSCRIPTS)
                yield path.name, path / "record" / "utterances", texts
            else:
                start = f"{path.name}_"
                own = {k.removeprefix(start): v for k, v in merged.items() if k.startswith(start)}
                yield path.name, path, own
