"""Decoding, errors, resampling, loudness and levels, against soundfile, SciPy and pyloudnorm."""

import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import pytest
import scipy.signal
import soundfile

from sepdist import audio
from sepdist.audio import AudioError


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def test_a_file_decodes_to_the_samples_that_were_written(tmp_path: Path) -> None:
    steps = np.arange(-300, 300, dtype=np.int16)
    soundfile.write(str(tmp_path / "a.flac"), steps, 8000, subtype="PCM_16")
    wave, rate = audio.load_channel(tmp_path / "a.flac")
    assert rate == 8000 and wave.dtype == np.float32
    np.testing.assert_array_equal(wave, steps / 32768)
    np.testing.assert_array_equal(audio.load_channel(tmp_path / "a.flac", 7)[0], steps[:7] / 32768)


def test_the_first_of_two_channels_is_taken(tmp_path: Path) -> None:
    both = np.stack([noise(500, 1), noise(500, 2)], axis=1)
    soundfile.write(str(tmp_path / "a.wav"), both, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(audio.load_channel(tmp_path / "a.wav")[0], both[:, 0])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "empty"),
        ([0.0, 0.0], "silent"),
        ([0.1, np.nan, np.nan], "sample 1"),
        ([0.1, 0.1, -np.inf], "sample 2"),
        ([0.1, -2.01], r"its peak is 2\.01"),
    ],
)
def test_a_bad_wave_is_an_error_that_names_the_file_and_the_fault(
    tmp_path: Path, samples: list[float], message: str
) -> None:
    path = tmp_path / "bad.wav"
    soundfile.write(str(path), np.array(samples, dtype=np.float32), 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"bad\.wav.*{message}"):
        audio.load_channel(path)


def test_a_missing_or_undecodable_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"nothing\.wav.*no such file"):
        audio.load_channel(tmp_path / "nothing.wav")
    (tmp_path / "torn.flac").write_bytes(b"fLaC and then nothing of use")
    for read in (audio.load_channel, audio.duration_seconds):
        with pytest.raises(AudioError, match=r"torn\.flac.*fetch"):
            read(tmp_path / "torn.flac")


# Every container and encoding of a kind: format, subtype, rate in Hz.
CONTAINERS = [
    *(("WAV", "PCM_16", 8000), ("WAV", "FLOAT", 8000), ("WAVEX", "PCM_24", 8000)),
    *(("WAV", "MS_ADPCM", 8000), ("RF64", "PCM_16", 8000), ("W64", "PCM_16", 8000)),
    *(("AIFF", "PCM_16", 8000), ("AIFF", "FLOAT", 8000), ("AU", "PCM_16", 8000)),
    *(("CAF", "PCM_16", 8000), ("SVX", "PCM_16", 8000), ("NIST", "PCM_16", 8000)),
    *(("VOC", "PCM_16", 8000), ("FLAC", "PCM_16", 8000), ("OGG", "VORBIS", 8000)),
    *(("OGG", "OPUS", 48000), ("MP3", "MPEG_LAYER_III", 16000)),
]


