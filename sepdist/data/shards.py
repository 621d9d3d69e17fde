"""The format of a data set: writer, reader and checks in one place, so that they cannot drift apart.

In: records of a corpus. Out: a folder or s3:// prefix with

    <corpus>-<split>-000000.tar   a plain WebDataset shard: for every sample <id>.json and <id>.<member>.flac, where the
                                  members are s1, s2, ... and possibly noise (their sum is the mixture), or mix alone;
                                  beside sources possibly e1, e2, ..., what a separator made of the mixture
    index/<the same>.json         where each sample's members lie in the tar, as byte offsets
    manifest.json                 what there is, with sha256; written last and never replaced: without it, no data set

The same records give the same bytes with one version of libsndfile: members sorted by name, no times, no owners, FLAC
of 16-bit samples. One step of 16-bit audio is 2**-15, so audio that came from 16-bit files is kept exactly.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sepdist import audio, storage
from sepdist.data.members import (
    DataError,
    check_ids,
    decode,
    encode,
    in_order,
    load_members,
    people,
)
from sepdist.data.records import Mixture, Utterance

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest knows it."""

    name: str
    bytes: int
    num_samples: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a finished data set holds."""

    format_version: int
    corpus: str
    split: str
    sample_rate: int
    members: tuple[
        str, ...
    ]  # ("s1", "s2", "noise", "e1", "e2") or ("mix",); every sample has all of them
    num_samples: int
    hours: float
    num_speakers: int
    speakers: tuple[str, ...]
    shards: tuple[ShardInfo, ...]

    def digest(self) -> str:
        """The sha256 of the whole data set: equal exactly where every byte of every shard and index is."""
        return hashlib.sha256(_canonical(asdict(self))).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One sample of a shard; `members` maps "s1", ... and "json" to (byte offset, size) in the tar."""

    key: str
    num_samples: int  # audio length T
    speakers: tuple[str, ...]
    members: dict[str, tuple[int, int]]


def shard_name(corpus: str, split: str, i: int) -> str:
    """The file name of shard `i`."""
    return f"{corpus}-{split}-{i:06d}.tar"


# Writing.


def write_shard(
    records: Sequence[Utterance | Mixture], output_url: str | Path, name: str
) -> ShardInfo:
    """Write, or keep, the shard `name` of `records`; it is stored and verified when this returns.

    A finished shard of the same records (ids, speakers, texts, rate) whose bytes are sound is kept without loading any
    audio. DataError names the record that cannot be stored.
    """
    if not records:
        raise DataError(f"{name}: no records; a shard holds at least one")
    check_ids(records)
    kept = _finished(records, output_url, name)
    if kept is not None:
        return kept
    with tempfile.TemporaryDirectory(prefix="sepdist-shard-") as folder:
        path = Path(folder) / name
        try:
            samples = _write_tar(records, path)
        except OSError as error:
            if error.errno in storage.DISK_FULL:
                raise storage.disk_error(
                    f"{path} (TMPDIR chooses the folder)", "write", error
                ) from error
            raise
        index: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "shard": name,
            "bytes": path.stat().st_size,
            "sha256": _sha256_of(path),
            "fingerprint": _fingerprint(records),
            "sample_rate": records[0].sample_rate,
            "samples": samples,
        }
        storage.put_file(path, storage.join(output_url, name))
    with _local_copy(output_url, name) as stored:
        if _sha256_of(stored) != index["sha256"]:
            raise DataError(
                f"{storage.join(output_url, name)}: reads back other bytes than were written; use other disks"
            )
    text = json.dumps(index, indent=1, ensure_ascii=False).encode()
    storage.put_bytes(_index_url(output_url, name), text)
    return _info(index, text)


