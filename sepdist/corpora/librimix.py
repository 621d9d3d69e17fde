"""LibriMix (Libri1Mix, Libri2Mix, Libri3Mix) in three ways, none of which writes audio.

From LibriMix's metadata CSVs with LibriSpeech and WHAM! noise, mixed when a record is loaded, so no
generated copy (17 to 470 GB) is needed. From the folders that LibriMix's own script generated. Or
by `draw`: new mixtures by LibriMix's rules from any tree like LibriSpeech's and any noise folders.

"Libri1Mix" is mix_single of Libri2Mix: s1 and noise, in min mode as long as the PAIR.
"""

import csv
import hashlib
import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath

import numpy as np

from sepdist import audio, storage
from sepdist.corpora import files
from sepdist.corpora.librispeech import speaker_of, transcripts, utterance_paths
from sepdist.corpora.recipes import Clip, Mode, Recipe, choose, level, render
from sepdist.corpora.tables import Row, to_records
from sepdist.data.records import Mixture, Utterance
from sepdist.seeding import rng

# LibriMix's pairing of LibriSpeech's splits with WHAM!'s, by prefix.
NOISE_SPLITS = {"train": "tr", "dev": "cv", "test": "tt"}


def write_recipes(path: Path, recipes: Sequence[Recipe]) -> None:
    """Write LibriMix's metadata CSV, gains to the last bit; FileExistsError if another is there."""
    names = [f"source_{number}" for number in range(1, len(recipes[0].sources) + 1)]
    names += ["noise"] if recipes[0].noise else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["mixture_ID", *(f"{name}_{x}" for name in names for x in ("path", "gain"))])
    for recipe in recipes:
        clips = [*recipe.sources, recipe.noise] if recipe.noise else recipe.sources
        writer.writerow([recipe.id, *itertools.chain.from_iterable(clips)])
    content = text.getvalue().encode()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.put_bytes(str(path), content)
    elif path.read_bytes() != content:
        todo = "remove it, or give another metadata_out or seed"
        raise FileExistsError(f"{path} holds other mixtures: {todo}")


def read_recipes(path: Path, num_sources: int) -> list[Recipe]:
    """Read a LibriMix metadata CSV; ValueError names the file and line of a fault."""
    if not path.is_file():
        tables = sorted(one.name for one in path.parent.glob("libri*mix_*.csv"))
        there = ", ".join(name for name in tables if "_info" not in name) or "no libri*mix_*.csv"
        raise ValueError(f"{path}: no such metadata; {path.parent} has {there}")
    recipes = []
    for line, row in enumerate(files.read_rows(path), start=2):
        names = [f"source_{number}" for number in range(1, num_sources + 1)]
        names += ["noise"] if row.get("noise_path") else []
        try:
            clips = [Clip(row[f"{name}_path"], float(row[f"{name}_gain"])) for name in names]
            noise = clips[num_sources] if len(clips) > num_sources else None
            recipes.append(Recipe(row["mixture_ID"], tuple(clips[:num_sources]), noise))
        except (KeyError, TypeError, ValueError) as error:
            wrong = f"not a row of libri{num_sources}mix metadata ({error!r})"
            columns = "mixture_ID, source_<i>_path, source_<i>_gain, noise_path, noise_gain"
            raise ValueError(f"{path}, line {line}: {wrong}; its columns are {columns}") from error
    files.require_unique((recipe.id for recipe in recipes), str(path))
    return recipes


def speaker_place(speaker: str) -> float:
    """Hash a speaker's id to [0, 1), independent of the other speakers of the corpus."""
    return int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:4]) / 2**32


def _segment(
    load: Callable[[], dict[str, np.ndarray]], size: int, name: str, seed: int
) -> dict[str, np.ndarray]:
    """Keep `size` samples of all members, at one place."""
    members = load()
    start = int(rng(seed, "librimix segment", name).integers(len(members["s1"]) - size + 1))
    return {key: wave_T[start : start + size].copy() for key, wave_T in members.items()}


