"""WebDataset tars that other people made, as a corpus; nothing that they hold is ever run.

The library's rules name samples and members: `a/b.spk1.wav` is member `spk1.wav` of sample `a/b`.
The tars are read by tarfile, as the library's reader tells no offsets, takes a tar that is cut
short for a whole one, and opens `pipe:` urls in a shell.
"""

import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sepdist import audio, storage
from sepdist.corpora import files
from sepdist.data.members import DataError, split_members
from sepdist.data.records import Mixture, Utterance

MAX_TEXT_BYTES = 2**20  # of a text or JSON member
UNKNOWN = "unknown"  # the speaker where no name is given
_RESERVED = re.compile(r"__[^/]*__($|/)")  # names of WebDataset itself
_Sample = dict[str, tuple[int, int]]  # suffix -> byte offset, size


class WebdatasetTars:
    """The samples of `tars`: paths or s3:// urls of tars, brace lists of them or folders with them.

    `members` maps ours to endings in the tars: {"s1": "spk1.wav", "s2": "spk2.wav", "mix":
    "mix.wav"}, where `mix` is left out if it is the sum; s1 alone is an utterance. `speakers` and
    `texts` say, for each source, where its name or transcript is: an ending ("cls"), a key of a
    JSON member ("json:speaker"), or a pattern in the sample's key ("key:^[^-]+"). A speaker
    without one is "unknown". An id is the sample's key, after its tar's name if tars share keys.
    """

    name = "webdataset"

    def __init__(
        self,
        tars: str | Sequence[str],
        members: Mapping[str, str],
        speakers: Sequence[str] = (),
        texts: Sequence[str] = (),
        sample_rate: int = 8000,
    ) -> None:
        self.tars = find_tars([tars] if isinstance(tars, str) else tars)
        self.members = {ours: theirs.lower() for ours, theirs in members.items()}
        self.sources, _, rest = split_members(list(self.members))
        if not {*rest} <= {"mix", "noise"} or not self.members:
            raise ValueError(f"corpus.members={dict(members)}: give s1, s2, ..., noise or mix")
        for name, given in (("speakers", speakers), ("texts", texts)):
            if given and len(given) != len(self.sources):
                counts = f"{len(given)} for {len(self.sources)} sources"
                raise ValueError(f"corpus.{name}={list(given)}: {counts}; give one for each")
        self.speakers, self.texts, self.sample_rate = speakers, texts, sample_rate
        self.fields = [*speakers, *texts]
        _fetch.cache_clear()  # another tar may lie there by now

    def records(self, split: str) -> Iterator[Utterance | Mixture]:
        """Yield all samples in the order of the tars; `split` only names the data set."""
        found = [(tar, *one) for tar in self.tars for one in self._samples(tar)]
        endings = Counter(ending for *_, sample, _ in found for ending in sample)
        wanted = {*self.members.values(), *(one.partition(":")[0] for one in self.fields)} - {"key"}
        if absent := sorted(wanted - {*endings}):
            there = ", ".join(f".{name} ({count})" for name, count in endings.most_common(20))
            raise ValueError(
                f"{self.tars[0]}, ...: no sample has a .{absent[0]}; name what is there in "
                f"corpus.members, speakers and texts: {there or 'nothing'}"
            )
        unused = sum(endings.values()) - sum(endings[one] for one in {*wanted, "json"})
        files.report_left_out(self.tars[0], unused, "files of other endings")
        nameless = sum(None in values for *_, values in found)
        files.report_left_out(self.tars[0], nameless, "names or texts that samples lack")
        shared = len({key for _, _, key, *_ in found}) < len(found)
        keys = [f"{Path(tar).stem}-{key}" if shared else key for tar, _, key, *_ in found]
        ids = [files.sample_key(key.replace("/", "-")) for key in keys]
        files.require_unique(ids, self.tars[0])
        for id_, (tar, stamp, key, sample, values) in zip(ids, found, strict=True):
            places = {ours: sample.get(theirs) for ours, theirs in self.members.items()}
            load = partial(load_sample, tar, stamp, key, places, self.sample_rate)
            count = len(self.speakers)
            speakers = tuple(one or UNKNOWN for one in values[:count] or [""] * len(self.sources))
            texts = tuple(one or "" for one in values[count:])
            if [*self.members] == ["s1"]:
                yield Utterance(id_, speakers[0], self.sample_rate, load, "".join(texts))
            else:
                yield Mixture(id_, speakers, self.sample_rate, load, texts)

    def _samples(self, tar: str) -> Iterator[tuple[str, str, _Sample, list[str | None]]]:
        """Yield the tar's stamp, and of each sample the key, places, and names and texts."""
        file, stamp = open_tar(tar)
        with file:
            for key, sample in index_tar(tar, file).items():
                yield stamp, key, sample, [look_up(file, key, sample, one) for one in self.fields]


