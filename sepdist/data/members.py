"""The files of one sample: encode a record into bytes, decode a member back into audio.

A sample is <id>.json and one 16-bit mono <id>.<member>.flac per member. The members are s1, s2,
... and optionally noise, whose sum is the mixture; or mix alone. In format 2 a mix stands beside
the sources, of which it is not the sum. Estimates e1, e2, ... of a separator may accompany the
sources. A record that cannot be stored is refused here, by name.
"""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
import soundfile

from sepdist import audio
from sepdist.data.records import Mixture, Utterance

_FULL_SCALE = 2**15
_MAX_NAME_BYTES = 100  # of a file in a ustar archive
_ID = re.compile(r"[^./\x00-\x1f\x7f]+")
_NUMBERED = re.compile(r"[se][1-9][0-9]*")
_WANTED = "s1, s2, ..., possibly noise and mix, and e1, e2, ... for all or none; or mix alone"


class DataError(ValueError):
    """A record, a shard or a data set is invalid; the message names it and says what to do."""


# What `load` raises where the record is bad, rather than the storage.
BAD = (ValueError, soundfile.LibsndfileError, FileNotFoundError, PermissionError)


def people(record: Utterance | Mixture) -> tuple[list[str], list[str]]:
    """Speakers and texts of a record, without loading its audio."""
    if isinstance(record, Utterance):
        return [record.speaker], [record.text] if record.text else []
    return list(record.speakers), list(record.texts)