def write_manifest(
    output_url: str | Path, corpus: str, split: str, sample_rate: int, infos: Sequence[ShardInfo]
) -> Manifest:
    """Finish a data set: check that its shards fit together and are all there, and put the manifest, create-only.

    An equal manifest may be there already; another one is a DataError, and is left alone.
    """
    if not infos:
        raise DataError(f"{output_url}: no shards to finish a data set of")
    manifest = _describe(output_url, corpus, split, sample_rate, infos)
    url = storage.join(output_url, MANIFEST)
    with contextlib.suppress(FileExistsError):
        storage.put_bytes(
            url,
            json.dumps(asdict(manifest), indent=1, ensure_ascii=False).encode(),
            create_only=True,
        )
    there = read_manifest(output_url)
    if there != manifest:
        digests = f"its digest is {there.digest()[:12]}, not {manifest.digest()[:12]}"
        raise DataError(
            f"{url}: is of another data set ({digests}); remove that one or write to another place"
        )
    return manifest


def _fingerprint(records: Sequence[Utterance | Mixture]) -> str:
    facts = [[record.id, record.sample_rate, *people(record)] for record in records]
    return hashlib.sha256(_canonical([FORMAT_VERSION, facts])).hexdigest()


def _finished(
    records: Sequence[Utterance | Mixture], url: str | Path, name: str
) -> ShardInfo | None:
    """The shard as an earlier run finished it; None if it is missing, of other records or damaged."""
    try:
        text = storage.read_bytes(_index_url(url, name))
        index = json.loads(text)
        if not isinstance(index, dict) or index.get("fingerprint") != _fingerprint(records):
            return None
        if storage.size(storage.join(url, name)) != index["bytes"]:
            return None
        with _local_copy(url, name) as stored:
            return _info(index, text) if _sha256_of(stored) == index["sha256"] else None
    except (FileNotFoundError, json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return None


def _info(index: Mapping[str, Any], text: bytes) -> ShardInfo:
    return ShardInfo(
        name=index["shard"],
        bytes=index["bytes"],
        num_samples=len(index["samples"]),
        sha256=index["sha256"],
        index_sha256=hashlib.sha256(text).hexdigest(),
    )


def _write_tar(records: Sequence[Utterance | Mixture], path: Path) -> list[dict[str, Any]]:
    """Load, check and encode every record into the tar at `path`; returns the entries of its index."""
    entries: list[dict[str, Any]] = []
    shape: tuple[str, ...] = ()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            waves = load_members(record)
            shape = shape or tuple(waves)
            if tuple(waves) != shape:
                have = f"has {', '.join(waves)} where the records before it have {', '.join(shape)}"
                raise DataError(
                    f"record {record.id!r}: {have}; all samples of a data set have the same members"
                )
            places = {}
            for suffix, data in encode(record, waves).items():
                entry = tarfile.TarInfo(
                    f"{record.id}.{suffix}"
                )  # mtime, uid and gid are 0, user and group empty
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
                padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                places[suffix.removesuffix(".flac")] = [tar.offset - padded, len(data)]
            num_samples = len(waves[shape[0]])
            facts = {
                "key": record.id,
                "num_samples": num_samples,
                "speakers": people(record)[0],
                "members": places,
            }
            entries.append(facts)
    return entries


def _describe(
    url: str | Path, corpus: str, split: str, sample_rate: int, infos: Sequence[ShardInfo]
) -> Manifest:
    """The manifest of shards that are there and fit together; else a DataError names the shard or the key."""
    members: tuple[str, ...] = ()
    where: dict[str, str] = {}
    speakers, num_frames = set[str](), 0
    for shard in infos:
        index = _load_index(url, shard)
        if index["sample_rate"] != sample_rate:
            raise DataError(
                f"{shard.name}: {index['sample_rate']} Hz in a data set of {sample_rate} Hz"
            )
        _require_size(url, shard)
        for sample in _samples(index):
            own = in_order([name for name in sample.members if name != "json"])
            members = members or own
            if own != members:
                have = f"has {', '.join(own)} where the samples before it have {', '.join(members)}"
                raise DataError(f"{shard.name}, {sample.key}: {have}")
            if sample.key in where:
                raise DataError(
                    f"{shard.name}, {sample.key}: is in {where[sample.key]} too; ids are unique"
                )
            where[sample.key] = shard.name
            speakers.update(sample.speakers)
            num_frames += sample.num_samples
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus,
        split=split,
        sample_rate=sample_rate,
        members=members,
        num_samples=len(where),
        hours=num_frames / sample_rate / 3600,
        num_speakers=len(speakers),
        speakers=tuple(sorted(speakers)),
        shards=tuple(infos),
    )


