"""Who is who after a pause, with models that exchange their outputs by rules the tests know."""

import numpy as np
import pytest
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


class Forgetful(Signs):
    """Exchanges the voices of what comes after a pause, the end of a quiet part (by its level)."""

    def forward(self, mixture_BT: Tensor) -> Tensor:
        voices = super().forward(mixture_BT)
        quiet = mixture_BT.abs().unfold(1, 800, 1).amax(-1) < 0.3
        after = torch.nn.functional.pad(quiet.cumsum(1) > 0, (799, 0))
        return torch.where(((mixture_BT.abs() >= 0.0) & after)[:, None], voices.flip(1), voices)


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
    for seed in range(4):
        model = Signs(hiss)
        model.rng = np.random.default_rng(seed)
        got = Separator(model, RATE, windows=WINDOWS)(wave, RATE)
        assert_in_one_order(got, wave, atol=1e-5 + 2 * hiss)
        assert max(model.lengths) <= 3 * RATE  # a window and an overlap


def test_a_recording_without_pauses_is_separated_window_by_window_alone() -> None:
    model = Signs()
    Separator(model, RATE, windows=WINDOWS)(speech(9.0, 3), RATE)
    assert model.lengths == [2 * RATE] * 8
