"""Decode, check, resample and level NumPy waveforms.

Waves are float32 [T] with full scale 1.0. Nothing here draws at random or knows of
corpora or shards. SciPy and pyloudnorm take seconds to import and are imported where they are used.

Shapes: T samples, C channels.
"""

import itertools
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

logger = logging.getLogger(__name__)
READABLE = re.compile(
    r"\.(wave?|bwf|flac|aif[cf]?|au|caf|mp[123]|nist|og[ag]|opus|rf64|snd|sph|voc|w64)"
)
UNREADABLE = re.compile(  # by libsndfile; most of these by PyAV
    r"\.(3g[2p]|aac|ac3|amr|ape|avi|flv|m4[abv]|mk[av]|mov|mp4|mpe?g|shn|tta|webm|wm[av]|wv[12]?)"
)
NEVER_READ = re.compile(r"\.(dff|dsf|pcm|raw)")  # without a header or a decoder
# The beginnings of what PyAV reads, whatever its name; of FFmpeg's readers those that never open
# another file or an address, as playlists make them do.
_CONTAINER = re.compile(
    rb".{4}(?:ftyp|moov|mdat|wide|free|skip)|\x1a\x45\xdf\xa3|\xff[\xf0\xf1\xf8\xf9]|\x0b\x77|#!AMR"
    rb"|\x30\x26\xb2\x75|MAC |wvpk|TTA1|FLV|RIFF.{4}AVI |\0\0\x01\xba|G.{187}G",
    re.DOTALL,
)
_DEMUXERS = "mov,matroska,webm,aac,ac3,eac3,amr,asf,ape,wv,tta,flv,avi,mpeg,mpegts"
SILENCE = 2.0**-15  # one step of 16-bit audio: a wave with a lower peak would be stored as zeros
MIN_LOUDNESS_SECONDS = 0.4  # one gating block of ITU-R BS.1770
MAX_OVERSHOOT = 2.0  # highest peak that resampling or a lossy codec gives full scale (`clip`)
# What libsndfile logs of a header that declares more than the file has: (declared, there).
_SHORT = re.compile(
    r"(?:\b(?:data|SSND|BODY|riff|Riff size|Data Size) *:|Data length) (\d+) \(?should be (\d+)"
    r"|[Ss]eems to be (?:a )?truncated"
)
_XING = re.compile(rb"(\xff[\xe2-\xff]..\0{9,34})(?:Xing|Info)", re.DOTALL)

_clipped = itertools.count(1)


class AudioError(ValueError):
    """Audio that is missing, undecodable, empty, silent, NaN, too short or at a wrong rate."""


def load_channel(
    path: str | Path, stop: int = -1, *, may_be_silent: bool = False
) -> tuple[np.ndarray, int]:
    """Load and `check` the first channel of a file, float32 [T]; returns it and its rate in Hz.

    `stop` is the number of samples to read (-1: all).
    """
    with open_sound(path) as sound:
        try:
            wave_TC = sound.read(sound.frames if stop < 0 else stop, "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: cannot be decoded ({error}); fetch it again") from error
        except MemoryError as error:
            told = f"its header declares {sound.frames} samples, more than the memory holds"
            raise AudioError(f"{path}: {told}; fetch or cut the file") from error
        if (size := len(wave_TC)) < sound.frames and size != stop:
            raise AudioError(
                f"{path}: cut short, {size} of {sound.frames} samples decode; fetch it again"
            )
        wave_T = np.ascontiguousarray(wave_TC[:, 0])
        return check(wave_T, str(path), may_be_silent=may_be_silent), sound.samplerate


def open_sound(path: str | Path, scratch: str | Path | None = None) -> soundfile.SoundFile:
    """Open an audio file; its `frames` are those that can be decoded if the file is whole.

    AudioError for a file that cannot be opened, that is cut short (`_is_cut`) or whose header
    declares no length. MP3 files are decoded to the end to count them; m4a, webm and other
    containers are decoded into a temporary file in the folder `scratch`, removed when it is closed.
    """
    if not Path(path).is_file():
        raise AudioError(f"{path}: no such file; check the corpus's root and that it is complete")
    with open(path, "rb") as file:
        if _CONTAINER.match(file.read(256)):
            return _decoded(path, scratch)
    try:
        # Not by its name: *.raw would have no header, and not every name is UTF-8.
        sound = soundfile.SoundFile(os.open(path, os.O_RDONLY))
        if sound.format == "MP3":
            sound = _counted_mp3(path, sound)
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        with open(path, "rb") as file:
            shorten = b"embedded-shorten" in file.read(1024)
        todo = "sph2pipe -f wav IN OUT undoes shorten" if shorten else "fetch the file again"
        raise AudioError(f"{path}: cannot be decoded ({reason}); {todo}") from error
    if _is_cut(path, sound):
        raise AudioError(f"{path}: cut short, its header declares more; fetch the file again")
    if sound.frames > 2**14 * os.path.getsize(path):  # more than FLAC's silence
        raise AudioError(f"{path}: its header declares no length; convert it, to WAV for example")
    return sound


