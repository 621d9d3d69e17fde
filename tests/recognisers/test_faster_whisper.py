"""Calls to faster-whisper: one deterministic beam search at 16 kHz; needs no weights."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sepdist.config import ConfigError
from sepdist.recognisers.faster_whisper import FasterWhisper


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ConfigError, match="the extra `whisper`"):
        FasterWhisper("base.en")


def test_segments_are_joined_and_nothing_is_random(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: dict[str, Any] = {}

    class Model:
        def __init__(self, folder: str, **options: Any) -> None:
            calls.update(options, folder=folder)

        def transcribe(self, wave: np.ndarray, **options: Any) -> tuple[Any, None]:
            calls.update(options, wave=wave)
            return (SimpleNamespace(text=text) for text in (" One, ", " two.")), None

    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=Model))
    assert FasterWhisper("here", beam_size=3)(np.ones(400, dtype=np.float32), 8000) == "One, two."
    wave = calls.pop("wave")
    assert wave.dtype == np.float32 and wave.shape == (800,)
    assert calls == {
        "folder": "here",
        "device": "cpu",
        "compute_type": "int8",
        "cpu_threads": 1,
        "language": "en",
        "beam_size": 3,
        "temperature": 0.0,  # a single one, so there is no random retry
        "condition_on_previous_text": False,
        "without_timestamps": True,
    }


def test_a_folder_without_a_model_says_what_belongs_there(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper", reason="faster-whisper is the optional extra whisper")
    with pytest.raises(
        ConfigError, match=r"recogniser\.folder=.*Pass a folder that holds model\.bin"
    ):
        FasterWhisper(str(tmp_path))
