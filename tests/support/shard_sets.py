"""Small data sets of random audio, written, read back, listed and damaged."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sepdist import storage
from sepdist.data import shards
from sepdist.data.members import DataError, misfits
from sepdist.data.records import Mixture, Utterance
from sepdist.data.shards import Manifest, ShardInfo

RATE = 8000


def waves_of(
    number: int, members: tuple[str, ...] = ("s1", "s2", "noise")
) -> dict[str, np.ndarray]:
    """16-bit audio as float32, with a length of its own and both ends of the scale."""
    random, waves = np.random.default_rng(number), {}
    for member in members:
        pcm = random.integers(-(2**15), 2**15, size=400 + 40 * number)
        pcm[:2] = (-(2**15), 2**15 - 1)
        waves[member] = (pcm / 2**15).astype(np.float32)
    return waves


def mixture(number: int, **changes: object) -> Mixture:
    speakers, texts = (f"anna{number}", "bertil"), ("hej då", "good bye")
    record = Mixture(f"utt-{number}", speakers, RATE, partial(waves_of, number), texts)
    return dataclasses.replace(record, **changes)


def never(*_: object) -> dict[str, np.ndarray]:
    raise AssertionError("loaded")


def holding(waves: Mapping[str, np.ndarray], speakers: tuple[str, ...] = ("a", "b")) -> Mixture:
    return Mixture(id="broken-7", speakers=speakers, sample_rate=RATE, load=lambda: waves)


def write_shard(
    records: Sequence[Utterance | Mixture], output_url: str | Path, name: str
) -> ShardInfo:
    """`try_shard` of records that must all be stored; DataError names those that cannot be."""
    if not records:
        raise DataError(f"{name}: no records; a shard holds at least one")
    for problem in misfits(records).values():
        raise DataError(problem)
    shard, bad, _ = shards.try_shard(records, output_url, name)
    if shard is None:
        raise DataError("\n".join(bad))
    return shard


def write(url: str | Path, num_shards: int = 2, per_shard: int = 3) -> Manifest:
    """Write a small data set of mixtures 0, 1, ..."""
    infos = []
    for i in range(num_shards):
        records = [mixture(i * per_shard + j) for j in range(per_shard)]
        infos.append(write_shard(records, url, shards.shard_name("toy", "train", i)))
    return shards.write_manifest(url, "toy", "train", RATE, infos)


def contents(url: str | Path) -> dict[str, str]:
    """The sha256 of everything below a url."""
    found = {}
    for name in storage.list_names(url):
        below = contents(storage.join(url, name))
        if below:
            found |= {f"{name}/{key}": value for key, value in below.items()}
        else:
            found[name] = hashlib.sha256(storage.read_bytes(storage.join(url, name))).hexdigest()
    return found


def read(
    path: Path, sample: shards.Sample, members: list[str], *bounds: int | None
) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        return shards.read_sample(file, sample, members, *bounds)  # type: ignore[arg-type]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