def find_tars(given: Sequence[str]) -> list[str]:
    """Expand brace lists and folders; ValueError for what is no local or s3:// tar."""
    from braceexpand import braceexpand  # of webdataset

    found = list[str]()
    for one in (place for text in given for place in braceexpand(text)):
        if re.match(r"[a-z]+:(?!//)", one):
            raise ValueError(f"{one}: no such url is opened, no program run; give a path or s3://")
        url = storage.absolute(one)
        if url.endswith(".tar"):
            found.append(url)
            continue
        names = [name for name in storage.list_names(url) if name.endswith(".tar")]
        if not names:
            raise ValueError(f"{one}: no .tar, and no folder of .tar files; check corpus.tars")
        found += [storage.join(url, name) for name in names]
    files.require_unique(found, "corpus.tars")
    return found


def index_tar(tar: str, file: BinaryIO) -> dict[str, _Sample]:
    """Find all members of a tar by the key of their sample; DataError if it is cut or compressed.

    Folders, links and the names that WebDataset reserves or cannot split are left out.
    """
    from webdataset.tariterators import base_plus_ext

    samples, unused, size, end = dict[str, _Sample](), 0, os.fstat(file.fileno()).st_size, 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for one in archive:
                end = one.offset_data + (one.size if one.isreg() else 0)
                key, ending = base_plus_ext(one.name.removeprefix("./"))
                if not one.isreg() or one.issparse() or not key or _RESERVED.match(one.name):
                    unused += one.isfile()
                    continue
                if ending.lower() in samples.setdefault(key, {}):
                    raise DataError(f"{tar}: has two files {one.name}; WebDataset allows one")
                samples[key][ending.lower()] = one.offset_data, one.size
                archive.members.clear()  # type: ignore[attr-defined]  # else all stay in memory
    except tarfile.TarError as error:
        raise DataError(
            f"{tar}: is no whole, uncompressed tar ({error}); unpack or fetch it again"
        ) from error
    end = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    file.seek(end)
    if size < end + tarfile.BLOCKSIZE or any(file.read(2**20)):
        raise DataError(f"{tar}: is cut short or goes on after its end; fetch or write it again")
    files.report_left_out(tar, unused, "files whose names are no WebDataset members")
    return samples


def look_up(file: BinaryIO, key: str, sample: _Sample, where: str) -> str | None:
    """Find a speaker or a transcript in a sample (see `WebdatasetTars`); None if it has none."""
    kind, _, rest = where.partition(":")
    if kind == "key":
        match = re.search(rest, key)
        return match and match[match.lastindex or 0]
    offset, size = sample.get(kind.lower(), (0, 0))
    try:
        text = os.pread(file.fileno(), min(size, MAX_TEXT_BYTES), offset).decode("utf-8-sig")
        value: Any = json.loads(text) if rest else text.strip()
        for name in filter(None, rest.split(".")):
            value = value[int(name) if isinstance(value, list) else name]
        return str(value) or None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def load_sample(
    tar: str, stamp: str, key: str, places: Mapping[str, tuple[int, int] | None], sample_rate: int
) -> Any:
    """Load the members of a sample, float32 [T] at `sample_rate`; s1 alone as an array."""
    waves = {}
    file, _ = open_tar(tar, stamp)
    with file:
        for ours, place in places.items():
            what = f"{tar}, {key}, {ours}"
            if place is None:
                raise DataError(f"{what}: there is no such member")
            wave_T, rate = _decode(os.pread(file.fileno(), place[1], place[0]), what)
            audio.require_rate(rate, sample_rate, what)
            waves[ours] = audio.clip(audio.resample(wave_T, rate, sample_rate), what)
    return waves["s1"] if [*waves] == ["s1"] else waves


def _decode(data: bytes, what: str) -> tuple[np.ndarray, int]:
    """Decode the first channel of an audio file in memory; AudioError names `what`."""
    with os.fdopen(os.memfd_create("member"), "wb") as file:
        file.write(data)
        file.flush()
        path = f"/proc/self/fd/{file.fileno()}"
        try:
            return audio.load_channel(path)
        except audio.AudioError as error:
            raise audio.AudioError(str(error).replace(path, what)) from error


def open_tar(tar: str, stamp: str = "") -> tuple[BinaryIO, str]:
    """Open a tar and identify its content; DataError if that is no longer `stamp`."""
    if storage.is_remote(tar):
        kept, found = _fetch(tar)
        file: BinaryIO = os.fdopen(os.dup(kept.fileno()), "rb")
    else:
        storage.size(tar)  # names it if it is missing
        file = open(tar, "rb")  # noqa: SIM115 (closed by the caller)
        status = os.fstat(file.fileno())
        found = f"{status.st_size} bytes of {status.st_mtime_ns} ns"
    if stamp not in ("", found):
        file.close()
        raise DataError(f"{tar}: was changed since it was listed; start again")
    return file, found


@lru_cache(maxsize=1)
def _fetch(tar: str) -> tuple[BinaryIO, str]:
    """Fetch a remote tar into a file without a name; returns it and its sha256."""
    with tempfile.TemporaryDirectory(prefix="sepdist-tar-") as folder:
        storage.fetch_file(tar, Path(folder, "tar"))
        file = open(Path(folder, "tar"), "rb")  # noqa: SIM115 (closed when another is fetched)
    return file, hashlib.file_digest(file, "sha256").hexdigest()