# Reading.


def read_manifest(url: str | Path) -> Manifest:
    """The manifest of the finished data set at `url`; DataError if there is none or it is unreadable."""
    place = storage.join(url, MANIFEST)
    try:
        raw = json.loads(storage.read_bytes(place))
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{place}: is of format {version}, but format {FORMAT_VERSION} is read; write it again"
            )
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()
        }
        manifest = Manifest(
            **fields | {"shards": tuple(ShardInfo(**shard) for shard in raw["shards"])}
        )
    except FileNotFoundError:
        todo = f"run tools/shard_data.py write ... output={url} (finished shards are kept)"
        raise DataError(f"no {MANIFEST} in {url}: not a finished data set; {todo}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{place}: is not a readable manifest ({error}); restore it or write it again"
        ) from error
    num_samples = sum(shard.num_samples for shard in manifest.shards)
    if manifest.num_samples != num_samples:
        raise DataError(
            f"{place}: was changed, it counts {manifest.num_samples} samples and its shards {num_samples}"
        )
    return manifest


def read_index(url: str | Path, shard: ShardInfo) -> list[Sample]:
    """The samples of a shard in the order of the tar; DataError names the shard if its index is missing or changed."""
    return _samples(_load_index(url, shard))


def read_sample(
    tar: Path | BinaryIO,
    sample: Sample,
    members: Sequence[str],
    start: int = 0,
    stop: int | None = None,
) -> dict[str, np.ndarray]:
    """The samples `start` to `stop` (None: the end) of some members, each float32 [stop - start], full scale 1.0.

    `tar` is a shard's path or an open file, which several threads may share. Damage is a DataError that names the
    shard, the key and the byte offset.
    """
    stop = sample.num_samples if stop is None else stop
    if not 0 <= start < stop <= sample.num_samples:
        raise ValueError(
            f"{sample.key}: cannot read [{start}, {stop}) of {sample.num_samples} samples"
        )
    absent = [member for member in members if member not in sample.members]
    if absent:
        raise DataError(
            f"{sample.key}: has no {', '.join(absent)}; it has {', '.join(sorted(sample.members))}"
        )
    if isinstance(tar, Path):
        try:
            with open(tar, "rb") as file:
                return {
                    member: _read_member(file, sample, member, start, stop) for member in members
                }
        except FileNotFoundError:
            raise DataError(
                f"{tar}: the shard is missing; fetch it again or write the data set again"
            ) from None
    return {member: _read_member(tar, sample, member, start, stop) for member in members}


def _read_member(file: BinaryIO, sample: Sample, member: str, start: int, stop: int) -> np.ndarray:
    offset, num_bytes = sample.members[member]
    place = _place(Path(str(getattr(file, "name", "shard"))).name, sample, member)
    data = os.pread(
        file.fileno(), num_bytes, offset
    )  # moves no shared position, so threads do not disturb each other
    if len(data) != num_bytes:
        raise DataError(
            f"{place}: truncated, the shard ends after {len(data)} of {num_bytes} bytes"
        )
    return decode(data, sample.num_samples, start, stop, place)


def read_facts(tar: BinaryIO, sample: Sample) -> dict[str, Any]:
    """What the json member of a sample says; ValueError or KeyError where it is damaged."""
    offset, num_bytes = sample.members["json"]
    return json.loads(os.pread(tar.fileno(), num_bytes, offset))


def all_facts(url: str | Path) -> Iterator[dict[str, Any]]:
    """What the json members of a whole data set say, in the order of the manifest."""
    for shard in read_manifest(url).shards:
        with _local_copy(url, shard.name) as path, open(path, "rb") as tar:
            for sample in read_index(url, shard):
                yield read_facts(tar, sample)


