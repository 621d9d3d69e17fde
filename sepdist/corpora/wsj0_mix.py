"""WSJ0-2mix (and -3mix) -> Mixtures, in two ways, none of which writes audio.

In, one of: (a) the published lists mix_<n>_spk_{tr,cv,tt}.txt with WSJ0 as 16 kHz wav files (of the wv1 channel) and
the published tables of active speech levels; mixed when a record is loaded; (b) the generated tree
2speakers/wav8k/min/{tr,cv,tt}/{s1,s2}. Out: Mixtures with s1, s2, ...

The active level of an utterance (ITU-R P.56, as the original Matlab scripts measured it) is read from tables and never
estimated here: an implementation that differs by a tenth of a dB would make another test set under the same name.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from sepdist import audio
from sepdist.audio import AudioError
from sepdist.corpora.recipes import Mode, fit_lengths, sample_key, unique
from sepdist.data.records import Mixture

FULL_SCALE = 2**15


def read_levels(path: Path) -> dict[str, float]:
    """Utterance -> mean square of its active speech, from one activlev_*.txt or all of a folder's."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(
            f"{path}: no activlev_*.txt there; they are in metadata/activlev of pywsj0-mix"
        )
    levels: dict[str, float] = {}
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            fields = line.split()
            if not fields:
                continue
            try:
                utterance, level = fields[0], float(fields[1])
            except (IndexError, ValueError) as error:
                raise ValueError(
                    f"{file}, line {number}: expected '<utterance> <level>', found {line!r}"
                ) from error
            if not 0 < level < 1:
                raise ValueError(
                    f"{file}, line {number}: {level} is no mean square of speech, 0 < level < 1"
                )
            levels[utterance] = level
    return levels


