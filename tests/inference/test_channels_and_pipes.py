"""Channels, depths of samples, pipes and patterns of file names, through files and the program."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

import sepdist
from sepdist.cli import separate
from sepdist.inference.separator import Separation, Separator
from sepdist.inference.windows import SeparationError
from tests.support.exports import write_export

RATE = 8000


class Signs(nn.Module):
    """Voice 1 is the positive half of the wave, voice 2 the negative."""

    def forward(self, mixture_BT: Tensor) -> Tensor:
        return torch.stack([mixture_BT.clamp(min=0), mixture_BT.clamp(max=0)], 1)


SEPARATOR = Separator(Signs(), RATE)


def noise(seed: int, peak: float = 0.5) -> np.ndarray:
    wave = np.random.default_rng(seed).uniform(-peak, peak, RATE).astype(np.float32)
    return wave - wave.mean()


def voices_of(wave: np.ndarray) -> np.ndarray:
    return np.stack([wave.clip(min=0), wave.clip(max=0)])


def run(
    folder: Path, wave_TC: np.ndarray, kind: str = "FLOAT", **options: str | int
) -> tuple[Separation, dict[str, np.ndarray]]:
    """Separate a recording by way of files; returns the result and its outputs by name."""
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / "in.wav", wave_TC, RATE, subtype=kind)
    result = SEPARATOR.file(folder / "in.wav", folder / "out", **options)
    return result, {Path(one).name: soundfile.read(one)[0] for one in result.outputs}


LEFT, RIGHT = noise(1), noise(2)
BOTH = np.stack([LEFT, RIGHT], axis=1)


def test_each_channel_is_separated_by_itself_into_files_that_name_it(tmp_path: Path) -> None:
    result, found = run(tmp_path, BOTH, channels="each", subtype="FLOAT")
    assert list(found) == ["in_c1_s1.wav", "in_c1_s2.wav", "in_c2_s1.wav", "in_c2_s2.wav"]
    expected = [*voices_of(LEFT), *voices_of(RIGHT)]
    np.testing.assert_allclose([*found.values()], expected, atol=1e-6)
    assert len(result.gains) == 4 and result.warnings == []


@pytest.mark.parametrize("order", [1, -1])
def test_the_voices_of_all_channels_have_one_depth_and_one_scale(
    tmp_path: Path, order: int
) -> None:
    both = np.stack([LEFT, RIGHT / 500], 1)[:, ::order]
    quiet, found = run(tmp_path / "a", both, "PCM_16", channels="each")
    assert quiet.subtype == "PCM_24" and quiet.scale == 1
    faint = [*found.values()][2:] if order > 0 else [*found.values()][:2]
    heard = soundfile.read(tmp_path / "a" / "in.wav")[0][:, 1 if order > 0 else 0]
    np.testing.assert_allclose(faint, voices_of(heard), atol=2**-22)
    both = np.stack([6 * LEFT, RIGHT], 1)[:, ::order]
    loud, found = run(tmp_path / "b", both, channels="each", subtype="PCM_24")
    scale = 0.99 / np.abs(6 * LEFT).max()
    assert loud.scale == pytest.approx(scale, rel=1e-5) and len(loud.warnings) == 1
    got = [*found.values()] if order > 0 else [*found.values()][2:] + [*found.values()][:2]
    expected = [*voices_of(6 * LEFT), *voices_of(RIGHT)]
    np.testing.assert_allclose(got, np.array(expected) * scale, atol=1e-5)


@pytest.mark.parametrize(("channels", "wave"), [(1, LEFT), ("2", RIGHT), ("mean", BOTH.mean(1))])
def test_one_channel_or_the_mean_of_all_is_separated(
    tmp_path: Path, channels: str | int, wave: np.ndarray
) -> None:
    _, found = run(tmp_path, BOTH, channels=channels, subtype="FLOAT")
    assert list(found) == ["in_s1.wav", "in_s2.wav"]
    np.testing.assert_allclose([*found.values()], voices_of(wave), atol=1e-6)
    got = SEPARATOR(BOTH.T, RATE, channels=channels)
    np.testing.assert_allclose(got, voices_of(wave), atol=1e-6)


def test_in_python_each_channel_of_an_array_is_separated() -> None:
    got = SEPARATOR(BOTH.T, RATE, channels="each")
    np.testing.assert_allclose(got, [voices_of(LEFT), voices_of(RIGHT)], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 3}, "in.wav channels=3: there are mean, each and 1 to 2"),
        ({"channels": 0}, "channels=0: there are mean, each"),
        ({"channels": "left"}, "channels=left: there are mean"),
        ({"channels": "-1"}, "channels=-1: there are mean"),
        ({"subtype": "PCM_17"}, "outputs of wav PCM_17: .*wav with PCM_16, PCM_24, FLOAT"),
        (
            {"subtype": "FLOAT", "file_format": "flac"},
            "outputs of flac FLOAT: there are flac with PCM_16, PCM_24; ",
        ),
        ({"file_format": "mp3"}, "outputs of mp3 : there are flac"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_written(
    tmp_path: Path, options: dict[str, str | int], message: str
) -> None:
    with pytest.raises(SeparationError, match=message):
        run(tmp_path, BOTH, **options)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("kind", "peak", "options", "subtype", "step"),
    [
        ("PCM_16", 0.5, {}, "PCM_16", 2**-15),
        ("PCM_24", 0.5, {}, "PCM_24", 2**-23),
        ("FLOAT", 0.5, {"file_format": "flac"}, "PCM_24", 2**-23),
        ("PCM_16", 0.01, {}, "PCM_24", 2**-23),  # 16 bits would leave it 8
        ("FLOAT", 0.5, {"subtype": "PCM_16"}, "PCM_16", 2**-15),
        ("FLOAT", 1e-6, {"subtype": "FLOAT"}, "FLOAT", 1e-12),
    ],
)
def test_outputs_have_the_depth_of_the_recording_or_of_the_option(
    tmp_path: Path, kind: str, peak: float, options: dict[str, str], subtype: str, step: float
) -> None:
    wave = noise(3, peak)
    result, found = run(tmp_path, wave, kind, **options)
    assert {soundfile.info(one).subtype for one in result.outputs} == {subtype} == {result.subtype}
    heard = soundfile.read(tmp_path / "in.wav")[0]
    np.testing.assert_allclose([*found.values()], voices_of(heard), atol=1.1 * step + 1e-7 * peak)


def test_floats_are_not_scaled_down_where_they_exceed_full_scale(tmp_path: Path) -> None:
    result, found = run(tmp_path, 6 * LEFT, subtype="FLOAT")
    np.testing.assert_allclose([*found.values()], voices_of(6 * LEFT), atol=1e-5)
    assert result.scale == 1 and result.warnings == []


@pytest.fixture
def piped(tmp_path: Path, run_verb, monkeypatch, capfdbinary):
    """Run the program with bytes on standard input; returns status, standard output and error."""
    write_export(tmp_path / "model")

    def run(data: bytes, *words: str) -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        status = run_verb(separate, "--model", str(tmp_path / "model"), "--device=cpu", *words)
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return status, out, err.decode()

    return run


def wav_of(wave: np.ndarray, subtype: str = "PCM_16") -> bytes:
    soundfile.write(file := io.BytesIO(), wave, RATE, format="WAV", subtype=subtype)
    return file.getvalue()


def test_a_pipe_in_gives_one_file_with_a_channel_per_voice_and_nothing_else(
    tmp_path: Path, piped
) -> None:
    data = wav_of(LEFT)
    endless = data[:40] + b"\xff" * 4 + data[44:]  # as programs write that cannot go back
    for given in (data, endless):
        status, out, err = piped(given, "--output", "-", "-")
        assert (status, err) == (0, "")
        voices_TS, rate = soundfile.read(io.BytesIO(out))
        heard = soundfile.read(io.BytesIO(data), dtype="float32")[0]
        expected = sepdist.load(tmp_path / "model", device="cpu")(heard, RATE)
        assert rate == RATE and voices_TS.shape == (RATE, 2)
        scale = min(1, 0.99 / np.abs(expected).max())
        np.testing.assert_allclose(voices_TS.T, expected * scale, atol=2**-15)
    status, out, err = piped(data, "--output", str(tmp_path / "out"), "-")
    assert [Path(one.decode()).name for one in out.split()] == ["stdin_s1.wav", "stdin_s2.wav"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-", "a.wav"], "--output - takes one recording, not 2"),
        (["-", "--channels=each"], "standard output takes one channel"),
        (["-"], "stdin: cannot be decoded"),
    ],
)
def test_what_a_pipe_cannot_carry_is_refused(piped, words: list[str], message: str) -> None:
    status, out, err = piped(b"no audio", "--output", "-", *words)
    assert (status, out) == (1, b"") and message in err and err.count("\n") == 1


def test_a_quoted_pattern_stands_for_the_files_that_it_matches(
    tmp_path: Path, piped, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.wav", "a.wav", "x[1].wav", "deep/er/c.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(wav_of(LEFT))
    for pattern, stems in (
        ("[ab].wav", ["a", "b"]),
        ("x[1].wav", ["x[1]"]),  # a file of that name goes first
        ("**/c.*", ["c"]),
    ):
        status, out, _ = piped(b"", "--output=out", pattern)
        names = [Path(one.decode()).name for one in out.split()]
        assert (status, names) == (0, [f"{stem}_s{i}.wav" for stem in stems for i in (1, 2)])
    status, _, err = piped(b"", "--output=out", "*.mp3")
    assert status == 1 and "no file matches the pattern *.mp3" in err


def test_outputs_that_are_there_are_replaced_only_if_that_is_wanted(
    tmp_path: Path, piped, monkeypatch, bucket: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for day, wave in (("mon", LEFT), ("tue", RIGHT)):
        Path(day).mkdir()
        Path(day, "talk.wav").write_bytes(wav_of(wave))
    for place in ("out", f"s3://{bucket}/out"):
        assert piped(b"", "--output", place, "mon/talk.wav")[0] == 0
        status, _, err = piped(b"", "--output", place, "tue/talk.wav")
        assert status == 1 and "talk_s1.wav is there already, an output of tue/talk.wav" in err
        assert "--overwrite" in err
        assert piped(b"", "--output", place, "--format=flac", "tue/talk.wav")[0] == 0
        status, _, err = piped(b"", "--output", place, "--channels=each", "tue/talk.wav")
        assert status == 1
        assert piped(b"", "--output", place, "--overwrite", "tue/talk.wav")[0] == 0
    wave, _ = soundfile.read("out/talk_s1.wav")
    expected = sepdist.load(tmp_path / "model", device="cpu")(RIGHT, RATE)[0]
    np.testing.assert_allclose(wave, expected * min(1, 0.99 / np.abs(expected).max()), atol=1e-3)


def test_a_folder_within_which_the_outputs_lie_can_be_separated_again(
    tmp_path: Path, piped, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talks").mkdir()
    Path("talks/a.wav").write_bytes(wav_of(LEFT))
    monkeypatch.chdir(tmp_path / "talks")
    assert piped(b"", ".")[0] == 0
    Path("b.wav").write_bytes(wav_of(RIGHT))
    for pattern in (".", "**/*.wav"):
        status, out, err = piped(b"", "--overwrite", pattern)
        names = [Path(one.decode()).name for one in out.split()]
        assert (status, names) == (0, ["a_s1.wav", "a_s2.wav", "b_s1.wav", "b_s2.wav"])
        assert "left out, as they lie in --output separated: " in err
    Path("a.wav").unlink()
    Path("b.wav").unlink()
    status, _, err = piped(b"", ".")
    assert status == 1 and "left out, as they lie in" in err and "no other recording is left" in err
    status, out, _ = piped(b"", "--output=again", "separated")  # asked for
    assert status == 0 and len(out.split()) == 8


def test_a_stream_refuses_options_that_it_does_not_have(piped) -> None:
    for word in ("--channels=2", "--format=flac", "--subtype=PCM_24"):
        status, _, err = piped(b"", "--stream=f32le", "--output", "-", "-", word)
        assert status == 1 and "--stream takes no --channels, --format or --subtype" in err


def test_outputs_of_a_channel_do_not_replace_a_recording(piped) -> None:
    status, _, err = piped(b"", "--output=x", "x/a.wav", "x/a_c2_s1.wav")
    assert status == 1 and "would replace the recording x/a_c2_s1.wav" in err
