"""The format of a data set: its writer, reader and checks in one file, so that they stay in step.

A data set is a folder or s3:// prefix with

    <corpus>-<split>-000000.tar   WebDataset shard: <id>.json and <id>.<member>.flac per sample
    index/<the same>.json         byte offsets of every member in the tar
    index/<the same>.inputs.json  what it was made of (data/inputs.py), which readers do not need
    manifest.json                 all shards with their sha256; written last and never replaced

See data/members.py for the members. A folder without a manifest is not a data set. With one version
of libsndfile, equal records give equal bytes: files are sorted by name and carry no time or owner.
A step of 16-bit audio is 2**-15, so audio that came from 16-bit files is kept exactly.
"""

import contextlib
import hashlib
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sepdist import audio, storage
from sepdist.data import inputs
from sepdist.data import members as sample_files
from sepdist.data.manifest import MANIFEST, Manifest, ShardInfo, canonical, dump, read_manifest
from sepdist.data.members import DataError, format_of, people, split_members
from sepdist.data.records import Mixture, Utterance

NUM_READERS = 32  # indices read at once, as storage answers slowly
MAX_NUMBER = 2**34  # of a length, an offset or a size


@dataclass(frozen=True)
class Sample:
    """One sample of a shard; `members` maps "s1", "json", ... to [byte offset, size]."""

    key: str
    num_samples: int  # audio length T
    speakers: tuple[str, ...]
    members: dict[str, list[int]]

    def __post_init__(self) -> None:
        numbers = [self.num_samples, *itertools.chain(*self.members.values())]
        fine = all(type(one) is int and 0 <= one < MAX_NUMBER for one in numbers)
        if not fine or any(len(place) != 2 for place in self.members.values()):
            raise ValueError(f"{self.key!r}: its members or their places are wrong")


class Outcome(NamedTuple):
    """What became of a shard: its entry (None: nothing is stored), bad records, if it was kept."""

    shard: ShardInfo | None
    bad: list[str]  # why records are not stored, one line each
    kept: bool = False


