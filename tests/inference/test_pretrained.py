"""The models that come with the package: small, whole, described, and they separate."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.signal
import soundfile
import torch
import yaml

import sepdist
from sepdist import hub
from sepdist.cli import separate
from sepdist.training.handoff import read_export
from tests.support.exports import oracle_si_snr

FOLDER = Path(sepdist.__file__).parent / "pretrained"
NAMES = sorted(path.name for path in FOLDER.iterdir())
MAX_BYTES = 3_000_000
RATE = 8000


def voice(seed: int, pitch: float, formants: list[tuple[float, float]]) -> np.ndarray:
    """Four seconds of a vowel with vibrato, in syllables: harmonics through resonators."""
    draw, time = np.random.default_rng(seed), np.arange(4 * RATE) / RATE
    glide = 0.08 * np.sin(2 * np.pi * 0.7 * time + draw.uniform(0, 6))
    frequency = pitch * (1 + glide + 0.02 * np.sin(2 * np.pi * 5 * time))
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    wave = sum(np.cos(k * phase) / k for k in range(1, int(3500 / pitch)))
    for centre, width in formants:
        radius = np.exp(-np.pi * width / RATE)
        poles = [1, -2 * radius * np.cos(2 * np.pi * centre / RATE), radius**2]
        wave = scipy.signal.lfilter([sum(poles)], poles, wave)
    rate, start = draw.uniform(2.5, 4), draw.uniform(0, 6)
    wave = wave * np.sqrt(np.clip(np.sin(2 * np.pi * rate * time + start), 0, None))
    return (0.1 * wave / wave.std()).astype(np.float32)


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    low, high = [(500, 80), (1500, 120), (2500, 160)], [(700, 90), (1900, 130), (2900, 170)]
    return [(voice(seed, 110, low), voice(seed + 10, 215, high)) for seed in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_small_in_float16_and_as_its_card_says(name: str) -> None:
    files = {path.name: path.read_bytes() for path in (FOLDER / name).iterdir()}
    assert set(files) == {"README.md", "lineage.json", "model.safetensors", "model.yaml"}
    assert sum(map(len, files.values())) <= MAX_BYTES
    weights = safetensors.torch.load(files["model.safetensors"])
    assert {one.dtype for one in weights.values()} == {torch.float16}
    card = files["README.md"].decode()
    front, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() in text
    assert f"{sum(one.numel() for one in weights.values()):,} parameters" in text
    assert f'sepdist.load("{hub.PACKAGED}{name}")' in text
    for section in ("Use", "Scores", "Training", "Limits", "Licence and attribution"):
        assert f"\n## {section}\n" in text
    assert "Panayotov" in text and "CC BY 4.0" in text


def test_the_ready_model_separates_voices_of_different_pitch() -> None:
    separator, gains = sepdist.load(), []
    for sources in pairs():
        mixture = sources[0] + sources[1]
        voices = np.asarray(separator(mixture, RATE))
        before = np.mean([oracle_si_snr(mixture, one) for one in sources])
        after = max(
            np.mean([oracle_si_snr(e, s) for e, s in zip(order, sources, strict=True)])
            for order in (voices, voices[::-1])
        )
        gains.append(float(after - before))
    assert gains == pytest.approx([23.21, 18.63, 14.58, 17.4], abs=0.1)  # as it was handed out


def test_recordings_are_separated_without_naming_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_verb, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("meeting.wav", sum(pairs()[0]), RATE)
    assert run_verb(separate, "meeting.wav") == 0
    shown = capsys.readouterr()
    assert shown.out.split() == ["separated/meeting_s1.wav", "separated/meeting_s2.wav"]
    assert f"{hub.READY}, a small one" in shown.err.replace("\n", " ")


def test_a_model_has_one_name_on_every_machine_and_another_is_refused() -> None:
    weights, *_, folder = read_export(hub.READY)
    assert Path(folder) == FOLDER / "two-voices-8k" and weights
    with pytest.raises(hub.HubError, match="pretrained://x: the package has pretrained://two-voi"):
        sepdist.load("pretrained://x")
