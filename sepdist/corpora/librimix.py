"""LibriMix (Libri1Mix, Libri2Mix, Libri3Mix) -> Mixtures, in three ways, none of which writes audio.

In, one of: (a) LibriMix's metadata CSVs with LibriSpeech and WHAM! noise, mixed when a record is loaded, so that no
generated copy (17 to 470 GB) is needed; (b) the folders that LibriMix's own script generated; (c) `draw`: new mixtures
by LibriMix's rules from any LibriSpeech-shaped tree and any noise folders. Out: Mixtures with s1.. and "noise".

"Libri1Mix" is mix_single of Libri2Mix: s1 and noise, in min mode as long as the PAIR.
"""

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from sepdist import audio, storage
from sepdist.audio import AudioError
from sepdist.corpora.librispeech import speaker_of, transcripts, utterance_paths
from sepdist.corpora.recipes import Mode, Part, Recipe, draw, render, sample_key, unique
from sepdist.data.records import Mixture

NOISE_SPLITS = {
    "train": "tr",
    "dev": "cv",
    "test": "tt",
}  # LibriMix's pairing of LibriSpeech with WHAM! splits


def write_recipes(path: Path, recipes: Sequence[Recipe]) -> None:
    """LibriMix's metadata CSV, gains to the last bit; a file with other content is an error, never overwritten."""
    num_sources = len(recipes[0].sources)
    header = ["mixture_ID"]
    for number in range(1, num_sources + 1):
        header += [f"source_{number}_path", f"source_{number}_gain"]
    has_noise = recipes[0].noise is not None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header + ["noise_path", "noise_gain"] * has_noise)
    for recipe in recipes:
        row = [recipe.id]
        for part in (*recipe.sources, *([recipe.noise] if recipe.noise is not None else [])):
            row += [part.path, repr(part.gain)]
        writer.writerow(row)
    content = text.getvalue().encode()
    if path.exists():
        if path.read_bytes() == content:
            return
        raise FileExistsError(
            f"{path} holds other mixtures: remove it, or give another metadata_out or seed"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.put_bytes(str(path), content)


def read_recipes(path: Path, num_sources: int) -> list[Recipe]:
    """The rows of a LibriMix metadata CSV with at least `num_sources` sources each; ValueError names file and line."""
    if not path.is_file():
        there = ", ".join(
            sorted(p.name for p in path.parent.glob("libri*mix_*.csv") if "_info" not in p.name)
        )
        raise ValueError(
            f"{path}: no such metadata; {path.parent} has {there or 'no libri*mix_*.csv'}"
        )
    recipes = []
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                sources = tuple(
                    Part(row[f"source_{number}_path"], float(row[f"source_{number}_gain"]))
                    for number in range(1, num_sources + 1)
                )
                noise = (
                    Part(row["noise_path"], float(row["noise_gain"]))
                    if row.get("noise_path")
                    else None
                )
                recipes.append(Recipe(row["mixture_ID"], sources, noise))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {line}: not a row of libri{num_sources}mix metadata ({error!r}); its columns are "
                    "mixture_ID, source_<i>_path, source_<i>_gain, noise_path, noise_gain"
                ) from error
    unique([recipe.id for recipe in recipes], str(path))
    return recipes


def speaker_place(speaker: str) -> float:
    """Where a speaker stands in [0, 1): a hash of the id, the same whoever else is in the corpus."""
    return int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:4]) / 2**32


def load_generated(paths: tuple[tuple[str, str], ...], sample_rate: int) -> dict[str, np.ndarray]:
    """The generated parts of one mixture, (member, path) each, float32 [T]; unequal lengths are an AudioError."""
    parts: dict[str, np.ndarray] = {}
    for member, path in paths:
        wave, rate = audio.load_channel(path)
        audio.require_rate(rate, sample_rate, path, exactly=True)
        parts[member] = wave
        if wave.size != parts[paths[0][0]].size:
            raise AudioError(
                f"{path}: {wave.size} samples where {paths[0][1]} has {parts[paths[0][0]].size}"
            )
    return parts


