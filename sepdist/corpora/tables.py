"""Mixtures or utterances whose files somebody has listed: in folders, CSV files or Kaldi's lists.

Each layout gives rows of names and paths, which `to_records` makes records. What is listed is only
ever opened as audio, never executed.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from sepdist import audio
from sepdist.corpora import files
from sepdist.data.records import Mixture, Utterance

logger = logging.getLogger(__name__)
NUM_PROBED = 5  # mixtures that tell whether all are the sums of their members
# SpeechBrain's s1_wav, LibriMix's source_1_path, ESPnet's spk1.scp, Asteroid's s1.json.
MEMBER = re.compile(
    r"(?:(?P<mix>mix|mixture|noisy)|(?P<noise>noise1?)|(?:s|source_?|spk(?=\d+\.))(?P<number>\d+))"
    r"(?:_wav|_path|_file)?(?:\.scp|\.json)?",
    re.IGNORECASE,
)
ALONE = ("wav", "path", "audio", "file")  # columns of single utterances
IDS = ("id", "mixture_id", "utt_id", "utterance_id")
SPEAKERS = ("speaker", "spk_id", "speaker_id", "client_id", "utt2spk")
UNREAD = re.compile(r".*\||\|.*|-?|.*\.ark(:\d+)?(\[.*\])?")  # of Kaldi: commands, archives


class Row(NamedTuple):
    """A mixture, or an utterance where `paths` has s1 alone; what is not known is empty."""

    name: str
    paths: dict[str, Path]  # of mix, s1, s2, ..., noise
    speakers: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


def choose(names: Iterable[str], given: Mapping[str, str] | None, where: Path) -> dict[str, str]:
    """Choose the folder, column or list of each member, by its name if none are given."""
    names, found = sorted(names), dict(given or {})
    for name, match in ((name, MEMBER.fullmatch(name)) for name in names if not given):
        if match:
            member = f"s{int(match['number'])}" if match["number"] else match.lastgroup or ""
            if found.setdefault(member, name) != name:
                both = f"{found[member]} and {name} are both {member} by their names"
                raise ValueError(f"{where}: {both}; choose with corpus.members")
    if "wav.scp" in names and not given:
        found.setdefault("mix" if found else "s1", "wav.scp")
    for name in names if not found else ():
        found |= {"s1": name} if name.lower() in ALONE else {}
    count = sum(member[0] == "s" for member in found)
    order = ["mix", *(f"s{number}" for number in range(1, count + 1)), "noise"]
    if not found or found.keys() - set(order) or set(found.values()) - set(names):
        wants = "corpus.members names them for mix, s1, s2, ... without a gap, and noise"
        raise ValueError(f"{where}: members {found} of {', '.join(names[:20]) or 'none'}: {wants}")
    return {member: found[member] for member in order if member in found}


def folder_rows(base: Path, members: Mapping[str, str]) -> list[Row]:
    """Rows of equal names in the members' folders below `base`; that of "mix" may be missing.

    A name is the path below the folder without suffix.
    """
    found = dict[str, dict[str, Path]]()
    for member, folder in members.items():
        there = (base / folder).is_dir() or member != "mix"
        paths = audio.find_files(base / folder) if there else []
        names = [str(p.relative_to(base / folder)).removesuffix(p.suffix) for p in paths]
        files.require_unique(names, str(base / folder))
        found[member] = dict(zip(names, paths, strict=True))
    suffixes = {name: path.suffix for of in found.values() for name, path in of.items()}
    rows = []
    for name in sorted(suffixes, key=lambda name: Path(name + suffixes[name])):
        wanted = {m: base / folder / f"{name}{suffixes[name]}" for m, folder in members.items()}
        rows.append(Row(name, {m: found[m].get(name, path) for m, path in wanted.items()}))
    return rows


def read_lists(folder: Path, given: Mapping[str, str] | None) -> list[dict[str, str]]:
    """Read Kaldi's lists <name> <path>, and Asteroid's in JSON, as lines of one table."""
    lists = dict[str, dict[str, str]]()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; check corpus.table and the split")
    if (folder / "segments").exists():
        raise ValueError(f"{folder / 'segments'}: lists parts of files; cut them into files before")
    kinds = ("*.scp", "*.json", "utt2spk", "text", "text_spk*")
    for path in sorted(path for kind in kinds for path in folder.glob(kind)):
        text = files.read_text(path)
        try:
            entries = [str(one[0]) for one in json.loads(text)] if path.suffix == ".json" else []
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"{path}: is no list of [path, length] ({error!r})") from error
        lines = [[Path(one).stem, one] for one in entries]
        lines = lines or [one.split(maxsplit=1) for one in text.split("\n") if one.strip()]
        files.require_unique((one[0] for one in lines), str(path))
        lists[path.name] = {name: " ".join(rest) for name, *rest in lines}
    known = [one for one in lists if one == "wav.scp" or MEMBER.fullmatch(one)]
    known = [*(given or {}).values()] or known or [*lists]  # not cmvn.scp, which lists speakers
    names = dict.fromkeys(key for one in known for key in lists.get(one, ()))
    return [{"id": key} | {name: of.get(key, "") for name, of in lists.items()} for key in names]


def to_records(
    rows: Sequence[Row], where: Path, sample_rate: int, mixture: str = "sum", exactly: bool = True
) -> Iterator[Utterance | Mixture]:
    """Yield the record of each row, all with the same members.

    `mixture` says what becomes of the files of "mix": with `sum` each must be the sum of its
    members, and may be missing; with `own` it is one of them. Without `exactly`, higher rates are
    resampled. A source whose speaker is not known counts as a speaker of its own.
    """
    keys = [files.sample_key(row.name) for row in rows]
    files.require_unique(keys, str(where))
    needed = [p for row in rows for m, p in row.paths.items() if m != "mix" or mixture == "own"]
    advice = f"{where} lists it or has others of its mixture; complete it, or check root"
    files.require_files(needed, advice)
    # Defaults are not given, so that data sets of older versions are known to be of these inputs.
    kind = ({"own": True} if mixture == "own" else {}) | ({} if exactly else {"exactly": False})
    for key, row in zip(keys, rows, strict=True):
        paths = {member: path for member, path in row.paths.items() if member != "mix"}
        sources = [member for member in paths if member != "noise"]
        speakers = tuple(map(files.printable, row.speakers)) or tuple(f"{key}-{m}" for m in sources)
        if row.paths.keys() == {"s1"}:
            one = partial(files.load, str(paths["s1"]), sample_rate, exactly=exactly)
            yield Utterance(key, speakers[0], sample_rate, one, "".join(row.texts))
        else:
            read = partial(files.load_generated, paths, sample_rate, row.paths.get("mix"), **kind)
            yield Mixture(key, speakers, sample_rate, read, row.texts, may_be_silent=True)


def settle(rows: Sequence[Row]) -> tuple[Sequence[Row], str]:
    """Decide what mixture=auto is, by the first mixtures; leave out noise that is not in them."""
    fits = list[tuple[bool, bool]]()  # whether mix is the sum of all, and of the sources
    for row in rows if rows and "mix" in rows[0].paths else ():
        with contextlib.suppress(audio.AudioError):  # a bad record is reported with the others
            waves, _ = files.read_members(row.paths)
            mix, clean = waves.pop("mix"), [wave for m, wave in waves.items() if m != "noise"]
            fits.append((not files.off_sum(mix, waves.values()), not files.off_sum(mix, clean)))
        if len(fits) == NUM_PROBED:
            break
    if not fits:  # a mix that is listed and nowhere there is not taken for their sum
        return rows, "own" if rows and "mix" in rows[0].paths else "sum"
    whole, spoken = (all(one) for one in zip(*fits, strict=True))
    if whole or not spoken:
        return rows, "sum" if whole else "own"
    files.report_left_out(rows[0].paths["noise"].parent, len(rows), "noises, no part of the mix")
    without = [{m: path for m, path in row.paths.items() if m != "noise"} for row in rows]
    return [row._replace(paths=paths) for row, paths in zip(rows, without, strict=True)], "sum"


@dataclass(kw_only=True)
class Table:
    """Mixtures or utterances from `layout` folder, csv or scp; see the configs of these names.

    `root` is the folder of the splits, or where the paths of a `table` start; `members` are the
    folders, columns or lists of mix, s1, s2, ..., noise. `mixture` is as in `to_records`, or "auto"
    (`settle`). Without a `sample_rate` all files have the first's.
    """

    layout: Literal["folder", "csv", "scp"]
    root: str | None = None
    table: str | None = None
    members: Mapping[str, str] | None = None
    speaker: str | Sequence[str] | None = None
    mixture: Literal["auto", "sum", "own"] = "auto"
    sample_rate: int | None = None
    name: str = "table"

    def __post_init__(self) -> None:
        if self.mixture not in ("auto", "sum", "own"):
            raise ValueError(f"corpus.mixture={self.mixture}: give auto, sum or own")
        self.exactly = self.sample_rate is None
        self.source = Path(self.table or self.root or "").expanduser()
        self.base = Path(self.root or self.source.parent).expanduser()

    def records(self, split: str) -> Iterator[Utterance | Mixture]:
        """Yield what is listed, in its order; the split "all" is the folder of splits itself."""
        within = self.source / split
        where = within if within.is_dir() or split != "all" else self.source
        if self.layout == "folder":
            rows = self._folder_rows(where)
        elif self.layout == "scp":
            rows = self._listed_rows(read_lists(where, self.members), where)
        else:
            rows = self._listed_rows(files.read_rows(self.source), where := self.source)
        for path in ([*row.paths.values()][-1] for row in rows if self.exactly):  # mix may lack
            with contextlib.suppress(audio.AudioError):
                self.sample_rate = audio.load_channel(path, may_be_silent=True)[1]
                break
        settled, mixture = settle(rows) if self.mixture == "auto" else (rows, self.mixture)
        if mixture == "own" and any("mix" not in row.paths for row in settled):
            raise ValueError(f"{where}: mixture=own needs the member mix")
        if self.speaker is not None:
            settled = [r._replace(speakers=r.speakers or self._speakers(r)) for r in settled]
        if unknown := sum(not row.speakers and "s1" in row.paths for row in settled):
            todo = "each source counts as a speaker of its own; corpus.speaker tells who speaks"
            logger.warning("%s: no speaker is named for %d records: %s", where, unknown, todo)
        yield from to_records(settled, where, self.sample_rate or 0, mixture, self.exactly)

    def _folder_rows(self, base: Path) -> list[Row]:
        folders = [path.name for path in base.glob("[!.]*/")]
        known = [match for match in map(MEMBER.fullmatch, folders) if match]
        mixed = any(match["mix"] or int(match["number"] or 0) == 1 for match in known)
        if (self.members or {"s1": "" if mixed else "."}) == {"s1": "."}:  # a tree of utterances
            rows = folder_rows(base, {"s1": "."})
            folder = {row.name: Path(row.name).parts[-2:-1] for row in rows if not self.speaker}
            return [row._replace(speakers=folder.get(row.name, ())) for row in rows]
        members = choose([*folders, *(self.members or {}).values()], self.members, base)
        unused = sorted(set(folders) - {folder.split("/")[0] for folder in members.values()})
        files.report_left_out(base, len(unused), f"folders: {', '.join(unused)}")
        return folder_rows(base, members)

    def _listed_rows(self, lines: list[dict[str, str]], where: Path) -> list[Row]:
        columns = {name.lower(): name for name in (lines[0] if lines else {}) if name}
        if "source_1_gain" in columns:
            todo = f"corpus=librimix corpus.metadata={where.parent} mixes them"
            raise ValueError(f"{where}: lists what is to be mixed, with gains; {todo}")
        members = choose(columns.values(), self.members, where)
        sources = [member for member in members if member[0] == "s"]
        known = [columns[one] for one in SPEAKERS if one in columns][:1]
        named = self.speaker or known or [f"{source}_speaker" for source in sources]
        people = [named] if isinstance(named, str) else list(named)
        people = people if set(people) <= set(columns.values()) else []
        schemes = [["text"]] * (sources == ["s1"])  # of transcripts
        schemes += [[f"{s}_text" for s in sources], [f"text_spk{s[1:]}" for s in sources]]
        texts = next((one for one in schemes if one and columns.keys() >= {*one}), [])
        name, rows = next((columns[one] for one in IDS if one in columns), ""), list[Row]()
        for number, line in enumerate(lines, start=2):
            place = f"{where}, {line.get(name) or f'line {number}'}"
            if empty := [c for c in (*members.values(), *people) if not line.get(c)]:
                raise ValueError(f"{place}: has no {empty[0]}")
            paths = {m: self._path(line[column], place) for m, column in members.items()}
            own = line.get(name) or self._relative(next(iter(paths.values())).with_suffix(""))
            who = [line[column] for column in people]
            who = who[0].split("_") if len(who) == 1 < len(sources) else who  # as in ESPnet's
            said = tuple(line[columns[column]] or "" for column in texts)
            rows.append(Row(own, paths, tuple(who) if len(who) == len(sources) else (), said))
        return rows

    def _path(self, cell: str, where: str) -> Path:
        """Return the path in a table; ValueError for what is a command or an archive."""
        if UNREAD.fullmatch(cell.strip()):
            todo = "a command or an archive; nothing listed is run, write the audio to files"
            raise ValueError(f"{where}: {cell!r} is no file, but {todo}")
        return self.base / re.sub(r"^\$\{?\w+\}?/*", "", cell.strip())

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.base) if path.is_relative_to(self.base) else path)

    def _speakers(self, row: Row) -> tuple[str, ...]:
        """Return the speakers of sources by their paths; ValueError if the pattern is not there."""
        paths = [path for member, path in row.paths.items() if member[0] == "s"]
        pattern = r"([^/]*)/[^/]*$" if self.speaker == "folder" else str(self.speaker)
        try:
            found = [re.search(pattern, self._relative(path)) for path in paths]
        except re.error as error:
            raise ValueError(f"corpus.speaker={self.speaker}: no pattern ({error})") from error
        groups = [one.groups() for one in found if one and all(one.groups())]
        if len(groups) < len(paths) or any(len(one) not in (1, len(paths)) for one in groups):
            wants = "give folder, a column, or a pattern with a group, or one for each source"
            raise ValueError(f"{paths[0]}: corpus.speaker={self.speaker} names no speaker; {wants}")
        return tuple(one[min(number, len(one) - 1)] for number, one in enumerate(groups))
