"""Small data sets whose audio shows its origin: sample t of s1 of mixture i is i * 300 + t."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sepdist.data import shards
from sepdist.data.records import Mixture
from sepdist.data.shards import Manifest
from tests.support.shard_sets import write_shard

RATE = 8000
SHORTEST = 40
_FULL_SCALE = 2**15


def num_samples(number: int) -> int:
    """The length of mixture `number`: 40 to 119 samples."""
    return SHORTEST + number * 37 % 80


def members(number: int) -> dict[str, np.ndarray]:
    """The members of mixture `number` as int16 values."""
    t = np.arange(num_samples(number))
    return {"s1": number * 300 + t, "s2": -number * 100 - 2 * t, "noise": t % 7 - 3}


def as_float(values: np.ndarray) -> np.ndarray:
    return (values / _FULL_SCALE).astype(np.float32)


def identify(first_value: float) -> tuple[int, int]:
    """Return (mixture number, t) of a value of s1."""
    return divmod(round(first_value * _FULL_SCALE), 300)


def write(
    url: str | Path, sizes: Sequence[int], names: Sequence[str] = ("s1", "s2", "noise")
) -> Manifest:
    """Write mixtures 1, 2, ... in shards of `sizes`; names ("mix",) store s1 as the mixture."""
    infos, number = [], 1
    for i, size in enumerate(sizes):
        records = [record(one, names) for one in range(number, number + size)]
        infos.append(write_shard(records, url, shards.shard_name("toy", "train", i)))
        number += size
    return shards.write_manifest(url, "toy", "train", RATE, infos)


def record(number: int, names: Sequence[str]) -> Mixture:
    def load() -> dict[str, np.ndarray]:
        waves = {name: as_float(wave) for name, wave in members(number).items()}
        return {"mix": waves["s1"]} if names == ("mix",) else {name: waves[name] for name in names}

    num_speakers = 2 if names == ("mix",) else len([name for name in names if name != "noise"])
    speakers = (f"anna{number}", "bertil")[:num_speakers]
    return Mixture(id=f"mix-{number}", speakers=speakers, sample_rate=RATE, load=load)


def damage(tar: Path, sample: shards.Sample, member: str) -> int:
    """Damage the audio of a member in a shard on disk; returns the byte offset of the member."""
    offset, num_bytes = sample.members[member]
    data = bytearray(tar.read_bytes())
    # A FLAC file begins with metadata and ends with audio.
    last = slice(offset + num_bytes - 6, offset + num_bytes - 2)
    data[last] = bytes(byte ^ 0xFF for byte in data[last])
    tar.write_bytes(data)
    return offset
