"""WSJ0-2mix and -3mix in two ways, neither of which writes audio.

From the published lists mix_<n>_spk_{tr,cv,tt}.txt, WSJ0 (of the wv1 channel) and the published
tables of active speech levels; mixtures are made when a record is loaded. Or from the generated
tree 2speakers/wav8k/min/{tr,cv,tt}/{s1,s2}. WSJ0 is si_tr_s/40n/40na010x.wav and so on, or the
CDs as the LDC sends them, in any folders and case: 11-1.1/WSJ0/SI_TR_S/40N/40NA010X.WV1.

Active levels (ITU-R P.56, as the original Matlab scripts measured them) are read, never estimated:
a measurement that differs by a tenth of a dB would make another test set under the same name.
"""

import glob
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from sepdist import audio
from sepdist.corpora.files import read_text, require_files, require_unique, sample_key
from sepdist.corpora.recipes import Mode, fit_lengths
from sepdist.corpora.tables import folder_rows, to_records
from sepdist.data.records import Mixture, Utterance

FULL_SCALE = 2**15
_T = TypeVar("_T")


def _parse(path: Path, expected: str, parse: Callable[[list[str]], _T]) -> list[_T]:
    """Parse each line of fields that is not empty; ValueError names the file and the line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if fields := line.split():
            try:
                rows.append(parse(fields))
            except (IndexError, ValueError) as error:
                wrong = f"expected {expected}, found {line!r} ({error})"
                raise ValueError(f"{path}, line {number}: {wrong}") from error
    return rows


def read_levels(path: Path) -> dict[str, float]:
    """Read utterance -> mean square of its active speech, from one activlev_*.txt or a folder."""

    def parse(fields: list[str]) -> tuple[str, float]:
        utterance, level = fields[0], float(fields[1])
        if not 0 < level < 1:
            raise ValueError("a mean square of speech is between 0 and 1")
        return utterance, level

    files = sorted(path.glob("[!.]*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        origin = "they are in metadata/activlev of pywsj0-mix"
        raise ValueError(f"{path}: no activlev_*.txt there; {origin}")
    return {k: v for file in files for k, v in _parse(file, "'<utterance> <level>'", parse)}


def read_list(path: Path, num_speakers: int) -> list[list[tuple[str, float]]]:
    """Read the (path, level in dB) pairs of each mixture."""

    def parse(fields: list[str]) -> list[tuple[str, float]]:
        if len(fields) != 2 * num_speakers:
            raise ValueError(f"{len(fields)} fields")
        return [(name, float(level)) for name, level in zip(fields[::2], fields[1::2], strict=True)]

    if not path.is_file():
        origin = "the lists of tr, cv and tt come with pywsj0-mix's metadata"
        raise ValueError(f"{path}: no such list; {origin}")
    return _parse(path, f"{num_speakers} x '<wav> <dB>'", parse)


def find_utterances(root: Path, names: Iterable[str]) -> dict[str, Path]:
    """Find si_tr_s/40n/40na010x.wav and so on below `root`, or among the files of CDs."""
    paths = {name: root / name.removeprefix("wsj0/") for name in names}
    if not all(path.is_file() for path in paths.values()):
        files = sorted(glob.iglob(f"{glob.escape(str(root))}/**/*.*", recursive=True), reverse=True)
        files = [file for file in files if re.search(r"\.(wav|wv1|sph|flac)$", file.lower())]
        there = {Path(file).stem.lower(): Path(file) for file in files}  # some are on two CDs
        paths = {name: there.get(Path(name).stem.lower(), path) for name, path in paths.items()}
    return paths


def speakers_in(name: str) -> tuple[str, ...]:
    """Return the speakers in the name of a mixture; 40n says 40na010x."""
    return tuple(field[:3] for field in name.split("_")[::2])


def mixture_name(clips: list[tuple[str, float]]) -> str:
    """Return the published name <utt1>_<dB1>_<utt2>_<dB2>, with eight significant digits."""
    return "_".join(f"{PurePosixPath(path).stem}_{level:.8g}" for path, level in clips)


def mix(
    files: tuple[tuple[str, float, float], ...], sample_rate: int, mode: Mode
) -> dict[str, np.ndarray]:
    """Mix sources from (path, active level, dB) each: float32 [T], exact multiples of 1 / 2^15.

    resample_poly, / sqrt(active level), x 10^(dB / 20), cut to the shortest (min) or padded to the
    longest (max), divided by max(1, peak of mixture, peaks of sources) / 0.9, rounded to 16 bits.
    The sum of the rounded sources may differ from the published rounded mixture by one step.
    """
    waves = []
    for path, active_level, decibels in files:
        wave, rate = audio.load_channel(path)
        audio.require_rate(rate, sample_rate, path)
        resampled = audio.resample_poly(wave, rate, sample_rate).astype(np.float64)
        waves.append(resampled / np.sqrt(active_level) * 10.0 ** (decibels / 20.0))
    sources_ST = np.stack(fit_lengths(waves, mode))
    peak = max(1.0, np.abs(sources_ST.sum(axis=0)).max(), np.abs(sources_ST).max())
    rounded_ST = np.round(sources_ST / (peak / 0.9) * FULL_SCALE) / FULL_SCALE
    return {f"s{i}": source for i, source in enumerate(rounded_ST.astype(np.float32), start=1)}


@dataclass(kw_only=True)
class Wsj0Mix:
    """Either `generated` (with 2speakers/ in it), or `wsj0` (with si_tr_s/), `lists` and `levels`.

    `lists` is the folder of mix_2_spk_tr.txt, `levels` the folder (or file) of activlev_*.txt.
    Splits are tr, cv and tt. Ids are published names with 'p': 40na010x_1p9857_01xo031a_-1p9857.
    """

    num_speakers: int = 2
    sample_rate: int = 8000
    mode: Mode = "min"
    wsj0: str | None = None
    lists: str | None = None
    levels: str | None = None
    generated: str | None = None

    def __post_init__(self) -> None:
        if (self.generated is None) == (self.wsj0 is None):
            raise ValueError("Wsj0Mix: give either generated, or wsj0 with lists and levels")
        if self.wsj0 is not None and (self.lists is None or self.levels is None):
            todo = "give both from pywsj0-mix's metadata; levels are never estimated"
            raise ValueError(f"Wsj0Mix: wsj0 needs lists and levels; {todo}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"Wsj0Mix: mode is min or max, not {self.mode!r}")
        self.name = f"wsj0-{self.num_speakers}mix"

    def records(self, split: str) -> Iterator[Utterance | Mixture]:
        """Yield the mixtures of a split in the order of the list, or of the generated names."""
        if self.generated is not None:
            yield from self._generated_records(Path(self.generated).expanduser(), split)
            return
        given = (self.wsj0, self.lists, self.levels)
        wsj0, lists, levels_path = (Path(one or "").expanduser() for one in given)
        list_path = lists / f"mix_{self.num_speakers}_spk_{split}.txt"
        mixtures = read_list(list_path, self.num_speakers)
        levels = read_levels(levels_path)
        require_unique(map(mixture_name, mixtures), str(list_path))
        paths = find_utterances(wsj0, (name for clips in mixtures for name, _ in clips))
        stems = {name: PurePosixPath(name).stem for name in paths}
        if unknown := [stem for stem in stems.values() if stem not in levels]:
            lacks = f"no active level of utterance {unknown[0]}"
            raise ValueError(f"{levels_path}: {lacks}, in {list_path}")
        todo = "wsj0 is the folder of si_tr_s/, or that of the CDs 11-1.1/, ..."
        require_files(paths.values(), f"{list_path} needs it; {todo}")
        for clips in mixtures:
            files = tuple((str(paths[n]), levels[stems[n]], level) for n, level in clips)
            name, read = mixture_name(clips), partial(mix, files, self.sample_rate, self.mode)
            yield Mixture(sample_key(name), speakers_in(name), self.sample_rate, read)

    def _generated_records(self, root: Path, split: str) -> Iterator[Utterance | Mixture]:
        rate = f"wav{self.sample_rate // 1000}k"
        base = root / f"{self.num_speakers}speakers" / rate / self.mode / split
        members = [*(f"s{number}" for number in range(1, self.num_speakers + 1)), "mix"]
        rows = folder_rows(base, dict(zip(members, members, strict=True)))
        named = [row._replace(speakers=speakers_in(row.name)) for row in rows]
        yield from to_records(named, base, self.sample_rate)
