"""Decoding, errors, resampling, loudness and levels, against soundfile, SciPy and pyloudnorm."""

from pathlib import Path

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