class Decoded(soundfile.SoundFile):
    """What PyAV decoded, with the codec's depth as its subtype and a note for the user."""

    subtype, note = "PCM_16", ""


def _decoded(path: str | Path, scratch: str | Path | None) -> Decoded:
    """Decode the first audio track of a file with PyAV into a temporary file of float32."""
    try:
        import av
    except ImportError as error:
        wanted = "run: pip install av (the extra `av` has it), or convert it to WAV"
        raise AudioError(f"{path}: only PyAV decodes this kind of file: {wanted}") from error
    to_floats: Any = av.AudioResampler(format="flt")
    out, end = None, 0.0
    with tempfile.NamedTemporaryFile(dir=scratch) as temp, open(path, "rb") as file:
        try:
            options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": ""}
            opened: Any = av.open(file, options=options, metadata_errors="ignore")
            with opened as container:
                if not (tracks := container.streams.audio) or not tracks[0].codec_context:
                    raise AudioError(f"{path}: it has no audio track that can be decoded")
                codec, depth = tracks[0].codec_context.codec, tracks[0].codec_context.format
                promised = ((container.start_time or 0) + (container.duration or 0)) / 1e6
                if not container.format.name.startswith(("mov", "matroska")):
                    promised = 0.0  # others only guess their length
                for packet in container.demux():  # all tracks: the longest ends with the file
                    if packet.pts is not None:
                        last = (packet.pts + (packet.duration or 0)) * packet.time_base
                        end = max(end, float(last))
                    for frame in packet.decode() if packet.stream is tracks[0] else ():
                        for part in to_floats.resample(frame):
                            wave_TC = part.to_ndarray().reshape(-1, part.layout.nb_channels)
                            out = out or soundfile.SoundFile(
                                *(temp.name, "w", part.sample_rate, wave_TC.shape[1], "FLOAT"),
                                format="W64",
                            )
                            out.write(wave_TC)
        except av.FFmpegError as error:
            reason = f"{error.strerror or error}"
            raise AudioError(f"{path}: cannot be decoded ({reason}); fetch it again") from error
        except soundfile.LibsndfileError as error:
            raise OSError(f"its audio cannot be stored ({error}); is the disk full?") from error
        if out is None:
            raise AudioError(f"{path}: its audio track is empty")
        out.close()
        sound = Decoded(os.open(temp.name, os.O_RDONLY))
    if end < promised - 0.5:
        raise AudioError(f"{path}: cut short, {end:.1f} of {promised:.1f} s; fetch it again")
    if codec.lossless and not codec.lossy and depth.bytes > 2:
        sound.subtype = "PCM_24"
    if len(tracks) > 1:
        sound.note = f"the first of {len(tracks)} audio tracks is taken"
    return sound


def _is_cut(path: str | Path, sound: soundfile.SoundFile) -> bool:
    """Whether a header declares more samples than the file has, or an Ogg stream has no last page.

    Headers of WAV (RF64, W64), AIFF, AU, CAF, SVX, WVE, VOC, MAT4 and NIST SPHERE files. Lengths of
    0x7ffff000 to 0x80000000 and from 0xfffff000 declare nothing: their program could not go back.
    """
    for declared, there in _SHORT.findall(sound.extra_info):
        unknown = 0x7FFFF000 <= int(declared or 0) <= 0x80000000 or int(declared or 0) >= 0xFFFFF000
        if not declared or (int(declared) > int(there) and not unknown):
            return True
    with open(path, "rb") as file:
        if sound.format == "NIST":
            found = re.search(rb"sample_count -i (\d+)", file.read(1024))
            return found is not None and int(found[1]) > sound.frames
        if sound.format == "OGG":
            file.seek(max(0, file.seek(0, 2) - 2**16))  # no page is longer
            page = file.read().rpartition(b"OggS")[2].ljust(23, b"\0")
            return not page[1] & 4 or len(page) < 23 + page[22] + sum(page[23 : 23 + page[22]])
    return False


class _Endless(BytesIO):
    """Bytes that claim to go on, so that libsndfile's guess of an MP3's length is far too long."""

    def seek(self, offset: int, whence: int = 0) -> int:
        at_end = (offset, whence) == (0, 2)
        return super().seek(2**40) if at_end else super().seek(offset, whence)


def _counted_mp3(path: str | Path, sound: soundfile.SoundFile) -> soundfile.SoundFile:
    """Return `sound`, or one with all samples where its Xing header is missing or counts too few.

    Without that header libsndfile guesses the length from the first frame's bit rate.
    """
    data = Path(path).read_bytes()
    bare = _XING.sub(rb"\1\0\0\0\0", data, count=1)
    whole, count = soundfile.SoundFile(_Endless(bare)), 0
    while size := len(whole.read(2**16)):
        count += size
    if bare != data and count < sound.frames + 4 * 1152:  # that much is trimmed by some encoders
        return sound
    whole.seek(0)
    whole._info.frames = count
    return whole


