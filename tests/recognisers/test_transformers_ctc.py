"""A tiny random wav2vec 2.0, saved as users save theirs; greedy decoding against CTC's rules."""

import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sepdist.config import ConfigError
from sepdist.recognisers.transformers_ctc import TransformersCtc
from tests.support.recognisers import TOKENS, save_tiny, transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("ctc") / "tiny")


def spelled(ids: list[int]) -> str:
    """Apply CTC's rules: merge repeats, remove blanks, bars are spaces."""
    merged = [TOKENS[token] for token, _ in itertools.groupby(ids)]
    return "".join(token for token in merged if token != "<pad>").replace("|", " ").strip()


def test_the_text_is_the_greedy_path_of_the_normalised_wave(folder: str) -> None:
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    text = TransformersCtc(folder)(wave, 16000)
    model = transformers.Wav2Vec2ForCTC.from_pretrained(folder).eval()
    normalised = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    with torch.no_grad():
        ids = model(torch.from_numpy(normalised)[None]).logits[0].argmax(-1).tolist()
    assert len(set(ids)) > 3 and text == spelled(ids)


def test_a_blank_keeps_double_letters_apart(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recogniser = TransformersCtc(folder)
    path = (
        [TOKENS.index(c) for c in "HHE"]
        + [TOKENS.index("L"), 0, 0]
        + [TOKENS.index(c) for c in "LLO||U"]
    )
    logits = torch.nn.functional.one_hot(torch.tensor([path]), len(TOKENS)).float()
    monkeypatch.setattr(
        recogniser.model, "forward", lambda **inputs: transformers.utils.ModelOutput(logits=logits)
    )
    assert recogniser(np.ones(800, dtype=np.float32), 16000) == spelled(path) == "HELLO U"


def test_a_wave_of_another_rate_is_resampled_to_that_of_the_model(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recogniser = TransformersCtc(folder)
    seen: list[torch.Tensor] = []
    inner = recogniser.model.forward
    monkeypatch.setattr(
        recogniser.model,
        "forward",
        lambda input_values: (seen.append(input_values), inner(input_values))[1],
    )
    time = np.arange(8000) / 8000
    recogniser(np.sin(2 * np.pi * 440 * time).astype(np.float32), 8000)
    expected = np.sqrt(2) * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)  # of unit variance
    assert seen[0].shape == (1, 16000)
    np.testing.assert_allclose(seen[0][0, 500:-500].numpy(), expected[500:-500], atol=5e-3)


def test_an_encoder_without_a_trained_head_and_damaged_weights_are_refused(
    folder: str, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "base")
    model = transformers.Wav2Vec2ForCTC.from_pretrained(folder)
    model.wav2vec2.save_pretrained(tmp_path / "base")  # as facebook/wav2vec2-base is published
    with pytest.raises(ConfigError, match="its head has no weights"):
        TransformersCtc(str(tmp_path / "base"))
    (tmp_path / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/...")
    with pytest.raises(ConfigError, match=r"recogniser\.folder=.*header too large"):
        TransformersCtc(str(tmp_path / "base"))


def test_a_model_that_cannot_be_loaded_is_an_error_that_says_what_to_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (str(empty), str(tmp_path / "nowhere")):
        with pytest.raises(
            ConfigError, match=r"recogniser\.folder=.*pass that folder as recogniser\.folder"
        ):
            TransformersCtc(folder)

    def unreachable(name: str) -> None:
        raise OSError(f"cannot reach the hub for {name}")

    monkeypatch.setattr(transformers.AutoFeatureExtractor, "from_pretrained", unreachable)
    with pytest.raises(ConfigError, match=r"some/model.*cannot reach the hub.*save_pretrained"):
        TransformersCtc("some/model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="the extra `asr`"):
        TransformersCtc("some/model")
