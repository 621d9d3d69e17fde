"""Decode, check, resample and level NumPy waveforms.

Waves are float32 [T] with full scale 1.0. Nothing here draws at random or knows of
corpora or shards. SciPy and pyloudnorm take seconds to import and are imported where they are used.

Shapes: T samples, C channels.
"""

import os
import re
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

SUFFIXES = (".flac", ".wav")
SILENCE = 2.0**-15  # one step of 16-bit audio: a wave with a lower peak would be stored as zeros
MIN_LOUDNESS_SECONDS = 0.4  # one gating block of ITU-R BS.1770
# Containers of chunks by their first bytes: where the first chunk lies, the head of a chunk (name,
# length), and what the length is padded to.
_CHUNKS = {
    b"RIFF": (12, "<4sI", 2),
    b"RIFX": (12, ">4sI", 2),
    b"RF64": (12, "<4sI", 2),
    b"FORM": (12, ">4sI", 2),  # AIFF, AIFC, 8SVX, 16SV
    b"caff": (8, ">4sQ", 1),
    b"riff": (40, "<16sQ", 8),  # W64, whose lengths count the head
}
_PAGE_BYTES = 65307  # of the largest page of Ogg
_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # of MPEG-1 layer III
_LOW_KBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # of MPEG-2 and 2.5
_MP3_TAGS = (b"TAG", b"APETAGEX", b"LYRICS")  # may follow the last frame


class AudioError(ValueError):
    """Audio that is missing, undecodable, empty, silent, NaN, too short or at a wrong rate."""