def split_members(members: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split member names into sources and estimates, by their numbers, and noise, mix."""
    numbered = sorted(filter(_NUMBERED.fullmatch, members), key=lambda name: int(name[1:]))
    sources = [name for name in numbered if name[0] == "s"]
    estimates = [name for name in numbered if name[0] == "e"]
    return sources, estimates, sorted({*members}.difference(numbered), reverse=True)


def format_of(members: Sequence[str]) -> int:
    """The format version of a data set: 2 where `mix` stands beside sources, else 1."""
    return 2 if {"mix", "s1"} <= {*members} else 1


def misfits(records: Sequence[Utterance | Mixture]) -> dict[int, str]:
    """Say by number why records do not fit in one data set: valid unique ids, one rate."""
    seen, found = set[str](), dict[int, str]()
    for number, record in enumerate(records):
        if not _ID.fullmatch(record.id):
            found[number] = (
                "an id is not empty and has no '.', '/' or control character, because a "
                "WebDataset key ends at the first dot; rename it in the corpus"
            )
        elif len(f"{record.id}.noise.flac".encode()) > _MAX_NAME_BYTES:
            limit = f"a file name in a tar has at most {_MAX_NAME_BYTES} bytes"
            found[number] = f"the id is too long, {limit}"
        elif record.id in seen:
            found[number] = "occurs twice; ids are unique in a data set"
        elif record.sample_rate != records[0].sample_rate:
            rates = f"{record.sample_rate} Hz after records of {records[0].sample_rate} Hz"
            found[number] = f"{rates}; set one sample_rate in the corpus"
        seen.add(record.id)
    return {number: f"record {records[number].id!r}: {why}" for number, why in found.items()}


def load_members(record: Utterance | Mixture) -> dict[str, np.ndarray]:
    """Load the members of a record: int16 [T], in order; DataError names what cannot be stored."""
    loaded = record.load()
    waves: Mapping[str, np.ndarray] = loaded if isinstance(loaded, Mapping) else {"s1": loaded}
    what = f"record {record.id!r}"
    sources, estimates, rest = split_members(list(waves))
    names = [*sources, *rest, *estimates]  # s1, s2, ..., s10, noise, mix, e1, e2, ...
    numbers = range(1, len(sources) + 1)
    fine = (
        sources == [f"s{i}" for i in numbers]
        and estimates in ([], [f"e{i}" for i in numbers])
        and ({*rest} <= {"noise", "mix"} if sources else rest == ["mix"])
    )
    if not fine:
        raise DataError(f"{what}: its members are {', '.join(names) or 'nothing'}; give {_WANTED}")
    num_speakers = len(people(record)[0])
    if sources and num_speakers != len(sources):
        raise DataError(f"{what}: names {num_speakers} speakers and has {len(sources)} sources")
    may = isinstance(record, Mixture) and record.may_be_silent
    stored = {name: _to_int16(waves[name], f"{what}, {name}", may_be_silent=may) for name in names}
    if not any(stored[name].any() for name in sources or rest):
        raise DataError(f"{what}: all its sources are silent; leave it out")
    lengths = {name: len(wave) for name, wave in stored.items()}
    if len(set(lengths.values())) > 1:
        todo = "cut or pad them in the corpus"
        raise DataError(f"{what}: its members have different lengths, {lengths}; {todo}")
    return stored


def _to_int16(wave_T: np.ndarray, what: str, may_be_silent: bool) -> np.ndarray:
    if not isinstance(wave_T, np.ndarray) or wave_T.ndim != 1 or wave_T.dtype.kind != "f":
        found = f"{getattr(wave_T, 'dtype', type(wave_T).__name__)} {list(np.shape(wave_T))}"
        raise DataError(f"{what}: is {found}, not a one-dimensional array of floats")
    try:
        audio.check(wave_T, what, may_be_silent=may_be_silent)
    except audio.AudioError as error:
        raise DataError(str(error)) from error
    if (peak := float(np.abs(wave_T).max())) > 1.0:
        raise DataError(f"{what}: outside [-1, 1], its peak is {peak:.4g}; scale it in the corpus")
    # Not by libsndfile, which multiplies by 32767 and divides by 32768: 16-bit audio would change.
    scaled = np.rint(wave_T.astype(np.float64) * _FULL_SCALE)
    return np.clip(scaled, -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)


def encode(record: Utterance | Mixture, waves: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Encode the files of a sample by suffix, sorted; equal input gives equal bytes."""
    speakers, texts = people(record)
    metadata = {
        "id": record.id,
        "speakers": speakers,
        "texts": texts,
        "num_samples": len(next(iter(waves.values()))),
        "sample_rate": record.sample_rate,
    }
    may = isinstance(record, Mixture) and record.may_be_silent
    if silent := [name for name, wave in waves.items() if may and not wave.any()]:
        metadata["silent"] = silent
    if isinstance(record, Mixture) and record.metadata is not None:
        metadata |= record.metadata(waves)
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False)
    files = {"json": text.encode()}
    for member, wave in waves.items():
        stream = io.BytesIO()
        soundfile.write(stream, wave, record.sample_rate, format="FLAC", subtype="PCM_16")
        files[f"{member}.flac"] = stream.getvalue()
    return dict(sorted(files.items()))


def decode(data: bytes, num_samples: int, start: int, stop: int, place: str) -> np.ndarray:
    """Decode samples [start, stop) of a FLAC member of `num_samples`: float32, full scale 1.0.

    Damage raises a DataError that begins with `place`; FLAC's frame checksums detect a flipped bit.
    """
    damaged = f"{place}: damaged,"
    wave = np.empty(stop - start, np.float32)
    # A file in memory: of a BytesIO each read would call back into Python, which holds the GIL.
    file = os.memfd_create("member")
    try:
        os.pwrite(file, data, 0)
        with soundfile.SoundFile(file, closefd=False) as stream:
            if (found := stream.frames * stream.channels) != num_samples:
                raise DataError(f"{damaged} has {found} samples, the index says {num_samples}")
            stream.seek(start)
            size = stream.buffer_read_into(wave, "float32")
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        raise DataError(f"{damaged} {reason}; fetch the shard again or write it again") from error
    finally:
        os.close(file)
    if size != len(wave):
        raise DataError(f"{damaged} decodes to {size} of {len(wave)} samples")
    return wave
