"""The files of one sample: a record in, its members out as bytes; and back, the bytes of a member in, audio out.

A sample is <id>.json and one <id>.<member>.flac of 16-bit mono audio per member: s1, s2, ... and possibly "noise",
whose sum is the mixture, or "mix" alone; beside the sources e1, e2, ..., their estimates by a separator. What cannot be
stored is refused here, by the name of the record.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
import soundfile

from sepdist import audio
from sepdist.data.records import Mixture, Utterance

_FULL_SCALE = 2**15
_MAX_NAME_BYTES = 100  # of a member of a ustar archive
_ID = re.compile(r"[^./\x00-\x1f\x7f]+")
_NUMBERED = re.compile(r"[se][1-9][0-9]*")


class DataError(ValueError):
    """A record, a shard or a data set is not what it should be; the message names it and says what to do."""


def people(record: Utterance | Mixture) -> tuple[list[str], list[str]]:
    """The speakers and the texts of a record, without loading it."""
    if isinstance(record, Utterance):
        return [record.speaker], [record.text] if record.text else []
    return list(record.speakers), list(record.texts)


def in_order(members: Sequence[str]) -> tuple[str, ...]:
    """The names of audio members as people count them: s1, s2, ..., s10, noise, e1, e2."""

    def place(name: str) -> tuple[int, int]:
        return ("s_e".index(name[0]), int(name[1:])) if _NUMBERED.fullmatch(name) else (1, 0)

    return tuple(sorted(members, key=place))


def split_members(members: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The sources, the estimates and the rest of some names of members, in their order."""
    numbered = [name for name in members if _NUMBERED.fullmatch(name)]
    sources = [name for name in numbered if name[0] == "s"]
    return (
        sources,
        [name for name in numbered if name[0] == "e"],
        [name for name in members if name not in numbered],
    )


def check_ids(records: Sequence[Utterance | Mixture]) -> None:
    """DataError unless the records may share a shard: usable and different ids, one sample rate."""
    seen = set[str]()
    for record in records:
        what = f"record {record.id!r}"
        if not _ID.fullmatch(record.id):
            raise DataError(
                f"{what}: '.', '/' and control characters are not allowed, WebDataset ends a key at a dot"
            )
        if len(f"{record.id}.noise.flac".encode()) > _MAX_NAME_BYTES:
            raise DataError(
                f"{what}: the id is too long, a name in a tar has at most {_MAX_NAME_BYTES} bytes"
            )
        if record.id in seen:
            raise DataError(f"{what}: occurs twice; every id of a data set is different")
        if record.sample_rate != records[0].sample_rate:
            rates = f"{record.sample_rate} Hz after records of {records[0].sample_rate} Hz"
            raise DataError(f"{what}: {rates}; set one sample_rate in the corpus")
        seen.add(record.id)


def load_members(record: Utterance | Mixture) -> dict[str, np.ndarray]:
    """The audio of a record as it is stored: int16 [T] by member, in order; DataError names what cannot be stored."""
    loaded = record.load()
    waves: Mapping[str, np.ndarray] = loaded if isinstance(loaded, Mapping) else {"s1": loaded}
    what = f"record {record.id!r}"
    sources, estimates, rest = split_members(in_order(list(waves)))
    numbered = sources == [f"s{i + 1}" for i in range(len(sources))]
    matching = not estimates or estimates == [f"e{i + 1}" for i in range(len(sources))]
    if not (
        numbered and matching and rest in ([], ["noise"])
        if sources
        else rest == ["mix"] and not estimates
    ):
        there = ", ".join(waves) or "nothing"
        wanted = (
            "s1, s2, ... and possibly noise, and e1, e2, ... for each of them or none; or mix alone"
        )
        raise DataError(f"{what}: its parts are {there}; give {wanted}")
    num_speakers = len(people(record)[0])
    if sources and num_speakers != len(sources):
        raise DataError(f"{what}: names {num_speakers} speakers and has {len(sources)} sources")
    checked = {name: _to_int16(waves[name], f"{what}, {name}") for name in in_order(list(waves))}
    lengths = {name: len(wave) for name, wave in checked.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{what}: its parts have different lengths, {lengths}; cut or pad them in the corpus"
        )
    return checked


def _to_int16(wave_T: np.ndarray, what: str) -> np.ndarray:
    if not isinstance(wave_T, np.ndarray) or wave_T.ndim != 1 or wave_T.dtype.kind != "f":
        found = f"{getattr(wave_T, 'dtype', type(wave_T).__name__)} {list(np.shape(wave_T))}"
        raise DataError(f"{what}: is {found}, wanted is a one-dimensional array of floats")
    try:
        audio.check(wave_T, what)
    except audio.AudioError as error:
        raise DataError(str(error)) from error
    peak = float(np.max(np.abs(wave_T)))
    if peak > 1.0:
        raise DataError(f"{what}: outside [-1, 1], its peak is {peak:.4g}; scale it in the corpus")
    # Not by libsndfile, which multiplies by 32767 and reads back by 32768: 16-bit audio would not survive that.
    return np.clip(
        np.rint(wave_T.astype(np.float64) * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1
    ).astype(np.int16)


def encode(record: Utterance | Mixture, waves: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """The files of a sample by suffix ("s1.flac", "json"), sorted; equal input gives equal bytes."""
    speakers, texts = people(record)
    facts = {
        "id": record.id,
        "speakers": speakers,
        "texts": texts,
        "num_samples": len(next(iter(waves.values()))),
        "sample_rate": record.sample_rate,
    }
    if isinstance(record, Mixture) and record.measure is not None:
        facts |= record.measure(waves)
    files = {"json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()}
    for member, wave in waves.items():
        stream = io.BytesIO()
        soundfile.write(stream, wave, record.sample_rate, format="FLAC", subtype="PCM_16")
        files[f"{member}.flac"] = stream.getvalue()
    return dict(sorted(files.items()))


def decode(data: bytes, num_samples: int, start: int, stop: int, place: str) -> np.ndarray:
    """The samples `start` to `stop` of a FLAC member of `num_samples`: float32 [stop - start], full scale 1.0.

    Damage is a DataError that begins with `place`. FLAC's checksum of each frame finds a flipped bit.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as stream:
            if stream.frames != num_samples:
                raise DataError(
                    f"{place}: damaged, has {stream.frames} samples where the index says {num_samples}"
                )
            stream.seek(start)
            wave = stream.read(stop - start, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise DataError(
            f"{place}: damaged, {error}; fetch the shard again or write it again"
        ) from error
    if wave.shape != (stop - start,):
        raise DataError(
            f"{place}: damaged, gives {list(wave.shape)} where [{stop - start}] is wanted"
        )
    return wave