@dataclass(kw_only=True)
class LibriMix:
    """One of `metadata` (a folder of CSVs), `generated` (it holds wav8k/) and `draw`.

    `metadata` and `draw` need `speech_root` (the CSV's paths start there: LibriSpeech's folder)
    and, with `noise`, `noise_root` (wham_noise). Splits are those of the CSVs, folders or tree:
    train-clean-100, train-100 or train.

    `draw` makes `num_mixtures` from `seed` with utterances of at least `min_seconds` (LibriMix: 3).
    Their noise comes from `noise_split` (None: the split's own name, else tr, cv, tt for train*,
    dev*, test*). Only speakers whose `speaker_place` is in `speakers`, [from, to), are used, so
    that two data sets of a split can have different ones; `even` takes every utterance as often as
    another, give or take two, instead of every speaker. CSVs are written to `metadata_out` if
    given. Of each mixture in min mode only `segment_seconds` are kept, at a place drawn by its id.
    """

    num_speakers: int = 2
    sample_rate: int = 8000
    mode: Mode = "min"
    noise: bool = True
    speech_root: str | None = None
    noise_root: str | None = None
    metadata: str | None = None
    generated: str | None = None
    draw: bool = False
    num_mixtures: int = 0
    seed: int = 0
    noise_split: str | None = None
    min_seconds: float = 3.0
    speakers: Sequence[float] = (0.0, 1.0)
    even: bool = False
    segment_seconds: float | None = None
    metadata_out: str | None = None

    def __post_init__(self) -> None:
        ways = [name for name in ("metadata", "generated", "draw") if getattr(self, name)]
        if len(ways) != 1:
            one = "exactly one of metadata, generated and draw"
            raise ValueError(f"LibriMix: give {one}, not {ways or 'none'}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"LibriMix: mode is min or max, not {self.mode!r}")
        if not 1 <= self.num_speakers <= 3:
            raise ValueError(f"LibriMix: num_speakers is 1, 2 or 3, not {self.num_speakers}")
        no_noise = self.noise and self.noise_root is None
        if not self.generated and (self.speech_root is None or no_noise):
            needs = "speech_root, and noise_root unless noise=false"
            raise ValueError(f"LibriMix: {ways[0]} needs {needs}")
        if self.draw and self.num_mixtures < 1:
            raise ValueError("LibriMix: draw needs num_mixtures, at least 1")
        if len(self.speakers) != 2 or not 0 <= self.speakers[0] < self.speakers[1] <= 1:
            needs = "[from, to) with 0 <= from < to <= 1"
            raise ValueError(f"LibriMix: speakers is {needs}, not {list(self.speakers)}")
        shortest = self.min_seconds if self.draw and self.mode == "min" else 0.0
        if self.segment_seconds is not None and not 0 < self.segment_seconds <= shortest:
            needs = "draw, mode=min and min_seconds of at least as much"
            raise ValueError(f"LibriMix: segment_seconds={self.segment_seconds} needs {needs}")
        self.name = f"libri{self.num_speakers}mix"
        self.speech = Path(self.speech_root or "").expanduser()
        self.noises = Path(self.noise_root or "").expanduser() if self.noise else None

    def records(self, split: str) -> Iterator[Utterance | Mixture]:
        """Yield the mixtures of a split in the order of the metadata or of the draw."""
        if self.generated:
            yield from self._generated_records(Path(self.generated).expanduser(), split)
            return
        recipes = self.recipes(split)
        clips = [self.speech / clip.path for recipe in recipes for clip in recipe.sources]
        if self.noises is not None:
            clips += [self.noises / recipe.noise.path for recipe in recipes if recipe.noise]
        advice = "LibriMix's augment_train_noise.py makes the noises ending in sp08 and sp12"
        files.require_files(clips, f"check speech_root and noise_root; {advice}")
        texts = cache(transcripts)
        options = (self.speech, self.noises, self.sample_rate, self.mode, self.num_speakers)
        for recipe in recipes:
            paths = [self.speech / clip.path for clip in recipe.sources[: self.num_speakers]]
            said = tuple(texts(path.parent).get(path.stem, "") for path in paths)
            names, read = tuple(map(speaker_of, paths)), partial(render, recipe, *options)
            if self.segment_seconds is not None:
                size = round(self.segment_seconds * self.sample_rate)
                read, said = partial(_segment, read, size, recipe.id, self.seed), ()
            yield Mixture(files.sample_key(recipe.id), names, self.sample_rate, read, said)

    def recipes(self, split: str) -> list[Recipe]:
        """Read the recipes of a split from `metadata`, or draw them and fill `metadata_out`."""
        num_mixed = max(2, self.num_speakers)  # Libri1Mix is made from pairs
        file_name = f"libri{num_mixed}mix_{split}.csv"
        if self.metadata:
            return read_recipes(Path(self.metadata).expanduser() / file_name, num_mixed)
        speakers: dict[str, list[Path]] = defaultdict(list)
        for path in utterance_paths(self.speech, split):
            chosen = self.speakers[0] <= speaker_place(speaker_of(path)) < self.speakers[1]
            if chosen and audio.duration_seconds(path) >= self.min_seconds:
                speakers[speaker_of(path)].append(path)
        noises: list[Path] = []
        if self.noises is not None:
            noises = audio.find_files(self.noises / self._noise_split(self.noises, split))
        which = (self.num_mixtures, num_mixed, self.seed, split, self.even)
        choices = choose(speakers, noises, *which)
        recipes = level(choices, self.speech, self.noises)
        if self.metadata_out:
            write_recipes(Path(self.metadata_out).expanduser() / file_name, recipes)
        return recipes

    def _noise_split(self, root: Path, split: str) -> str:
        own = split if (root / split).is_dir() else None
        paired = [name for prefix, name in NOISE_SPLITS.items() if split.startswith(prefix)]
        if found := [one for one in (self.noise_split, own, *paired) if one is not None]:
            return found[0]
        raise ValueError(f"LibriMix: no noise split goes with {split!r} by name; give noise_split")

    def _generated_records(self, root: Path, split: str) -> Iterator[Utterance | Mixture]:
        base = root / f"wav{self.sample_rate // 1000}k" / self.mode
        kinds = ["mix_single", "mix_both"] if self.num_speakers == 1 else ["mix_both"]
        kinds += [] if self.noise else ["mix_clean"]
        tables = [base / "metadata" / f"mixture_{split}_{kind}.csv" for kind in kinds]
        table = next((path for path in tables if path.is_file()), None)
        if table is None:
            todo = "check the root, sample_rate, mode and split (its generated name, such as "
            todo += "train-100); where only mix_clean was generated, set noise=false"
            raise ValueError(f"none of {', '.join(map(str, tables))}: {todo}")
        numbers = range(1, self.num_speakers + 1)
        columns = {f"s{number}": f"source_{number}_path" for number in numbers}
        columns |= {"noise": "noise_path"} if self.noise else {}
        rows = files.read_rows(table)
        there = {path.stem for path in (base / split / "s1").glob("[!.]*.wav")}
        others = there.difference(row.get("mixture_ID") for row in rows)
        unlisted = f"mixtures that {table.name} does not list"
        files.report_left_out(base / split, len(others), unlisted)
        # The folder of their sums; without noise Libri1Mix has none.
        kind = kinds[0] if self.noise else "mix_clean" if self.num_speakers > 1 else "none"
        listed = []
        for row in rows:
            name = row.get("mixture_ID", "")
            for column in ("mixture_ID", *columns.values()):
                if not row.get(column):
                    lacks = f"mixture {name} has no {column}"
                    raise ValueError(f"{table}: {lacks}; is num_speakers right?")
            # Absolute paths of the machine that generated them; the last two names hold anywhere.
            paths = {
                member: base.joinpath(split, *PurePosixPath(row[column]).parts[-2:])
                for member, column in columns.items()
            }
            paths["mix"] = base / split / kind / paths["s1"].name
            speakers = (field.split("-")[0] for field in name.split("_")[: len(numbers)])
            listed.append(Row(name, paths, tuple(speakers)))
        yield from to_records(listed, table, self.sample_rate)
