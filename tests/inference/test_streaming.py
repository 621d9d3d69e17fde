"""`separate --stream`: what comes out of the pipe, what is told, what is refused."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from sepdist import slots
from sepdist.cli import separate
from sepdist.inference.separator import Separator
from sepdist.inference.streaming import separate_stream
from sepdist.inference.windows import SeparationError
from tests.support.exports import MODEL, voices, write_export


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return slots.build("model", MODEL | {"causal": True} | changes).eval()


def run(data: bytes, pcm: str = "f32le", **changes: Any) -> tuple[np.ndarray, list[str]]:
    """The frames [T, 2] that the pipe gives for `data`, and what is told."""
    sink, told = io.BytesIO(), list[str]()
    separator = Separator(model(**changes), 8000)
    separate_stream(separator, io.BufferedReader(io.BytesIO(data)), sink, pcm, told.append)
    dtype = {"f32le": "<f4", "s16le": "<i2"}[pcm]
    return np.frombuffer(sink.getvalue(), dtype).reshape(-1, 2), told


def wav(wave: np.ndarray, subtype: str, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, subtype, format="WAV")
    return file.getvalue()


def whole(wave_T: np.ndarray) -> np.ndarray:
    """[T, 2]: the estimates of the model for all of the wave at once."""
    with torch.no_grad():
        return model()(torch.from_numpy(wave_T)[None])[0].T.numpy()


def test_raw_floats_give_the_estimates_of_the_whole_and_the_latency_is_told() -> None:
    wave_T = voices(4001).sum(0)
    frames, told = run(wave_T.tobytes())
    assert np.allclose(frames, whole(wave_T), atol=1e-7)
    assert told == [  # a window of 16 samples
        "latency 2 ms after blocks of 20 ms; f32le, 8000 Hz",
        "0.50 s separated",
    ]


def test_raw_16_bits_give_the_estimates_to_half_a_step() -> None:
    wave_T = np.rint(voices(1000).sum(0) * 32768) / 32768
    frames, _ = run((wave_T * 32768).astype("<i2").tobytes(), "s16le")
    assert np.abs(frames / 32768 - whole(wave_T.astype(np.float32))).max() < 0.51 / 32768


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_file_is_known_by_its_header_and_its_channels_are_averaged(channels: int) -> None:
    data = wav(voices(700, num=channels).T, "PCM_16")
    read_T = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].mean(1)
    assert np.allclose(run(data)[0], whole(read_T), atol=1e-6)


def test_what_follows_the_samples_of_a_wav_file_is_not_heard() -> None:
    wave_T = voices(700).sum(0)
    data = wav(wave_T, "PCM_16") + b"LIST" + (4000).to_bytes(4, "little") + bytes(4000)
    assert len(run(data)[0]) == 700


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_header_that_knows_no_length_is_followed_to_the_end_of_the_pipe(size: int) -> None:
    data = wav(voices(700).sum(0), "PCM_16")
    place = data.index(b"data") + 4
    endless = data[:place] + size.to_bytes(4, "little") + data[place + 4 :]
    assert len(run(endless)[0]) == 700


def test_samples_beyond_full_scale_are_cut_and_counted() -> None:
    loud = model()
    with torch.no_grad():
        loud.decoder.weight *= 100
    samples = np.rint(voices(1000).sum(0) * 32768).astype("<i2")
    with torch.no_grad():
        expected = loud(torch.from_numpy(samples / np.float32(32768))[None])[0].T.numpy() * 32768
    sink, told = io.BytesIO(), list[str]()
    source = io.BufferedReader(io.BytesIO(samples.tobytes()))
    separate_stream(Separator(loud, 8000), source, sink, "s16le", told.append)
    frames = np.frombuffer(sink.getvalue(), "<i2").reshape(-1, 2)
    assert np.abs(frames - expected.clip(-32768, 32767)).max() < 0.6
    count = int((expected.round() != expected.round().clip(-32768, 32767)).sum())
    assert told[-1] == f"0.12 s separated, {count} samples clipped" and count > 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "standard input is empty"),
        (np.full(400, np.nan, "<f4").tobytes(), "NaN or infinity 0.00 s from the start"),
        (voices(400).sum(0).tobytes()[:-1], "ends within a sample"),
        (wav(voices(400).sum(0), "FLOAT"), "WAV: unknown format: 3; give 16 bits, or raw"),
        (wav(voices(400).sum(0), "PCM_24"), "WAV of 8000 Hz and 24 bits; give 8000 Hz and 16"),
        (wav(voices(400).sum(0), "PCM_16", 16000), "WAV of 16000 Hz and 16 bits; give 8000 Hz"),
        (b"RIFF\0\0\0\0WAVE", "give 16 bits, or raw"),
    ],
)
def test_a_stream_that_cannot_be_separated_is_refused_with_the_reason(
    data: bytes, words: str
) -> None:
    with pytest.raises(SeparationError, match=words):
        run(data)


def test_models_that_need_whole_recordings_are_refused() -> None:
    with pytest.raises(ValueError, match="causal: true and padding: end"):
        run(bytes(400), causal=False)
    chooses = model()
    chooses.register_forward_hook(lambda *_: None)
    for one in (chooses, torch.nn.Linear(2, 2)):
        with pytest.raises(SeparationError, match="needs whole recordings"):
            pipes = io.BufferedReader(io.BytesIO()), io.BytesIO()
            separate_stream(Separator(one, 8000), *pipes, "s16le")


def test_the_program_goes_from_pipe_to_pipe_and_from_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_export(tmp_path / "model")
    card = {"model": MODEL | {"causal": True}, "sample_rate": 8000}
    (tmp_path / "model" / "model.yaml").write_text(yaml.safe_dump(card))
    source = io.BufferedReader(io.BytesIO(voices(1600).sum(0).tobytes()))
    sink = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=source))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=sink, isatty=lambda: False))
    words = ["separate", "--model", str(tmp_path / "model"), "--stream", "f32le", "--output"]
    monkeypatch.setattr(sys, "argv", [*words, "-", "-"])
    assert separate.main() == 0
    assert len(sink.getvalue()) == 1600 * 2 * 4
    monkeypatch.setattr(sys, "argv", [*words, "folder", "-"])
    with pytest.raises(SystemExit) as stopped:
        separate.main()
    assert stopped.value.code == 1
    assert "give - and --output -" in capsys.readouterr().err
