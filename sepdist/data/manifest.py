"""The manifest of a data set: all its shards with their hashes, of which there may be 100,000."""

import hashlib
import json
import re
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from sepdist import storage
from sepdist.data.members import DataError, format_of

MANIFEST = "manifest.json"
# Name and sha256 of a shard.
SHARD = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.tar [0-9a-f]{64}")


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's entry of one shard."""

    name: str
    bytes: int
    num_samples: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a finished data set holds; every sample has all `members` ("s1", "s2", "noise")."""

    format_version: int
    corpus: str
    split: str
    sample_rate: int
    members: tuple[str, ...]
    num_samples: int
    hours: float
    num_speakers: int
    speakers: tuple[str, ...]
    shards: tuple[ShardInfo, ...]

    def digest(self) -> str:
        """The sha256 of the data set, which covers every byte of its shards and indices."""
        return self._digest

    @cached_property  # as a data set may have 100,000 shards
    def _digest(self) -> str:
        return hashlib.sha256(canonical(self.as_dict())).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, in order; `asdict` copies them, which takes seconds."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"shards": [vars(shard) for shard in self.shards]}


def read_manifest(url: str | Path) -> Manifest:
    """Read the manifest of the data set at `url`; DataError if it is missing or unreadable."""
    place = storage.join(url, MANIFEST)
    try:
        raw = json.loads(storage.read_bytes(place))
        version, digest = raw["format_version"], raw.pop("digest", None)  # older ones have none
        if version not in (1, 2) or version != format_of(raw["members"]):
            known = "this version of sepdist reads 1 and, with sources beside mix, 2"
            raise DataError(f"{place}: is of format {version}, {known}; write it again")
        lists = {name: tuple(raw[name]) for name in ("members", "speakers")}
        shards = tuple(ShardInfo(**shard) for shard in raw["shards"])
        for shard in shards:  # names of local copies too: nothing may lead out of the cache
            if not SHARD.fullmatch(f"{shard.name} {shard.sha256}"):
                raise DataError(f"{place}: {shard.name!r}, {shard.sha256!r} is no shard")
        manifest = Manifest(**raw | lists | {"shards": shards})
        total = sum(shard.num_samples for shard in manifest.shards)
    except FileNotFoundError:
        todo = f"run sepdist shard write ... output={url} (finished shards are kept)"
        raise DataError(f"no {MANIFEST} in {url}: not a finished data set; {todo}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
        todo = "restore it or write it again"
        raise DataError(f"{place}: is not a readable manifest ({error}); {todo}") from error
    if manifest.num_samples != total or total < 1:
        counts = f"it counts {manifest.num_samples} samples and its shards {total}"
        raise DataError(f"{place}: was changed, {counts}")
    if digest not in (None, manifest.digest()):
        raise DataError(f"{place}: was changed or damaged, its digest is not {digest}; restore it")
    return manifest


def dump(value: dict[str, Any]) -> bytes:
    """Return JSON for people; bytes of file names that are not UTF-8 are \\udcXX in it."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")


def canonical(value: Any) -> bytes:
    """Return the JSON that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
