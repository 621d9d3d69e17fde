"""WebDataset tars that other people made, as a corpus; nothing that they hold is ever run.

The library's rules name samples and members: `a/b.spk1.wav` is member `spk1.wav` of sample `a/b`.
tarfile reads them, as the library's reader tells no offsets and takes a cut tar for a whole one.
"""

import errno
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from sepdist import audio, storage
from sepdist.corpora import files
from sepdist.data.members import DataError, split_members
from sepdist.data.records import Mixture, Utterance

_COMPRESSED = re.compile(r".*\.(tar\.\w+|t[bgx]z|tzst)", re.IGNORECASE)
_RESERVED = re.compile(r"__[^/]*__($|/)")  # names of WebDataset itself
_NO_TAR = (tarfile.TarError, MemoryError, OverflowError, RuntimeError, ValueError, OSError)
_Sample = dict[str, tuple[int, int]]  # ending -> byte offset, size


@dataclass
class WebdatasetTars:
    """The samples of `tars`: paths or s3:// urls of tars, brace lists of them or folders with them.

    `members` maps ours to endings in the tars: {"s1": "spk1.wav", "s2": "spk2.wav", "mix":
    "mix.wav"}, where `mix` is left out if it is the sum; s1 alone is an utterance. `speakers` and
    `texts` say, for each source, where its name or transcript is: an ending ("cls"), a key of a
    JSON member ("json:speaker"), or a pattern in the sample's key ("key:^[^-]+"). A source without
    one is a speaker of its own. An id is the sample's key, after its tar's name if tars share keys.
    """

    tars: str | Sequence[str]
    members: Mapping[str, str]
    speakers: Sequence[str] = ()
    texts: Sequence[str] = ()
    sample_rate: int = 8000
    name = "webdataset"

    def records(self, split: str) -> Iterator[Utterance | Mixture]:
        """Yield all samples in the order of the tars; `split` only names the data set."""
        open_tar.cache_clear()  # another may lie there by now
        members = {ours: theirs.lower() for ours, theirs in self.members.items()}
        fields, found = [*self.speakers, *self.texts], list[Any]()
        for tar in find_tars(self.tars):
            file, stamp = open_tar(tar)
            for key, sample in index_tar(tar, file).items():
                values = [look_up(file, key, sample, one) for one in fields]
                found.append((tar, stamp, key, sample, values))
        endings = Counter(ending for *_, sample, _ in found for ending in sample)
        wanted = {*members.values(), *(one.partition(":")[0] for one in fields)} - {"key"}
        if absent := sorted(wanted - {*endings}):
            there = ", ".join(f".{name} ({count})" for name, count in endings.most_common(20))
            todo = f"name what is there in corpus.members, speakers and texts: {there or 'nothing'}"
            raise ValueError(f"{self.tars}: no sample has a .{absent[0]}; {todo}")
        unused = sum(count for ending, count in endings.items() if ending not in {*wanted, "json"})
        files.report_left_out(str(self.tars), unused, "files of other endings")
        lacking = sum(values.count(None) for *_, values in found)
        files.report_left_out(str(self.tars), lacking, "names and texts that samples lack")
        shared = len({key for _, _, key, *_ in found}) < len(found)
        keys = [f"{Path(tar).stem}-{key}" if shared else key for tar, _, key, *_ in found]
        ids = [files.sample_key(key.replace("/", "-")) for key in keys]
        files.require_unique(ids, str(self.tars))
        sources = split_members(list(members))[0]
        if len(self.speakers) not in (0, len(sources)):
            raise ValueError(f"corpus.speakers: {len(self.speakers)} for {len(sources)} sources")
        for id_, (tar, stamp, key, sample, values) in zip(ids, found, strict=True):
            places = {ours: sample.get(theirs) for ours, theirs in members.items()}
            load = partial(load_sample, tar, stamp, key, places, self.sample_rate)
            names = values[: len(self.speakers)] or [None] * len(sources)
            speakers = tuple(n or f"{id_}-{m}" for n, m in zip(names, sources, strict=True))
            texts = tuple(one or "" for one in values[len(self.speakers) :])
            if [*members] == ["s1"]:
                yield Utterance(id_, speakers[0], self.sample_rate, load, "".join(texts))
            else:
                yield Mixture(id_, speakers, self.sample_rate, load, texts)