def duration_seconds(path: str | Path) -> float:
    """Read a file's duration from its header; only MP3 is decoded."""
    with open_sound(path) as sound:
        return sound.frames / sound.samplerate


def check(wave_T: np.ndarray, name: str, *, may_be_silent: bool = False) -> np.ndarray:
    """Return the wave; AudioError naming it if it is empty, not finite, silent or at another scale.

    Full scale is 1. Between its samples a wave is higher: by 3 dB for a sine at a quarter of the
    rate (ITU-R BS.1770-4, annex 2), by 5 dB for noise clipped hard (through the resamplers here).
    So 6 dB above full scale are allowed, `MAX_OVERSHOOT`.
    """
    if wave_T.size == 0:
        raise AudioError(
            f"{name}: empty, it has no samples; fetch the file again or leave it out (a recorder "
            "that was killed leaves a header to repair: ffmpeg -ignore_length 1 -i IN OUT)"
        )
    peak = float(np.max(np.abs(wave_T)))
    if not np.isfinite(peak):
        at = int(np.argmin(np.isfinite(wave_T)))
        raise AudioError(
            f"{name}: NaN or infinite, first at sample {at}; fetch the file again or leave it out"
        )
    if peak < SILENCE and not may_be_silent:
        raise AudioError(
            f"{name}: silent, its peak {peak:.2g} is below one 16-bit step; leave it out"
        )
    if peak > MAX_OVERSHOOT:
        raise AudioError(
            f"{name}: outside [-1, 1], its peak is {peak:.4g}; lower its gain, or "
            "divide floats at the scale of 16-bit integers by 32768"
        )
    return wave_T


def clip(wave_T: np.ndarray, name: str) -> np.ndarray:
    """Clip the overshoot that `check` allows, float32; logs the 1st, 10th, 100th, ... such wave."""
    if (peak := float(np.max(np.abs(wave_T)))) > 1.0:
        number = next(_clipped)
        if str(number).strip("0") == "1":
            logger.warning("%s: clipped, its peak is %.4g (%d clipped so far)", name, peak, number)
        check(wave_T, name)
    return np.clip(wave_T, -1.0, 1.0).astype(np.float32, copy=False)


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
    missing = num_samples - wave_T.size
    return np.pad(wave_T, (0, missing)) if missing > 0 else wave_T[:num_samples]


def peak_of_sum(waves: Sequence[np.ndarray], gains: Sequence[float]) -> float:
    """Peak of the sum of scaled waves, in float64, each zero-padded to the longest."""
    total = np.zeros(max(wave.size for wave in waves))
    for wave, gain in zip(waves, gains, strict=True):
        total[: wave.size] += gain * wave
    return float(np.max(np.abs(total)))


def find_files(folder: str | Path, *, containers: bool = False) -> list[Path]:
    """Every audio file below a local folder, sorted by path; AudioError if none.

    Links to folders are followed. Left out, counted and logged are hidden files, formats that
    libsndfile does not read (unless `containers` are wanted), and compressed copies beside a .wav
    or .flac file of the same name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        siblings = sorted(path.name for path in folder.parent.glob("*/"))
        there = ", ".join(siblings[:8]) or "no folder"
        raise AudioError(
            f"{folder}: no such folder (its parent holds {there}); check the root and the split"
        )
    found, left_out = list[Path](), Counter[str]()
    for path in sorted(_walk(folder)):
        suffix = path.suffix.lower()
        unreadable = bool(UNREADABLE.fullmatch(suffix))
        if (unreadable and not containers) or NEVER_READ.fullmatch(suffix):
            left_out[f"{suffix} (cannot be decoded here)"] += 1
        elif unreadable or READABLE.fullmatch(suffix):
            beside = {path.with_suffix(".wav"), path.with_suffix(".flac")}
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                left_out["hidden (._*)"] += 1
            elif path not in beside and any(other.is_file() for other in beside):
                left_out[f"{suffix} beside the same in .wav or .flac"] += 1
            else:
                found.append(path)
    if left_out:
        counts = ", ".join(f"{count} {what}" for what, count in left_out.items())
        logger.warning("%s: %d audio files are read; left out: %s", folder, len(found), counts)
    if not found:
        known = READABLE.pattern
        raise AudioError(f"{folder}: no audio file ({known}) below it; check the root and split")
    return found


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder, also through links, except into folders that hold them."""
    here = above | {os.path.realpath(folder)}
    for entry in os.scandir(folder):
        if not entry.is_dir():
            yield Path(entry.path)
        elif os.path.realpath(entry.path) not in here:
            yield from _walk(Path(entry.path), here)
