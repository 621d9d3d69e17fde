"""DC, drift and mains hum are taken from what the model hears, and nothing else is."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdist.inference.separator import Separator
from sepdist.inference.stitching import cleaned
from sepdist.inference.windows import Windows

RATE = 8000
TIME = np.arange(8 * RATE) / RATE


def speech(seed: int = 0) -> np.ndarray:
    """Buzzing of a pitch that glides as a voice's does, with pauses; nothing below 80 Hz."""
    rng = np.random.default_rng(seed)
    pitch = 110 * 2 ** (0.4 * np.sin(2 * np.pi * 0.7 * TIME + rng.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    buzz = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * buzz * (np.sin(2 * np.pi * 1.3 * TIME) > -0.5)).astype(np.float32)


def hum(mains: float, level: float = 0.05) -> np.ndarray:
    wave = sum(np.sin(2 * np.pi * mains * k * TIME + k) / k for k in (1, 2, 3, 5, 7))
    return level * wave / np.sqrt(np.mean(wave**2))


def remainder_db(got: np.ndarray, wave: np.ndarray) -> float:
    """What is left of a disturbance, or missing of the speech, against the speech."""
    return 10 * np.log10(np.mean((got - wave) ** 2) / np.mean(wave**2))


def test_a_window_without_dc_and_hum_stays_as_it_is_to_the_bit() -> None:
    white = np.random.default_rng(0).normal(0, 0.1, TIME.size).astype(np.float32)
    tone = np.sin(2 * np.pi * 200 * TIME).astype(np.float32)  # a multiple of 50 Hz, but alone
    for wave in (speech(), white, tone, speech() + 0.005, np.zeros(9, "f"), np.zeros(RATE, "f")):
        assert cleaned(wave.astype(np.float32), RATE).tobytes() == wave.astype("f").tobytes()


@pytest.mark.parametrize(
    ("disturbance", "most_db"),
    [
        (0.1 + 0 * TIME, -24),
        (-0.5 + 0 * TIME, -24),
        (0.1 * np.sin(2 * np.pi * 0.05 * TIME), -24),
        (0.1 * (TIME > 5), -15),
        (hum(50), -14),
        (hum(60), -14),
        (hum(49.95), -14),
        (0.1 + hum(60.05, 0.02), -14),
    ],
)
def test_dc_drift_and_hum_are_removed_and_speech_is_kept(
    disturbance: np.ndarray, most_db: float
) -> None:
    wave = speech()
    assert remainder_db(wave + disturbance, wave) > -10
    assert remainder_db(cleaned((wave + disturbance).astype(np.float32), RATE), wave) < most_db


class Signs(nn.Module):
    """Divides by the power of its input, which must not be the rounding of a constant."""

    def forward(self, mixture_BT: Tensor) -> Tensor:
        level = mixture_BT.square().mean(1, keepdim=True).sqrt()
        unit = mixture_BT / level
        return torch.stack([unit.clamp(min=0), unit.clamp(max=0)], 1) * level[:, None]


@pytest.mark.parametrize("rate", [8000, 44100])
def test_a_constant_is_silence_at_any_rate(rate: int) -> None:
    got = Separator(Signs(), RATE, windows=Windows(1.0, 0.5))(np.full(3 * rate, 0.1), rate)
    assert np.abs(got[:, rate // 10 : -rate // 10]).max() < 1e-3


def test_the_outputs_of_a_recording_with_dc_add_up_to_it_without_dc() -> None:
    wave = speech()
    got = Separator(Signs(), RATE, windows=Windows(4.0, 2.0))(wave + 0.3, RATE)
    assert remainder_db(got.sum(0), wave) < -25