def shard_name(corpus: str, split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{corpus}-{split}-{number:06d}.tar"


# Writing.


def try_shard(
    records: Sequence[Utterance | Mixture],
    output_url: str | Path,
    name: str,
    identity: str = "",
    skip: bool = False,
) -> Outcome:
    """Write the shard `name` of `records`, or keep it; it is stored and verified on return.

    An intact shard of the same records, made of the same inputs, is kept without loading audio. A
    shard with bad records is not stored; with `skip` they are left out.
    """
    made_of = inputs.describe(records, identity)
    if (kept := _finished(records, output_url, name, made_of)) and (skip or not kept.bad):
        return kept
    with tempfile.TemporaryDirectory(prefix="sepdist-shard-") as folder:
        path = Path(folder, name)
        try:
            samples, bad = _write_tar(records, path)
        except OSError as error:
            if error.errno not in storage.DISK_FULL:
                raise
            place = f"{path} (TMPDIR chooses the folder)"
            raise storage.disk_error(place, "write", error) from error
        if bad and not skip:
            return Outcome(None, bad)
        index: dict[str, Any] = {
            "format_version": format_of(samples[0]["members"]) if samples else 1,
            "shard": name,
            "bytes": path.stat().st_size,
            "sha256": _sha256_of(path),
            "fingerprint": _fingerprint(records),
            "sample_rate": records[0].sample_rate,
            "samples": samples,
        }
        url = storage.join(output_url, name)
        storage.put_file(path, url)
    with _local_copy(output_url, name) as stored:
        if _sha256_of(stored) != index["sha256"]:
            raise DataError(f"{url}: reads back other bytes than were written; use other disks")
    if made_of is not None:
        storage.put_bytes(_index_url(output_url, name, ".inputs"), dump(made_of | {"bad": bad}))
    text = dump(index)
    storage.put_bytes(_index_url(output_url, name), text)
    return Outcome(_info(index, text), bad)


def write_manifest(
    output_url: str | Path, corpus: str, split: str, sample_rate: int, infos: Sequence[ShardInfo]
) -> Manifest:
    """Finish a data set: check that its shards exist and fit together, and create its manifest.

    An equal manifest may exist already; a different one raises DataError and is left alone.
    """
    if not infos:
        raise DataError(f"{output_url}: no shards to finish a data set of")
    manifest = _describe(output_url, corpus, split, sample_rate, infos)
    url = storage.join(output_url, MANIFEST)
    text = dump(manifest.as_dict() | {"digest": manifest.digest()})
    with contextlib.suppress(FileExistsError):
        storage.put_bytes(url, text, create_only=True)
    found = read_manifest(output_url)
    if found != manifest:
        digests = f"its digest is {found.digest()[:12]}, not {manifest.digest()[:12]}"
        raise DataError(f"{url}: is of another data set ({digests}); remove it or change output")
    return manifest


def _fingerprint(records: Sequence[Utterance | Mixture]) -> str:
    identity = [[record.id, record.sample_rate, *people(record)] for record in records]
    return hashlib.sha256(canonical([1, identity])).hexdigest()  # 1: of both formats


def read_inputs(url: str | Path, name: str) -> dict[str, Any]:
    """Return what a shard was made of, and its bad records; empty if that is not known."""
    try:
        return dict(json.loads(storage.read_bytes(_index_url(url, name, ".inputs"))))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _finished(
    records: Sequence[Utterance | Mixture], url: str | Path, name: str, made_of: Any
) -> Outcome | None:
    """Return the shard of an earlier run; None if missing, damaged or of other inputs."""
    try:
        text, before = storage.read_bytes(_index_url(url, name)), read_inputs(url, name)
        index, bad = json.loads(text), before.pop("bad", [])
        if not isinstance(index, dict) or index.get("fingerprint") != _fingerprint(records):
            return None
        if before != made_of or storage.size(storage.join(url, name)) != index["bytes"]:
            return None
        with _local_copy(url, name) as stored:
            same = _sha256_of(stored) == index["sha256"]
            return Outcome(_info(index, text), bad, kept=True) if same else None
    except (FileNotFoundError, json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return None


def _info(index: Mapping[str, Any], text: bytes) -> ShardInfo:
    own = {"name": index["shard"], "bytes": index["bytes"], "num_samples": len(index["samples"])}
    return ShardInfo(**own, sha256=index["sha256"], index_sha256=hashlib.sha256(text).hexdigest())


def _write_tar(
    records: Sequence[Utterance | Mixture], path: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Load, check and encode records into a tar at `path`; return its index and what is bad."""
    import webdataset  # late: readers do not need it

    samples: list[dict[str, Any]] = []
    bad: list[str] = []
    shape: tuple[str, ...] = ()
    options = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    with open(path, "wb") as file, webdataset.TarWriter(file, **options) as writer:
        tar = writer.tarstream
        tar.format = tarfile.USTAR_FORMAT  # TarWriter's own argument `format` has no effect
        for record in records:
            what, places = f"record {record.id!r}", dict[str, list[int]]()
            try:
                waves = sample_files.load_members(record)
                _require_members(what, tuple(waves), shape or tuple(waves))
                files = sample_files.encode(record, waves)
            except sample_files.BAD as error:
                bad.append(str(error) if str(error).startswith(what) else f"{what}: {error}")
                continue
            shape = tuple(waves)
            for suffix, data in files.items():
                writer.write({"__key__": record.id, suffix: data})  # alone, to learn its offset
                padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                places[suffix.removesuffix(".flac")] = [tar.offset - padded, len(data)]
            sample = {"key": record.id, "num_samples": len(waves[shape[0]])}
            samples.append(sample | {"speakers": people(record)[0], "members": places})
    return samples, bad


def _require_members(what: str, found: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    if found != wanted:
        have = f"has {', '.join(found)} where the samples before it have {', '.join(wanted)}"
        raise DataError(f"{what}: {have}; all samples of a data set have the same members")


def _describe(
    url: str | Path, corpus: str, split: str, sample_rate: int, infos: Sequence[ShardInfo]
) -> Manifest:
    """Build the manifest of shards that exist and fit together; DataError names the misfit."""
    members: tuple[str, ...] = ()
    shard_of: dict[str, str] = {}
    speakers, num_frames = set[str](), 0
    for shard, index in zip(infos, _load_all(url, sample_rate, infos), strict=True):
        for sample in _samples(index):
            what = f"{shard.name}, {sample.key}"
            sources, estimates, rest = split_members([n for n in sample.members if n != "json"])
            found = (*sources, *rest, *estimates)
            members = members or found
            _require_members(what, found, members)
            if sample.key in shard_of:
                raise DataError(f"{what}: is in {shard_of[sample.key]} too; ids are unique")
            shard_of[sample.key] = shard.name
            speakers.update(sample.speakers)
            num_frames += sample.num_samples
    return Manifest(
        format_version=format_of(members),
        corpus=corpus,
        split=split,
        sample_rate=sample_rate,
        members=members,
        num_samples=len(shard_of),
        hours=num_frames / sample_rate / 3600,
        num_speakers=len(speakers),
        speakers=tuple(sorted(speakers)),
        shards=tuple(infos),
    )


def _load_all(url: str | Path, rate: int, infos: Sequence[ShardInfo]) -> Iterator[dict[str, Any]]:
    """Yield the indices of shards, in order; DataError for the first that is not as written."""

    def load(shard: ShardInfo) -> dict[str, Any]:
        index, place = _load_index(url, shard), storage.join(url, shard.name)
        if index["sample_rate"] != rate:
            rates = f"{index['sample_rate']} Hz in a data set of {rate} Hz"
            raise DataError(f"{shard.name}: {rates}")
        with contextlib.suppress(FileNotFoundError):
            if storage.size(place) == shard.bytes:
                return index
        raise DataError(f"{place}: the shard is missing or truncated; write it again")

    with ThreadPoolExecutor(NUM_READERS) as pool:
        for first in range(0, len(infos), NUM_READERS):  # no more at once, as indices are large
            yield from pool.map(load, infos[first : first + NUM_READERS])


# Reading.


def read_index(url: str | Path, shard: ShardInfo) -> list[Sample]:
    """Read a shard's samples in tar order; DataError if its index is missing or was changed."""
    try:
        samples = _samples(_load_index(url, shard))
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shard.name}: its index is damaged ({error})") from error
    if len(samples) != shard.num_samples:
        counts = f"{len(samples)} samples, the manifest says {shard.num_samples}"
        raise DataError(f"{shard.name}: its index has {counts}")
    return samples


def read_sample(
    tar: BinaryIO, sample: Sample, members: Sequence[str], start: int = 0, stop: int | None = None
) -> dict[str, np.ndarray]:
    """Read samples [start, stop) of some members from an open shard: float32, full scale 1.0.

    Threads may share `tar`. Damage raises a DataError that names shard, key and byte offset.
    """
    stop = sample.num_samples if stop is None else stop
    if not 0 <= start < stop <= sample.num_samples:
        bounds = f"[{start}, {stop}) of {sample.num_samples} samples"
        raise ValueError(f"{sample.key}: cannot read {bounds}")
    absent = [member for member in members if member not in sample.members]
    if absent:
        found = ", ".join(sorted(sample.members))
        raise DataError(f"{sample.key}: has no {', '.join(absent)}; it has {found}")
    waves = {}
    for member in members:
        offset, num_bytes = sample.members[member]
        place = _place(tar, sample, member)
        # pread moves no shared position, so threads do not disturb each other.
        data = os.pread(tar.fileno(), num_bytes, offset)
        if len(data) != num_bytes:
            left = f"the shard ends after {len(data)} of {num_bytes} bytes"
            raise DataError(f"{place}: truncated, {left}")
        waves[member] = sample_files.decode(data, sample.num_samples, start, stop, place)
    return waves


def read_metadata(tar: BinaryIO, sample: Sample) -> dict[str, Any]:
    """Read the JSON metadata of a sample; ValueError or KeyError where it is damaged."""
    offset, num_bytes = sample.members["json"]
    return json.loads(os.pread(tar.fileno(), num_bytes, offset))


def all_metadata(url: str | Path) -> Iterator[dict[str, Any]]:
    """Read the JSON metadata of all samples of a data set, in the order of the manifest."""
    for shard in read_manifest(url).shards:
        with _local_copy(url, shard.name) as path, open(path, "rb") as tar:
            for sample in read_index(url, shard):
                yield read_metadata(tar, sample)


def verify(url: str | Path) -> list[str]:
    """List every problem of the data set at `url` by shard, key and byte offset; [] if intact."""
    try:
        manifest = read_manifest(url)
    except DataError as error:
        return [str(error)]
    place = storage.join(url, MANIFEST)
    older = manifest.as_dict()
    texts = dump(older | {"digest": manifest.digest()}), dump(older)
    if storage.read_bytes(place) not in texts:
        return [f"{place}: is not as it was written; restore it"]
    return [problem for shard in manifest.shards for problem in _verify_shard(url, manifest, shard)]


def _verify_shard(url: str | Path, manifest: Manifest, shard: ShardInfo) -> Iterator[str]:
    samples: list[Sample] = []
    try:
        samples = read_index(url, shard)
    except DataError as error:
        yield str(error)
    try:
        with _local_copy(url, shard.name) as path, open(path, "rb") as tar:
            num_bytes = path.stat().st_size
            if num_bytes != shard.bytes:
                yield f"{shard.name}: has {num_bytes} bytes, the manifest says {shard.bytes}"
            elif _sha256_of(path) != shard.sha256:
                yield f"{shard.name}: its sha256 is not the manifest's; it was damaged or changed"
            for sample in samples:
                yield from _verify_sample(tar, sample, manifest)
    except FileNotFoundError:
        yield f"{shard.name}: the shard is missing"
    except DataError as error:
        yield str(error)


def _verify_sample(tar: BinaryIO, sample: Sample, manifest: Manifest) -> Iterator[str]:
    silent: list[str] = []  # as written
    place = _place(tar, sample, "json")
    try:
        found = read_metadata(tar, sample)
        indexed = (sample.key, sample.num_samples, list(sample.speakers), manifest.sample_rate)
        names = ("id", "num_samples", "speakers", "sample_rate")
        silent = found.get("silent", [])
        if tuple(found[name] for name in names) != indexed:
            yield f"{place}: does not agree with the index"
    except (ValueError, KeyError, TypeError) as error:
        yield f"{place}: cannot be read ({error})"
    for member in manifest.members:
        try:
            wave = read_sample(tar, sample, [member])[member]
            if member not in silent:
                audio.check(wave, _place(tar, sample, member))
        except (DataError, audio.AudioError) as error:
            yield str(error)


def _place(tar: BinaryIO, sample: Sample, member: str) -> str:
    offset, _ = sample.members.get(member, (-1, 0))
    return f"{os.path.basename(tar.name)}, {sample.key}.{member} at byte {offset}"


def _index_url(url: str | Path, name: str, kind: str = "") -> str:
    return storage.join(url, "index", f"{name.removesuffix('.tar')}{kind}.json")


def _load_index(url: str | Path, shard: ShardInfo) -> dict[str, Any]:
    place = f"{shard.name}: its index {_index_url(url, shard.name)}"
    try:
        text = storage.read_bytes(_index_url(url, shard.name))
    except FileNotFoundError:
        raise DataError(f"{place} is missing; write the data set again") from None
    if hashlib.sha256(text).hexdigest() != shard.index_sha256:
        raise DataError(f"{place} was changed (sha256); write the data set again")
    return json.loads(text)


def _samples(index: Mapping[str, Any]) -> list[Sample]:
    return [Sample(**one | {"speakers": tuple(one["speakers"])}) for one in index["samples"]]


@contextlib.contextmanager
def _local_copy(url: str | Path, name: str) -> Iterator[Path]:
    """Yield the path of a shard, or of a temporary copy of a remote one."""
    place = storage.join(url, name)
    if not storage.is_remote(place):
        yield require_regular(Path(place).expanduser())
        return
    with tempfile.TemporaryDirectory(prefix="sepdist-shard-") as folder:
        storage.fetch_file(place, Path(folder, name))
        yield Path(folder, name)


def require_regular(path: Path) -> Path:
    """Return the path; DataError for a pipe, a device or a folder. A pipe may never end."""
    if not path.is_file() and path.exists():  # in this order, as it may vanish
        raise DataError(f"{path}: a pipe, device or folder where a shard is wanted; remove it")
    return path


def _sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