class LibriMix:
    """One of three: `metadata` (a folder of CSVs), `generated` (the folder that holds wav8k/), or `draw`.

    `metadata` and `draw` need `speech_root` (the folder that holds the CSV's paths: LibriSpeech's) and, with `noise`,
    `noise_root` (wham_noise). A split is that of the CSV, folder or tree: train-clean-100, train-100 or train. `draw`
    makes `num_mixtures` from `seed`, uses utterances of at least `min_seconds` (LibriMix: 3), noise of `noise_split`
    (None: the split's own name, else tr, cv, tt for train*, dev*, test*), only the `speakers` whose `speaker_place` is
    in [from, to), so that two data sets of a split can have disjoint ones, and writes CSVs to `metadata_out` if given.
    """

    def __init__(
        self,
        *,
        num_speakers: int = 2,
        sample_rate: int = 8000,
        mode: Mode = "min",
        noise: bool = True,
        speech_root: str | None = None,
        noise_root: str | None = None,
        metadata: str | None = None,
        generated: str | None = None,
        draw: bool = False,
        num_mixtures: int = 0,
        seed: int = 0,
        noise_split: str | None = None,
        min_seconds: float = 3.0,
        speakers: Sequence[float] = (0.0, 1.0),
        metadata_out: str | None = None,
    ) -> None:
        ways = [
            name
            for name, given in (("metadata", metadata), ("generated", generated), ("draw", draw))
            if given
        ]
        if len(ways) != 1:
            raise ValueError(
                f"LibriMix: give exactly one of metadata, generated and draw, not {ways or 'none'}"
            )
        if mode not in ("min", "max"):
            raise ValueError(f"LibriMix: mode is min or max, not {mode!r}")
        if not 1 <= num_speakers <= 3:
            raise ValueError(f"LibriMix: num_speakers is 1, 2 or 3, not {num_speakers}")
        if generated is None and (speech_root is None or (noise and noise_root is None)):
            raise ValueError(
                f"LibriMix: {ways[0]} needs speech_root, and noise_root unless noise=false"
            )
        if draw and num_mixtures < 1:
            raise ValueError("LibriMix: draw needs num_mixtures, at least 1")
        if len(speakers) != 2 or not 0 <= speakers[0] < speakers[1] <= 1:
            raise ValueError(
                f"LibriMix: speakers is [from, to) with 0 <= from < to <= 1, not {list(speakers)}"
            )
        self.name = f"libri{num_speakers}mix"
        self.sample_rate = sample_rate
        self.num_speakers = num_speakers
        self.num_mixed = max(2, num_speakers)  # Libri1Mix is made from pairs
        self.mode: Mode = mode
        self.noise = noise
        self.speech_root = Path(speech_root or "").expanduser()
        self.noise_root = (
            Path(noise_root).expanduser() if noise and noise_root is not None else None
        )
        self.metadata = Path(metadata).expanduser() if metadata else None
        self.generated = Path(generated).expanduser() if generated else None
        self.num_mixtures = num_mixtures
        self.seed = seed
        self.noise_split = noise_split
        self.min_seconds = min_seconds
        self.speakers = tuple(speakers)
        self.metadata_out = Path(metadata_out).expanduser() if metadata_out else None

    def records(self, split: str) -> Iterator[Mixture]:
        """The mixtures of a split, in the order of the metadata or of the draw."""
        if self.generated is not None:
            yield from self._generated_records(self.generated, split)
            return
        recipes = self.recipes(split)
        self._require_files(recipes)
        texts: dict[Path, dict[str, str]] = {}
        for recipe in recipes:
            spoken = []
            for part in recipe.sources[: self.num_speakers]:
                path = self.speech_root / part.path
                if path.parent not in texts:
                    texts[path.parent] = transcripts(path.parent)
                spoken.append((speaker_of(path), texts[path.parent].get(path.stem, "")))
            yield Mixture(
                id=sample_key(recipe.id),
                speakers=tuple(speaker for speaker, _ in spoken),
                sample_rate=self.sample_rate,
                load=partial(
                    render,
                    recipe,
                    str(self.speech_root),
                    None if self.noise_root is None else str(self.noise_root),
                    self.sample_rate,
                    self.mode,
                    self.num_speakers,
                ),
                texts=tuple(text for _, text in spoken),
            )

    def recipes(self, split: str) -> list[Recipe]:
        """The recipes of a split, read from `metadata` or drawn (and then written to `metadata_out` if given)."""
        file_name = f"libri{self.num_mixed}mix_{split}.csv"
        if self.metadata is not None:
            return read_recipes(self.metadata / file_name, self.num_mixed)
        speakers: dict[str, list[Path]] = defaultdict(list)
        for path in utterance_paths(self.speech_root, split):
            chosen = self.speakers[0] <= speaker_place(speaker_of(path)) < self.speakers[1]
            if chosen and audio.duration_seconds(path) >= self.min_seconds:
                speakers[speaker_of(path)].append(path)
        recipes = draw(
            speakers,
            []
            if self.noise_root is None
            else audio.find_files(self.noise_root / self._noise_split(split)),
            self.speech_root,
            self.noise_root,
            num_mixtures=self.num_mixtures,
            num_sources=self.num_mixed,
            seed=self.seed,
            split=split,
        )
        if self.metadata_out is not None:
            write_recipes(self.metadata_out / file_name, recipes)
        return recipes

    def _noise_split(self, split: str) -> str:
        assert self.noise_root is not None
        if self.noise_split is not None:
            return self.noise_split
        if (self.noise_root / split).is_dir():
            return split
        for prefix, name in NOISE_SPLITS.items():
            if split.startswith(prefix):
                return name
        raise ValueError(f"LibriMix: no noise split goes with {split!r} by name; give noise_split")

    def _require_files(self, recipes: Sequence[Recipe]) -> None:
        paths = {self.speech_root / part.path for recipe in recipes for part in recipe.sources}
        if self.noise_root is not None:
            paths |= {
                self.noise_root / recipe.noise.path
                for recipe in recipes
                if recipe.noise is not None
            }
        missing = sorted(str(path) for path in paths if not path.is_file())
        if missing:
            raise AudioError(
                f"{missing[0]}: no such file ({len(missing)} of {len(paths)} are missing); check speech_root and "
                "noise_root; LibriMix's augment_train_noise.py makes the noises ending in sp08 and sp12"
            )

    def _generated_records(self, root: Path, split: str) -> Iterator[Mixture]:
        base = root / f"wav{self.sample_rate // 1000}k" / self.mode
        kinds = ["mix_single", "mix_both"] if self.num_speakers == 1 else ["mix_both"]
        kinds += [] if self.noise else ["mix_clean"]
        tables = [base / "metadata" / f"mixture_{split}_{kind}.csv" for kind in kinds]
        table = next((path for path in tables if path.is_file()), None)
        if table is None:
            raise ValueError(
                f"none of {', '.join(map(str, tables))}: check the root, sample_rate, mode and split (its generated "
                "name, such as train-100); where only mix_clean was generated, set noise=false"
            )
        members = [f"s{number}" for number in range(1, self.num_speakers + 1)] + [
            "noise"
        ] * self.noise
        columns = [f"source_{m[1:]}_path" if m != "noise" else "noise_path" for m in members]
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        unique([row["mixture_ID"] for row in rows], str(table))
        for row in rows:
            absent = [column for column in columns if not row.get(column)]
            if absent:
                raise ValueError(
                    f"{table}: mixture {row['mixture_ID']} has no {absent[0]}; is num_speakers right?"
                )
            # The table's paths are absolute on the machine that generated it; their last two parts hold anywhere.
            files = [
                base.joinpath(split, *PurePosixPath(row[column]).parts[-2:]) for column in columns
            ]
            for path in files:
                if not path.is_file():
                    raise AudioError(
                        f"{path}: no such file, but {table} lists it; generate the split again"
                    )
            yield Mixture(
                id=sample_key(row["mixture_ID"]),
                speakers=tuple(
                    name.split("-")[0] for name in row["mixture_ID"].split("_")[: self.num_speakers]
                ),
                sample_rate=self.sample_rate,
                load=partial(
                    load_generated,
                    tuple(zip(members, map(str, files), strict=True)),
                    self.sample_rate,
                ),
            )