def find_tars(given: str | Sequence[str]) -> list[str]:
    """Expand brace lists and folders; ValueError for what is no local or s3:// tar."""
    from braceexpand import braceexpand  # of webdataset

    found = list[str]()
    for text in [given] if isinstance(given, str) else given:
        for one in braceexpand(text):
            if one.startswith(("pipe:", "file:")):  # the library runs the first in a shell
                raise ValueError(f"{one}: no program is run, no such url opened; give a path")
            url = storage.absolute(one)
            there = storage.list_names(url)
            names = [name for name in there if name.lower().endswith(".tar")]
            if not names and not url.lower().endswith(".tar"):
                raise ValueError(f"{one}: no .tar, and no folder of .tar files; check corpus.tars")
            others = sum(bool(_COMPRESSED.fullmatch(name)) for name in there)
            files.report_left_out(one, others, "files that may be compressed tars; unpack them")
            found += [storage.join(url, name) for name in names] or [url]
    files.require_unique(found, "corpus.tars")
    return found


def index_tar(tar: str, file: BinaryIO) -> dict[str, _Sample]:
    """Find all members of a tar by the key of their sample; DataError if it is cut or compressed.

    Links and the names that WebDataset reserves or cannot split are left out.
    """
    from webdataset.tariterators import base_plus_ext

    samples, unused, start, end = dict[str, _Sample](), 0, 0, 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for one in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # else all stay in memory
                if one.offset < start:  # a size below 0 leads back, in a circle
                    raise tarfile.ReadError(f"after {one.name} come the files before it")
                start, end = one.offset + 1, one.offset_data + (one.size if one.isreg() else 0)
                key, ending = base_plus_ext(one.name.removeprefix("./"))
                if not one.isreg() or one.issparse() or not key or _RESERVED.match(one.name):
                    unused += not one.isdir()
                elif ending.lower() in samples.setdefault(key, {}):
                    raise DataError(f"{tar}: has two files {one.name}; WebDataset allows one")
                else:
                    samples[key][ending.lower()] = one.offset_data, one.size
    except _NO_TAR as error:
        if isinstance(error, DataError) or getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
            raise  # of the disk; an offset out of all bounds is of the tar
        todo = "unpack or fetch it again"
        raise DataError(f"{tar}: is no whole, uncompressed tar ({error!r}); {todo}") from error
    file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
    rest = file.read(2**20)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise DataError(f"{tar}: is cut short or goes on after its end; fetch or write it again")
    files.report_left_out(tar, unused, "files that are no WebDataset members")
    return samples


def look_up(file: BinaryIO, key: str, sample: _Sample, where: str) -> str | None:
    """Find a speaker or a transcript in a sample (see `WebdatasetTars`); None if it has none."""
    kind, _, rest = where.partition(":")
    if kind == "key":
        try:
            match = re.search(rest, key)
        except re.error as error:
            raise ValueError(f"corpus.speakers or texts, {where}: no pattern ({error})") from error
        return match and match[match.lastindex or 0]
    offset, size = sample.get(kind.lower(), (0, 0))
    try:
        text = os.pread(file.fileno(), min(size, 2**20), offset).decode("utf-8-sig")
        value: Any = json.loads(text) if rest else text.strip()
        for name in filter(None, rest.split(".")):
            value = value[int(name) if isinstance(value, list) else name]
        return str(value) or None if isinstance(value, str | int | float) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def load_sample(
    tar: str, stamp: str, key: str, places: Mapping[str, tuple[int, int] | None], sample_rate: int
) -> Any:
    """Load the members of a sample, float32 [T] at `sample_rate`; s1 alone as an array."""
    (file, found), waves = open_tar(tar), {}
    if found != stamp:
        raise DataError(f"{tar}: was changed since it was listed; start again")
    for ours, place in places.items():
        what = f"{tar}, {key}, {ours}"
        if place is None:
            raise DataError(f"{what}: there is no such member")
        with os.fdopen(os.memfd_create("member"), "wb", buffering=0) as member:
            member.write(os.pread(file.fileno(), place[1], place[0]))
            path = f"/proc/self/fd/{member.fileno()}"
            try:
                waves[ours] = files.load(path, sample_rate)
            except audio.AudioError as error:
                raise audio.AudioError(str(error).replace(path, what)) from error
    return waves["s1"] if [*waves] == ["s1"] else waves


@lru_cache(maxsize=2)
def open_tar(tar: str) -> tuple[BinaryIO, str]:
    """Open a tar, a remote one as a file without a name, and identify its content."""
    if storage.is_remote(tar):
        with tempfile.TemporaryDirectory(prefix="sepdist-tar-") as folder:
            storage.fetch_file(tar, Path(folder, "tar"))
            file = open(Path(folder, "tar"), "rb")  # noqa: SIM115 (stays open)
        return file, hashlib.file_digest(file, "sha256").hexdigest()
    size, file = storage.size(tar), open(tar, "rb")  # noqa: SIM115 (stays open)
    return file, f"{size} bytes of {os.fstat(file.fileno()).st_mtime_ns} ns"