def read_list(path: Path, num_speakers: int) -> list[list[tuple[str, float]]]:
    """Per mixture its (path, level in dB) pairs; ValueError names the file and line."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such list; splits are tr, cv and tt, the lists come with pywsj0-mix's metadata"
        )
    mixtures = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            if len(fields) != 2 * num_speakers:
                raise ValueError(f"{len(fields)} fields")
            mixtures.append([(fields[i], float(fields[i + 1])) for i in range(0, len(fields), 2)])
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected {num_speakers} x '<wav> <dB>' ({error})"
            ) from error
    return mixtures


def mixture_name(parts: list[tuple[str, float]]) -> str:
    """The published file name without suffix: <utt1>_<dB1>_<utt2>_<dB2>, numbers with eight significant digits."""
    return "_".join(f"{PurePosixPath(path).stem}_{level:.8g}" for path, level in parts)


def mix(
    files: tuple[tuple[str, float, float], ...], sample_rate: int, mode: Mode
) -> dict[str, np.ndarray]:
    """The sources of one mixture from (path, active level, dB) each: float32 [T], exact multiples of 1 / 2^15.

    resample_poly, / sqrt(active level), x 10^(dB / 20), cut to the shortest (min) or padded to the longest (max),
    divided by max(1, peak of mixture, peaks of sources) / 0.9, rounded to 16 bits. The sum of the rounded sources may
    differ from the published rounded mixture by one step.
    """
    waves = []
    for path, active_level, decibels in files:
        wave, rate = audio.load_channel(path)
        audio.require_rate(rate, sample_rate, path)
        resampled = audio.resample_poly(wave, rate, sample_rate).astype(np.float64)
        waves.append(resampled / np.sqrt(active_level) * 10.0 ** (decibels / 20.0))
    sources_ST = np.stack(fit_lengths(waves, mode))
    peak = max(
        1.0, float(np.max(np.abs(sources_ST.sum(axis=0)))), float(np.max(np.abs(sources_ST)))
    )
    rounded_ST = np.round(sources_ST / (peak / 0.9) * FULL_SCALE) / FULL_SCALE
    return {
        f"s{number}": source.astype(np.float32) for number, source in enumerate(rounded_ST, start=1)
    }


def load_generated(paths: tuple[str, ...], sample_rate: int) -> dict[str, np.ndarray]:
    """The generated sources of one mixture, float32 [T] each; unequal lengths are an AudioError."""
    sources: dict[str, np.ndarray] = {}
    for number, path in enumerate(paths, start=1):
        wave, rate = audio.load_channel(path)
        audio.require_rate(rate, sample_rate, path, exactly=True)
        sources[f"s{number}"] = wave
        if wave.size != sources["s1"].size:
            raise AudioError(
                f"{path}: {wave.size} samples where {paths[0]} has {sources['s1'].size}; generate it again"
            )
    return sources


class Wsj0Mix:
    """Either `generated` (the folder that holds 2speakers/), or `wsj0` (that holds si_tr_s/), `lists` and `levels`.

    `lists` is the folder of mix_2_spk_tr.txt, `levels` the folder (or file) of activlev_*.txt. Splits are tr, cv, tt.
    A record's id is the published name with 'p' for '.': 40na010x_1p9857_01xo031a_-1p9857.
    """

    def __init__(
        self,
        *,
        num_speakers: int = 2,
        sample_rate: int = 8000,
        mode: Mode = "min",
        wsj0: str | None = None,
        lists: str | None = None,
        levels: str | None = None,
        generated: str | None = None,
    ) -> None:
        if (generated is None) == (wsj0 is None):
            raise ValueError("Wsj0Mix: give either generated, or wsj0 with lists and levels")
        if wsj0 is not None and (lists is None or levels is None):
            raise ValueError(
                "Wsj0Mix: wsj0 needs lists (the folder of mix_2_spk_tr.txt) and levels (that of activlev_*.txt): both "
                "are in pywsj0-mix's metadata; levels are never estimated, so that the published mixtures come out"
            )
        if mode not in ("min", "max"):
            raise ValueError(f"Wsj0Mix: mode is min or max, not {mode!r}")
        self.name = f"wsj0-{num_speakers}mix"
        self.num_speakers = num_speakers
        self.sample_rate = sample_rate
        self.mode: Mode = mode
        self.wsj0 = Path(wsj0 or "").expanduser()
        self.lists = Path(lists or "").expanduser()
        self.levels = Path(levels or "").expanduser()
        self.generated = Path(generated).expanduser() if generated is not None else None

    def records(self, split: str) -> Iterator[Mixture]:
        """The mixtures of a split, in the order of the list, or of the names in the generated tree."""
        if self.generated is not None:
            yield from self._generated_records(self.generated, split)
            return
        list_path = self.lists / f"mix_{self.num_speakers}_spk_{split}.txt"
        mixtures = read_list(list_path, self.num_speakers)
        levels = read_levels(self.levels)
        unique([mixture_name(parts) for parts in mixtures], str(list_path))
        for parts in mixtures:
            files = []
            for name, decibels in parts:
                path = self.wsj0.joinpath(*PurePosixPath(name.removeprefix("wsj0/")).parts)
                if path.stem not in levels:
                    raise ValueError(
                        f"{self.levels}: no active level of utterance {path.stem}, in {list_path}"
                    )
                if not path.is_file():
                    raise AudioError(
                        f"{path}: no such file, in {list_path}; wsj0 is the folder that holds si_tr_s/"
                    )
                files.append((str(path), levels[path.stem], decibels))
            yield Mixture(
                id=sample_key(mixture_name(parts)),
                speakers=tuple(PurePosixPath(name).parts[-2] for name, _ in parts),
                sample_rate=self.sample_rate,
                load=partial(mix, tuple(files), self.sample_rate, self.mode),
            )

    def _generated_records(self, root: Path, split: str) -> Iterator[Mixture]:
        base = (
            root
            / f"{self.num_speakers}speakers"
            / f"wav{self.sample_rate // 1000}k"
            / self.mode
            / split
        )
        for first in audio.find_files(base / "s1"):
            paths = [base / f"s{number}" / first.name for number in range(1, self.num_speakers + 1)]
            for path in paths:
                if not path.is_file():
                    raise AudioError(
                        f"{path}: no such file, but {first} is there; generate the split again"
                    )
            yield Mixture(
                id=sample_key(first.stem),
                # WSJ0 utterances are named speaker (3 characters), session, text: 40na010x.
                speakers=tuple(field[:3] for field in first.stem.split("_")[::2]),
                sample_rate=self.sample_rate,
                load=partial(load_generated, tuple(map(str, paths)), self.sample_rate),
            )
