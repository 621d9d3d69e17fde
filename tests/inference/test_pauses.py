"""Who is who after a pause, with models that exchange their outputs by rules the tests know."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from sepdist.inference.separator import Separator
from sepdist.inference.windows import Windows

RATE = 8000
WINDOWS = Windows(2.0, 1.0)


class Signs(nn.Module):
    """Voice 1 is positive, voice 2 negative; outputs are exchanged at random from call to call.

    What is quieter than `hiss` is never exchanged, so where only that is heard the order of two
    windows looks the same whatever it is.
    """

    def __init__(self, hiss: float = 0.0) -> None:
        super().__init__()
        self.rng, self.hiss, self.lengths = np.random.default_rng(1), hiss, list[int]()

    def forward(self, mixture_BT: Tensor) -> Tensor:
        self.lengths.append(mixture_BT.shape[1])
        voices = torch.stack([mixture_BT.clamp(min=0), mixture_BT.clamp(max=0)], 1)
        loud = (mixture_BT.abs() > self.hiss)[:, None]
        return torch.where(loud, voices.flip(1), voices) if self.rng.random() < 0.5 else voices


def speech(seconds: float, seed: int, level: float = 0.8) -> np.ndarray:
    """Noise whose level changes twice a second, never to silence."""
    rng = np.random.default_rng(seed)
    levels = np.repeat(rng.uniform(0.5, 1.0, int(2 * seconds) + 1), RATE // 2)
    wave = rng.uniform(-1, 1, round(seconds * RATE))
    return (level * wave * levels[: wave.size]).astype(np.float32)


def voices_of(wave: np.ndarray) -> np.ndarray:
    return np.stack([wave.clip(min=0), wave.clip(max=0)])


def assert_in_one_order(got: np.ndarray, wave: np.ndarray, atol: float = 1e-5) -> None:
    expected = voices_of(wave)
    got = got if got[0].sum() > 0 else got[::-1]
    np.testing.assert_allclose(got, expected, atol=atol)


@pytest.mark.parametrize(("window", "overlap"), [(2.0, 0.01), (0.04, 0.02), (0.001, 0.0005)])
def test_pieces_shorter_than_a_frame_of_the_speech_detector_are_joined_too(
    window: float, overlap: float
) -> None:
    wave = np.concatenate([speech(0.5, 1), np.zeros(RATE), speech(0.51, 2)])
    model = Signs()
    model.rng = np.random.default_rng(0)
    got = Separator(model, RATE, windows=Windows(window, overlap))(wave, RATE)
    np.testing.assert_allclose(got.sum(0), wave, atol=1e-4)


@pytest.mark.parametrize("pause", [1.5, 2.7, 3.2, 8.0])
@pytest.mark.parametrize("hiss", [0.0, 1e-4])
def test_speakers_keep_their_order_over_pauses_longer_than_the_overlap(
    pause: float, hiss: float
) -> None:
    rng = np.random.default_rng(0)
    parts = [speech(3.1, 0), speech(0, 0), speech(2.3, 1), speech(0, 0), speech(5.0, 2)]
    parts[1] = parts[3] = np.zeros(round(pause * RATE), np.float32)
    wave = np.concatenate(parts)
    wave[np.abs(wave) <= hiss] = rng.uniform(-hiss, hiss, (np.abs(wave) <= hiss).sum())
    for seed in range(2):
        model = Signs(hiss)
        model.rng = np.random.default_rng(seed)
        got = Separator(model, RATE, windows=WINDOWS)(wave, RATE)
        assert_in_one_order(got, wave, atol=1e-5 + 2 * hiss)
        assert max(model.lengths) <= 3 * RATE  # a window and an overlap


def test_a_recording_without_pauses_is_separated_window_by_window_alone() -> None:
    model = Signs()
    Separator(model, RATE, windows=WINDOWS)(speech(9.0, 3), RATE)
    assert model.lengths == [2 * RATE] * 8


class Bands(nn.Module):
    """Three voices by their amplitude; every call turns the outputs by one more."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0

    def forward(self, mixture_BT: Tensor) -> Tensor:
        self.turn += 1
        return torch.from_numpy(thirds(mixture_BT[0].numpy()))[None].roll(self.turn, 1)


def thirds(wave: np.ndarray) -> np.ndarray:
    kept = [wave < -0.2, np.abs(wave) <= 0.2, wave > 0.2]
    return np.stack([np.where(one, wave, 0) for one in kept])


def test_three_speakers_keep_their_order_over_pauses_too() -> None:
    parts = [speech(3.1, 0), np.zeros(4 * RATE), speech(2.3, 1), np.zeros(3 * RATE), speech(3, 2)]
    wave = np.concatenate(parts).astype(np.float32)
    got = Separator(Bands(), RATE, windows=WINDOWS)(wave, RATE)
    np.testing.assert_allclose(np.roll(got, -1, 0), thirds(wave), atol=1e-5)


def with_pauses(seconds: float, num: int) -> np.ndarray:
    """Stretches of speech of 2 s, the loud and the quiet by turns, and pauses between them."""
    parts = []
    for number in range(num):
        parts += [speech(2.0, number, (0.15, 0.9)[number % 2]), np.zeros(round(seconds * RATE))]
    return np.concatenate(parts[:-1]).astype(np.float32)


def test_one_warning_gives_the_times_at_which_the_voices_alone_told_who_is_who(
    tmp_path: Path,
) -> None:
    separator = Separator(Signs(), RATE, windows=WINDOWS)
    soundfile.write(tmp_path / "in.wav", with_pauses(3.0, 12), RATE)
    (told,) = separator.file(tmp_path / "in.wav", tmp_path).warnings
    assert "in.wav (the mean of its channels): only the voices told who is who" in told
    assert "after 11 pauses longer than the overlap" in told and "..." in told
    times = [60 * float(one) + float(two) for one, two in re.findall(r"(\d+):(\d\d\.\d)", told)]
    np.testing.assert_allclose(times, np.arange(5, 55, 5), atol=0.3)
    soundfile.write(tmp_path / "in.wav", with_pauses(0.9, 4), RATE)
    assert separator.file(tmp_path / "in.wav", tmp_path).warnings == []


def test_in_python_the_times_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    Separator(Signs(), RATE, windows=WINDOWS)(with_pauses(3.0, 2), RATE)
    assert "the wave: only the voices told who is who after 1 pauses" in caplog.text