def load_channel(path: str | Path, stop: int = -1) -> tuple[np.ndarray, int]:
    """Load and `check` the first channel of a file, float32 [T]; returns it and its rate in Hz.

    `stop` is the number of samples to read (-1: all).
    """
    with open_sound(path) as sound:
        try:
            wave_TC = sound.read(stop, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: cannot be decoded ({error}); fetch it again") from error
        if (size := len(wave_TC)) < sound.frames and size != stop:
            raise AudioError(
                f"{path}: cut short, {size} of {sound.frames} samples decode; fetch it again"
            )
        return check(np.ascontiguousarray(wave_TC[:, 0]), str(path)), sound.samplerate


def check_container(path: str | Path) -> None:
    """AudioError unless the samples that a file's header declares are there.

    Read are a few heads of chunks of WAV (RIFF, RIFX, RF64, W64), AIFF, CAF, SVX and AU files, and
    the last page of Ogg files, which has to be marked as the last. Lengths that a program writes
    when it does not know better declare nothing (0x7ffff000 to 0x80000000, 0xfffff000 and more).
    Other formats pass; `open_sound` looks at MP3 files, and the decoder at FLAC.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if (magic := file.read(4)) == b"OggS":
            file.seek(-min(size, _PAGE_BYTES), 2)
            page = b"OggS" + file.read().rpartition(b"OggS")[2]
            whole = len(page) > 26 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
            if not whole or not page[5] & 4:
                raise AudioError(f"{path}: cut short, its last page is missing; fetch it again")
            return
        start, length = _samples_place(file, magic, size)
    there = size - start
    if length > there and not 0x7FFFF000 <= length <= 0x80000000 and length < 0xFFFFF000:
        raise AudioError(
            f"{path}: cut short, its header declares {length} bytes of samples and {there} are "
            "there; fetch the file again"
        )


def _samples_place(file: BinaryIO, magic: bytes, size: int) -> tuple[int, int]:
    """Return where the samples start and how many bytes the header declares; (0, 0) if unknown."""
    if magic in (b".snd", b"dns."):
        head = file.read(8).ljust(8, b"\0")
        return struct.unpack(">2I" if magic == b".snd" else "<2I", head)
    place, head, align = _CHUNKS.get(magic, (size, "", 1))
    long_length = None  # of RF64, whose "data" does not say it
    while place < size:
        file.seek(place)
        start = place + struct.calcsize(head)
        if len(found := file.read(start - place)) < start - place:
            break
        name, length = struct.unpack(head, found)
        if magic == b"riff":
            length = max(0, length - len(found))
        if name == b"ds64":
            long_length = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
        if name[:4] in (b"data", b"SSND", b"BODY"):
            return start, length if long_length is None else long_length
        place = start + length + -length % align
    return 0, 0


def open_sound(path: str | Path) -> soundfile.SoundFile:
    """Open an audio file whose `frames` can be relied on; AudioError names what is wrong.

    The container is checked. An MP3 file without a frame count that is true (libsndfile guesses it
    from the bit rate of the first frame) is decoded with one, from memory.
    """
    if not Path(path).is_file():
        raise AudioError(f"{path}: no such file; check the corpus's root and that it is complete")
    check_container(path)
    try:
        # Not by its name: *.raw would have no header, and not every name is UTF-8.
        sound = soundfile.SoundFile(os.open(path, os.O_RDONLY))
        if sound.format == "MP3" and (counted := _count_mp3(path)):
            sound.close()
            sound = soundfile.SoundFile(BytesIO(counted))
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        raise AudioError(f"{path}: cannot be decoded ({reason}); fetch the file again") from error
    if sound.frames > 2**48:
        raise AudioError(f"{path}: its header does not declare its length; convert it, to WAV say")
    return sound


def _mp3_frame_bytes(head: int) -> int:
    """Length of the MPEG layer III frame with this 4-byte header; 0 if it is not one."""
    version, kbits, rate = head >> 19 & 3, head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 0x7FF or head >> 17 & 3 != 1 or version == 1 or kbits in (0, 15) or rate == 3:
        return 0
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    slots, table = (144000, _KBITS) if version == 3 else (72000, _LOW_KBITS)
    return slots * table[kbits - 1] // hertz + (head >> 9 & 1)


def _count_mp3(path: str | Path) -> bytes:
    """Return an MP3 file behind a Xing header with its true number of frames; b"" if it has one.

    AudioError if the file has fewer frames than its own header says, or stops within a frame.
    """
    data, places, at = Path(path).read_bytes(), list[int](), 0
    while at < len(data):
        if data.startswith(b"ID3", at):
            at += 10 + sum(byte << 7 * i for i, byte in enumerate(data[at + 9 : at + 5 : -1]))
        elif length := _mp3_frame_bytes(int.from_bytes(data[at : at + 4])):
            places.append(at)
            at += length
        else:
            break
    if not places:  # another layer of MPEG
        return b""
    first, rest = data[places[0] : places[0] + 200], data[at : at + 8].strip(b"\0")
    found = re.match(rb".{13,38}?(?:Xing|Info)...(.)(....)", first, re.DOTALL)
    declared = int.from_bytes(found[2]) if found and found[1][0] & 1 else 0
    count = len(places) - bool(found)
    if at > len(data) or declared > count + 1 or (rest and not rest.startswith(_MP3_TAGS)):
        raise AudioError(f"{path}: cut short or damaged after {count} MP3 frames; fetch it again")
    if declared == count:
        return b""
    # The highest bit rate, so that the header fits; no checksum, no padding.
    head = int.from_bytes(first[:4]) & ~0xF200 | 0x1E000
    side = (17, 9) if head >> 19 & 3 != 3 else (32, 17)
    xing = head.to_bytes(4) + bytes(side[head >> 6 & 3 == 3]) + b"Xing\0\0\0\1" + count.to_bytes(4)
    return xing.ljust(_mp3_frame_bytes(head), b"\0") + data[places[bool(found)] :]


def duration_seconds(path: str | Path) -> float:
    """Read a file's duration from its header, without decoding it."""
    with open_sound(path) as sound:
        return sound.frames / sound.samplerate


def check(wave_T: np.ndarray, name: str) -> np.ndarray:
    """Return the wave; AudioError naming it if it is empty, not finite or silent."""
    if wave_T.size == 0:
        raise AudioError(f"{name}: empty, it has no samples; fetch the file again or leave it out")
    peak = float(np.max(np.abs(wave_T)))
    if not np.isfinite(peak):
        at = int(np.argmin(np.isfinite(wave_T)))
        raise AudioError(
            f"{name}: NaN or infinite, first at sample {at}; fetch the file again or leave it out"
        )
    if peak < SILENCE:
        raise AudioError(
            f"{name}: silent, its peak {peak:.2g} is below one 16-bit step; leave it out"
        )
    return wave_T


def require_rate(rate: int, wanted: int, name: str, *, exactly: bool = False) -> None:
    """AudioError if audio at `rate` Hz cannot be used at `wanted` Hz, which must not be higher.

    Up-sampling would add no band. With `exactly` the two rates must be equal.
    """
    if rate < wanted or (exactly and rate != wanted):
        raise AudioError(
            f"{name}: its rate is {rate} Hz where {wanted} Hz is wanted; set sample_rate={rate} or "
            "convert it"
        )


def resample(wave_T: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample with soxr's very-high-quality filter: float32 [round(T * new_rate / rate)]."""
    wave_T = wave_T.astype(np.float32, copy=False)
    return wave_T if rate == new_rate else soxr.resample(wave_T, rate, new_rate, quality="VHQ")


def resample_poly(wave_T: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample with the polyphase filter of the LibriMix and WSJ0-mix recipes, in the wave's dtype.

    The length is ceil(T * new_rate / rate).
    """
    from scipy import signal

    return wave_T if rate == new_rate else signal.resample_poly(wave_T, new_rate, rate)


def rms(wave_T: np.ndarray) -> float:
    """Root mean square, computed in float64; 0 for an empty wave."""
    return float(np.sqrt(np.mean(np.square(wave_T, dtype=np.float64)))) if wave_T.size else 0.0


def loudness(wave_T: np.ndarray, rate: int, name: str = "the wave") -> float:
    """Integrated loudness in LUFS (ITU-R BS.1770-4); AudioError if too short or below its gate."""
    import pyloudnorm

    if wave_T.size < MIN_LOUDNESS_SECONDS * rate:
        seconds = f"{wave_T.size / rate:.2f} s, shorter than the {MIN_LOUDNESS_SECONDS} s"
        raise AudioError(f"{name}: lasts {seconds} that loudness needs; leave it out")
    measured = float(pyloudnorm.Meter(rate).integrated_loudness(wave_T))
    if not np.isfinite(measured):
        raise AudioError(f"{name}: below the loudness gate of -70 LUFS throughout; leave it out")
    return measured


def at_level_of(mixture_T: np.ndarray, wave_T: np.ndarray, max_peak: float = 1.0) -> np.ndarray:
    """Scale the wave to the mixture's RMS, or to a peak of `max_peak` if it would pass that."""
    if not (peak := float(np.abs(wave_T).max())) > 0:
        return wave_T
    return wave_T * np.float32(min(rms(mixture_T) / rms(wave_T), max_peak / peak))


def fit(wave_T: np.ndarray, num_samples: int) -> np.ndarray:
    """Cut the wave to `num_samples`, or zero-pad it at its end."""
    return np.pad(wave_T[:num_samples], (0, max(0, num_samples - wave_T.size)))


def peak_of_sum(waves: Sequence[np.ndarray], gains: Sequence[float]) -> float:
    """Peak of the sum of scaled waves, in float64, each zero-padded to the longest."""
    total = np.zeros(max(wave.size for wave in waves))
    for wave, gain in zip(waves, gains, strict=True):
        total[: wave.size] += gain * wave
    return float(np.max(np.abs(total)))


def find_files(folder: str | Path) -> list[Path]:
    """Every .wav and .flac file below a local folder, sorted by path; AudioError if none."""
    folder = Path(folder)
    if not folder.is_dir():
        siblings = sorted(path.name for path in folder.parent.glob("*/"))
        there = ", ".join(siblings[:8]) or "no folder"
        raise AudioError(
            f"{folder}: no such folder (its parent holds {there}); check the root and the split"
        )
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise AudioError(
            f"{folder}: no {' or '.join(SUFFIXES)} file below it; check the root and the split"
        )
    return found
