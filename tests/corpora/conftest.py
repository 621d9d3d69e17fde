"""Tiny trees of modulated noise at 16 kHz in the layouts of LibriSpeech and WHAM! noise."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 16000
SPEAKERS = {"19": 3, "26": 1, "103": 2, "1034": 1}  # speaker -> number of utterances


def signal(seed: int, num_samples: int, level: float = 0.05) -> np.ndarray:
    generator = np.random.default_rng(seed)
    swell = 1.0 + 0.5 * np.sin(np.arange(num_samples) / 700.0)
    return (level * swell * np.clip(generator.standard_normal(num_samples), -3, 3)).astype(
        np.float32
    )


def write(path: Path, wave: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), wave, rate, subtype="PCM_16")


@pytest.fixture
def speech_root(tmp_path: Path) -> Path:
    root = tmp_path / "LibriSpeech"
    number = 0
    for speaker, num_utterances in SPEAKERS.items():
        lines = []
        for i in range(num_utterances):
            number += 1
            utterance = f"{speaker}-7-{i:04d}"
            level = 0.02 * 1.4**number
            write(
                root / "train-clean-100" / speaker / "7" / f"{utterance}.flac",
                signal(number, 12000 + 1501 * number, level),
            )
            lines.append(f"{utterance} WORDS OF {utterance}\n")
        (root / "train-clean-100" / speaker / "7" / f"{speaker}-7.trans.txt").write_text(
            "".join(lines)
        )
    return root


@pytest.fixture
def noise_root(tmp_path: Path) -> Path:
    root = tmp_path / "wham_noise"
    for number, (name, num_samples) in enumerate(
        (("40na010x_1.9857_01xo031a_-1.9857", 17000), ("long", 60000))
    ):
        stereo = np.stack(
            [signal(70 + number, num_samples, 0.1), signal(80 + number, num_samples, 0.3)], axis=1
        )
        write(root / "tr" / f"{name}.wav", stereo)
    return root