def verify(url: str | Path) -> list[str]:
    """Every problem of the data set at `url`, each naming shard, key and byte offset; [] when it is sound."""
    try:
        manifest = read_manifest(url)
    except DataError as error:
        return [str(error)]
    return [problem for shard in manifest.shards for problem in _verify_shard(url, manifest, shard)]


def _verify_shard(url: str | Path, manifest: Manifest, shard: ShardInfo) -> Iterator[str]:
    samples: list[Sample] = []
    try:
        samples = read_index(url, shard)
    except DataError as error:
        yield str(error)
    try:
        with _local_copy(url, shard.name) as path:
            num_bytes = path.stat().st_size
            if num_bytes != shard.bytes:
                yield f"{shard.name}: has {num_bytes} bytes, the manifest says {shard.bytes}"
            elif _sha256_of(path) != shard.sha256:
                yield f"{shard.name}: its sha256 is not the manifest's; it was damaged or changed"
            if samples and len(samples) != shard.num_samples:
                yield f"{shard.name}: its index has {len(samples)} samples, the manifest says {shard.num_samples}"
            for sample in samples:
                yield from _verify_sample(path, sample, manifest)
    except FileNotFoundError:
        yield f"{shard.name}: the shard is missing"


def _verify_sample(path: Path, sample: Sample, manifest: Manifest) -> Iterator[str]:
    for member in manifest.members:
        try:
            wave = read_sample(path, sample, [member])[member]
            audio.check(wave, _place(path.name, sample, member))
        except (DataError, audio.AudioError) as error:
            yield str(error)
    place = _place(path.name, sample, "json")
    try:
        with open(path, "rb") as tar:
            facts = read_facts(tar, sample)
        told = (facts["id"], facts["num_samples"], tuple(facts["speakers"]), facts["sample_rate"])
        if told != (sample.key, sample.num_samples, sample.speakers, manifest.sample_rate):
            yield f"{place}: does not agree with the index"
    except (ValueError, KeyError, TypeError) as error:
        yield f"{place}: cannot be read ({error})"


def _place(shard: str, sample: Sample, member: str) -> str:
    return f"{shard}, {sample.key}.{member} at byte {sample.members.get(member, (-1, 0))[0]}"


def _index_url(url: str | Path, name: str) -> str:
    return storage.join(url, "index", f"{name.removesuffix('.tar')}.json")


def _load_index(url: str | Path, shard: ShardInfo) -> dict[str, Any]:
    place = _index_url(url, shard.name)
    try:
        text = storage.read_bytes(place)
    except FileNotFoundError:
        raise DataError(
            f"{shard.name}: its index {place} is missing; write the data set again"
        ) from None
    if hashlib.sha256(text).hexdigest() != shard.index_sha256:
        raise DataError(
            f"{shard.name}: its index {place} was changed (sha256); write the data set again"
        )
    return json.loads(text)


def _samples(index: Mapping[str, Any]) -> list[Sample]:
    return [
        Sample(
            key=one["key"],
            num_samples=one["num_samples"],
            speakers=tuple(one["speakers"]),
            members={name: (place[0], place[1]) for name, place in one["members"].items()},
        )
        for one in index["samples"]
    ]


def _require_size(url: str | Path, shard: ShardInfo) -> None:
    place = storage.join(url, shard.name)
    try:
        num_bytes = storage.size(place)
    except FileNotFoundError:
        raise DataError(f"{place}: the shard is missing; write it again") from None
    if num_bytes != shard.bytes:
        raise DataError(
            f"{place}: has {num_bytes} bytes where {shard.bytes} were written; write it again"
        )


@contextlib.contextmanager
def _local_copy(url: str | Path, name: str) -> Iterator[Path]:
    """The shard as a local file: itself if it is local, else a temporary copy; FileNotFoundError if it is missing."""
    place = storage.join(url, name)
    if not storage.is_remote(place):
        path = Path(place).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{place}: no such file")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sepdist-shard-") as folder:
        storage.fetch_file(place, Path(folder) / name)
        yield Path(folder) / name


def _sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