@pytest.mark.parametrize(("container", "subtype", "rate"), CONTAINERS)
def test_a_file_cut_short_is_refused_and_a_whole_one_read_in_every_container(
    tmp_path: Path, container: str, subtype: str, rate: int
) -> None:
    path, num_samples = tmp_path / "a.file", 40000
    soundfile.write(str(path), noise(num_samples), rate, format=container, subtype=subtype)
    size = audio.load_channel(path)[0].size
    # ADPCM fills its last block.
    assert size == num_samples or (subtype == "MS_ADPCM" and num_samples < size < num_samples + 512)
    whole = path.read_bytes()
    for left in (len(whole) // 3, len(whole) - 1000, len(whole) - 16):
        path.write_bytes(whole[:left])
        with pytest.raises(AudioError, match=r"a\.file: (cut short|cannot be decoded).*fetch"):
            audio.load_channel(path)


def wav(num_bytes: int, data: bytes, riff: int = 0, before: bytes = b"") -> bytes:
    """Write a 16-bit WAV file at 8 kHz whose header declares `num_bytes` of samples."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16)
    head = b"WAVE" + form + before + struct.pack("<4sI", b"data", num_bytes)
    return struct.pack("<4sI", b"RIFF", riff or len(head) + len(data)) + head + data


STEPS = np.arange(-400, 600, dtype="<i2")  # 2000 bytes
ODD = struct.pack("<4sI", b"odd ", 3) + b"abc\0"
LIST = struct.pack("<4sI", b"LIST", 10) + b"INFOISFT\0\0"


@pytest.mark.parametrize(
    "content",
    [
        *(wav(unknown, STEPS.tobytes()) for unknown in (2**32 - 1, 2**31 - 1, 2**31, 0x7FFFF000)),
        wav(2**32 - 1, STEPS.tobytes(), riff=2**32 - 1),
        wav(0, STEPS.tobytes(), riff=8),  # libsndfile's own header until a file is closed
        wav(2000, STEPS.tobytes(), before=ODD),
        wav(2000, STEPS.tobytes() + LIST),
        wav(2000, STEPS.tobytes() + LIST[:-3]),  # what is cut is no audio
        wav(2000, STEPS.tobytes() + b"junk behind"),
        b".snd" + struct.pack(">5I", 24, 2**32 - 1, 3, 8000, 1) + STEPS.astype(">i2").tobytes(),
    ],
)
def test_unknown_lengths_padding_and_chunks_behind_the_samples_are_no_fault(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    np.testing.assert_array_equal(audio.load_channel(tmp_path / "a.wav")[0], STEPS / 32768)
    audio.open_sound(tmp_path / "a.wav").close()
    assert audio.duration_seconds(tmp_path / "a.wav") == 0.125


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav(2002, STEPS.tobytes()), "cut short"),
        (wav(2002, STEPS.tobytes(), before=ODD), "cut short"),
        (wav(0x7FFFEFFF, STEPS.tobytes()), "cut short"),  # the largest length that declares
        (b"dns." + struct.pack("<5I", 24, 2002, 3, 8000, 1) + STEPS.tobytes(), "cut short"),
        (wav(0, STEPS.tobytes()), "empty.*killed.*ffmpeg"),
        (wav(0, b""), "empty"),
    ],
)
def test_a_header_that_declares_more_or_nothing_is_an_error(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=rf"a\.wav: {message}"):
        audio.load_channel(tmp_path / "a.wav")


def test_flac_that_does_not_know_its_length_is_refused(tmp_path: Path) -> None:
    soundfile.write(str(tmp_path / "a.flac"), noise(9000), 8000, subtype="PCM_16")
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # the 36 bits of the number of samples
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    for read in (audio.load_channel, audio.duration_seconds):
        with pytest.raises(AudioError, match=r"a\.flac: its header declares no length"):
            read(tmp_path / "a.flac")


@pytest.mark.parametrize("loud_first", [True, False])
def test_an_mp3_of_varying_bit_rate_is_read_whole_with_no_count_and_with_a_wrong_one(
    tmp_path: Path, loud_first: bool
) -> None:
    rate, path = 16000, tmp_path / "a.mp3"
    time = np.arange(3 * rate) / rate
    parts = [noise(rate) * 3, 0.05 * np.sin(2 * np.pi * 300 * time)]
    wave = np.concatenate(parts if loud_first else parts[::-1])
    soundfile.write(
        str(path), wave, rate, format="MP3", compression_level=0.5, bitrate_mode="VARIABLE"
    )
    counted = path.read_bytes()
    assert counted.count(b"Xing") == 1
    np.testing.assert_allclose(  # its count is true: nothing changes
        audio.load_channel(path)[0], soundfile.read(str(path), dtype="float32")[0], atol=1e-5
    )
    tag = b"ID3\4\0\0" + bytes([0, 0, 1, 5]) + bytes(133)
    for content, times in (
        (counted.replace(b"Xing", bytes(4)), 1),  # libsndfile guesses 0.4 or 1.8 times its length
        (tag + counted.replace(b"Xing", bytes(4)) + b"TAG" + bytes(125), 1),
        (counted + counted, 2),  # joined: the first header counts its own half
    ):
        path.write_bytes(content)
        read, _ = audio.load_channel(path)
        assert times * wave.size <= read.size < times * (wave.size + 4000)  # codecs add silence
        assert audio.duration_seconds(path) == read.size / rate
        expected = np.tile(wave, times)
        for second in range(4 * times):
            piece = slice(second * rate + 6000, (second + 1) * rate - 2000)
            assert audio.rms(read[piece]) == pytest.approx(audio.rms(expected[piece]), rel=0.1)
    path.write_bytes(counted[: len(counted) // 2])
    with pytest.raises(AudioError, match=r"a\.mp3: (cut short|cannot be decoded)"):
        audio.load_channel(path)


@pytest.mark.parametrize(
    ("container", "subtype", "factor"),
    [
        ("WAV", "FLOAT", 32768),
        ("WAV", "DOUBLE", 2**31),
        ("AIFF", "FLOAT", 128),
        ("CAF", "FLOAT", 9),
    ],
)
def test_floats_at_the_scale_of_integers_are_refused_with_their_peak(
    tmp_path: Path, container: str, subtype: str, factor: int
) -> None:
    wave = noise(4000) * factor
    soundfile.write(str(tmp_path / "a.file"), wave, 8000, format=container, subtype=subtype)
    peak = f"{np.abs(wave).max():.4g}".replace("+", r"\+")
    with pytest.raises(
        AudioError, match=rf"a\.file: outside \[-1, 1\], its peak is {peak};.*32768"
    ):
        audio.load_channel(tmp_path / "a.file")


def test_overshoot_is_clipped_and_counted_and_more_than_that_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "_clipped", iter(range(1, 1000)))
    quiet = noise(1000)
    np.testing.assert_array_equal(audio.clip(quiet, "quiet"), quiet)
    assert caplog.records == []
    square = np.sign(noise(16000))  # noise clipped as hard as can be
    for resample in (audio.resample, audio.resample_poly):
        over = resample(square, 16000, 8000)
        assert 1.3 < np.abs(over).max() < audio.MAX_OVERSHOOT
        clipped = audio.clip(over, "loud")
        np.testing.assert_array_equal(clipped, np.minimum(np.maximum(over, -1), 1))
        assert clipped.dtype == np.float32
    for _ in range(10):
        audio.clip(over, "loud")
    assert [record.levelno for record in caplog.records] == 2 * [logging.WARNING]
    first, tenth = (record.getMessage() for record in caplog.records)
    assert "loud: clipped, its peak is 1." in first and "(1 clipped so far)" in first
    assert "(10 clipped so far)" in tenth
    with pytest.raises(AudioError, match=r"loud: outside \[-1, 1\], its peak is 2\.\d"):
        audio.clip(over * 1.3, "loud")


def test_a_rate_may_be_lowered_but_not_raised() -> None:
    audio.require_rate(16000, 8000, "x")
    with pytest.raises(
        AudioError, match=r"x: its rate is 8000 Hz where 16000 Hz.*sample_rate=8000"
    ):
        audio.require_rate(8000, 16000, "x")
    with pytest.raises(AudioError, match="16000 Hz where 8000"):
        audio.require_rate(16000, 8000, "x", exactly=True)


def test_resample_poly_is_scipys_and_keeps_float32() -> None:
    wave = noise(1601)
    result = audio.resample_poly(wave, 16000, 8000)
    assert result.dtype == np.float32 and result.size == 801
    np.testing.assert_array_equal(result, scipy.signal.resample_poly(wave, 8000, 16000))
    assert audio.resample_poly(wave, 8000, 8000) is wave


def test_resample_keeps_a_tone_below_the_new_band_and_removes_one_above_it() -> None:
    time = np.arange(16000) / 16000
    low, high = (np.sin(2 * np.pi * hertz * time).astype(np.float32) for hertz in (1000, 6000))
    kept = audio.resample(low, 16000, 8000)
    assert kept.size == 8000 and kept.dtype == np.float32
    np.testing.assert_allclose(kept[500:-500], low[::2][500:-500], atol=1e-4)
    assert audio.rms(audio.resample(high, 16000, 8000)[500:-500]) < 1e-4


@pytest.mark.parametrize("rate", [8000, 16000])
def test_loudness_is_that_of_pyloudnorm_and_follows_the_level(rate: int) -> None:
    wave = noise(2 * rate)
    measured = audio.loudness(wave, rate)
    assert measured == pyloudnorm.Meter(rate).integrated_loudness(wave)
    assert audio.loudness(wave / 2, rate) == pytest.approx(measured - 20 * np.log10(2), abs=1e-4)


def test_loudness_of_too_short_or_too_quiet_audio_is_an_error() -> None:
    with pytest.raises(AudioError, match=r"short\.wav.*0\.38 s"):
        audio.loudness(noise(3000), 8000, "short.wav")
    with pytest.raises(AudioError, match="gate"):
        audio.loudness(noise(8000) * 1e-4, 8000)


def test_the_level_is_the_root_mean_square_and_silence_has_none() -> None:
    assert audio.rms(np.array([3.0, -4.0])) == pytest.approx(np.sqrt(12.5))
    assert audio.rms(np.zeros(0)) == 0


def test_fit_cuts_or_pads_at_the_end() -> None:
    wave = np.arange(1, 6)
    np.testing.assert_array_equal(audio.fit(wave, 3), [1, 2, 3])
    np.testing.assert_array_equal(audio.fit(wave, 7), [1, 2, 3, 4, 5, 0, 0])


def test_the_peak_of_a_sum_pads_the_shorter_wave() -> None:
    assert audio.peak_of_sum([np.array([1.0, -2.0]), np.array([1.0, 1.0, 5.0])], [2.0, -0.5]) == 4.5


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_every_format_that_can_be_decoded_is_found_and_what_is_left_out_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read = ["a.wav", "b.flac", "c/d.mp3", "c/e.OGG", "c/f.opus", "g.aiff", "h.aif", "i.w64"]
    read += ["j.wave", "k.bwf", "l.mp2", "m.nist", "n.voc"]
    touch(tmp_path / "tr", *read, "notes.txt", ".DS_Store", "transcript.trans.txt")
    assert len(audio.find_files(tmp_path / "tr")) == 13 and caplog.records == []
    left_out = [
        "._a.wav",
        "c/._d.mp3",
        ".trash/x.wav",
        "j.m4a",
        "c/k.M4A",
        "l.wma",
        "m.raw",
        "a.mp3",
        "b.ogg",
    ]
    touch(tmp_path / "tr", *left_out)
    found = audio.find_files(tmp_path / "tr")
    assert [str(path.relative_to(tmp_path / "tr")) for path in found] == sorted(read)
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"{tmp_path}/tr: 13 audio files" in said
    for count in ("3 hidden", "2 .m4a", "1 .wma", "1 .raw", "1 .mp3 beside", "1 .ogg beside"):
        assert count in said
    touch(tmp_path / "tt", "._a.wav", "b.m4a")
    with pytest.raises(AudioError, match="tt: no audio file"):
        audio.find_files(tmp_path / "tt")


def test_links_to_folders_and_files_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "7/x.wav")
    touch(tmp_path / "tr", "1/a.wav", "2/b.wav")
    for link, target in (
        *(("3", tmp_path / "elsewhere"), ("4", tmp_path / "tr" / "1")),
        *(("c.wav", tmp_path / "elsewhere" / "7" / "x.wav"), ("1/up", tmp_path / "tr")),
        *(("2/across", tmp_path / "tr" / "1"), ("1/across", tmp_path / "tr" / "2")),
    ):
        (tmp_path / "tr" / link).symlink_to(target)
    found = [str(path.relative_to(tmp_path / "tr")) for path in audio.find_files(tmp_path / "tr")]
    assert {"1/a.wav", "2/b.wav", "3/7/x.wav", "4/a.wav", "c.wav", "1/across/b.wav"} <= set(found)
    assert len(found) < 20 and not any("up/1" in name for name in found)


def test_files_are_found_sorted_and_an_empty_or_missing_folder_is_an_error(tmp_path: Path) -> None:
    for name in ("b/z.wav", "a/y.FLAC", "c.txt"):
        (tmp_path / "tr" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tr" / name).touch()
    assert [p.name for p in audio.find_files(tmp_path / "tr")] == ["y.FLAC", "z.wav"]
    with pytest.raises(AudioError, match=r"tt: no such folder \(its parent holds tr\)"):
        audio.find_files(tmp_path / "tt")
    (tmp_path / "cv").mkdir()
    with pytest.raises(AudioError, match="cv: no"):
        audio.find_files(tmp_path / "cv")


def test_a_header_that_declares_more_than_the_memory_holds_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 800_000), 8000)
    data = bytearray(path.read_bytes())
    fields = int.from_bytes(data[18:26])  # of STREAMINFO: rate, channels, bits, 36 bits of length
    data[18:26] = (fields >> 36 << 36 | 2**34 - 1).to_bytes(8)
    path.write_bytes(data)
    empty = np.empty

    def small(shape: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if np.prod(shape) > 2**30:
            raise MemoryError
        return empty(shape, *args, **kwargs)

    monkeypatch.setattr(np, "empty", small)
    with pytest.raises(AudioError, match=r"a\.flac: its header declares 17179869183 samples"):
        audio.load_channel(path)
