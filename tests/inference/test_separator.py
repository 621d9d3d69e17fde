"""Long recordings with toy models whose correct output is known sample by sample."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sepdist
from sepdist import slots, storage
from sepdist.cli import separate
from sepdist.inference.separator import Separation, Separator
from sepdist.inference.stitching import Pauses, cut_windows, overlap_add, resampled
from sepdist.inference.windows import SeparationError, Windows
from tests.support.exports import write_export

ROOT = Path(__file__).parent.parent.parent
RATE = 8000
STEP = 1.0 / 32768  # of 16-bit audio


class Halves(nn.Module):
    """Speaker 1 is the positive half of the wave, speaker 2 the negative; they are orthogonal."""

    def __init__(self, levels: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.levels = levels
        self.largest_batch = 0

    def forward(self, mixture_BT: Tensor) -> Tensor:
        self.largest_batch = max(self.largest_batch, mixture_BT.numel())
        estimates = torch.stack([mixture_BT.clamp(min=0), mixture_BT.clamp(max=0)], 1)
        return estimates * torch.tensor(self.levels)[:, None]


class Swapping(Halves):
    """Halves whose outputs change places at random from window to window."""

    def __init__(self) -> None:
        super().__init__((2.0, 0.3))
        self.rng = np.random.default_rng(3)
        self.num_swapped = 0

    def forward(self, mixture_BT: Tensor) -> Tensor:
        estimates = super().forward(mixture_BT)
        swap = torch.from_numpy(self.rng.random(len(estimates)) < 0.5)
        self.num_swapped += int(swap.sum())
        return torch.where(swap[:, None, None], estimates.flip(1), estimates)


class Thirds(nn.Module):
    """Three bands of amplitude, cyclically shifted from window to window."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0

    def forward(self, mixture_BT: Tensor) -> Tensor:
        out = []
        for wave in mixture_BT:
            bands = [wave.clamp(min=0.1), wave.clamp(-0.1, 0.1), wave.clamp(max=-0.1)]
            out.append(torch.stack(bands).roll(self.turn, 0))
            self.turn += 1
        return torch.stack(out)


class Const(nn.Module):
    """Every estimate has one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, mixture_BT: Tensor) -> Tensor:
        return torch.full((len(mixture_BT), 2, mixture_BT.shape[1]), self.value)


class ByPower(nn.Module):
    """Divides by the power of its input, as a normalisation without an epsilon does."""

    def forward(self, mixture_BT: Tensor) -> Tensor:
        unit = mixture_BT / mixture_BT.norm(dim=1, keepdim=True)
        estimates = torch.stack([unit.clamp(min=0), unit.clamp(max=0)], 1)
        return estimates * mixture_BT.norm(dim=1)[:, None, None]


def noise(num_samples: int, seed: int = 0, peak: float = 0.8) -> np.ndarray:
    """Low-passed noise, on the 16-bit grid."""
    white = np.random.default_rng(seed).standard_normal(num_samples + 8)
    wave = np.convolve(white, np.ones(8), "valid")[:num_samples]
    return (np.round(wave / np.abs(wave).max() * peak / STEP) * STEP).astype(np.float32)


def put(path: Path, wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> Path:
    soundfile.write(str(path), wave, rate, subtype=subtype)
    return path


def outputs(folder: Path) -> np.ndarray:
    names = ("in_s1.wav", "in_s2.wav")
    return np.stack([soundfile.read(str(folder / name), dtype="float32")[0] for name in names])


def separated(
    folder: Path,
    model: nn.Module,
    wave: np.ndarray,
    rate: int = RATE,
    windows: Windows | None = None,
) -> tuple[Separation, np.ndarray]:
    """Separate a wave by way of files; returns the result and the outputs [2, T]."""
    put(folder / "in.wav", wave, rate)
    separator = Separator(model, RATE, windows=windows or Windows())
    result = separator.file(folder / "in.wav", folder / "out")
    return result, outputs(folder / "out")


def halves(wave: np.ndarray) -> np.ndarray:
    """The outputs of `Halves`, worked out by NumPy."""
    return np.stack([wave.clip(min=0), wave.clip(max=0)])


def no_pauses(size: int, overlap: int) -> Pauses:
    return Pauses(lambda wave_T: pytest.fail("heard a pause"), RATE, size, overlap)


@settings(max_examples=150)
@given(
    data=st.data(),
    size=st.integers(2, 40),
    num_samples=st.integers(1, 200),
    block=st.integers(1, 60),
)
def test_windows_joined_again_are_the_signal_for_any_sizes(
    data: st.DataObject, size: int, num_samples: int, block: int
) -> None:
    overlap = data.draw(st.integers(1, size // 2))
    wave = np.random.default_rng(num_samples).standard_normal(num_samples).astype(np.float32)
    blocks = [wave[i : i + block] for i in range(0, num_samples, block)]
    windows = list(cut_windows(blocks, size, overlap))
    assert {len(window) for window, _ in windows} == {min(size, num_samples)}
    stacked = (np.vstack([halves(w), w])[:, context:] for w, context in windows)
    joined = np.concatenate(list(overlap_add(stacked, overlap, no_pauses(size, overlap))), axis=1)
    np.testing.assert_allclose(joined, np.vstack([halves(wave), wave]), atol=1e-6)


@pytest.mark.parametrize("num_samples", [3 * RATE, 10 * RATE, 10 * RATE + 1, 79_999])
def test_windows_and_whole_file_agree_for_a_model_that_does_not_look_around(
    tmp_path: Path, num_samples: int
) -> None:
    wave = noise(num_samples)
    windows = Windows(window_seconds=1.7, overlap_seconds=0.4, batch_size=3)
    result, got = separated(tmp_path, Halves(), wave, windows=windows)
    assert result.outputs == [str(tmp_path / "out" / f"in_s{n}.wav") for n in (1, 2)]
    assert result.num_samples == num_samples and result.warnings == []
    np.testing.assert_allclose(got, halves(wave), atol=1.5 * STEP)


def test_speakers_keep_their_order_when_the_model_swaps_its_outputs(tmp_path: Path) -> None:
    wave, model = noise(30 * RATE), Swapping()
    _, got = separated(tmp_path, model, wave, windows=Windows(1.0, 0.25))
    assert 10 < model.num_swapped < 30
    if got[0].sum() < 0:  # the first window decides which speaker is the first
        got = got[::-1]
    np.testing.assert_allclose(got, halves(wave), atol=1.5 * STEP)


def test_three_speakers_keep_their_order_too() -> None:
    wave, size, overlap = noise(5000, peak=0.9), 300, 80
    model = Thirds()
    expected = model(torch.from_numpy(wave)[None])[0].numpy()
    cut = list(cut_windows([wave], size, overlap))
    model.turn = 0
    estimates = model(torch.from_numpy(np.stack([window for window, _ in cut]))).numpy()
    stacked = [
        np.concatenate([p, w[None]])[:, c:] for p, (w, c) in zip(estimates, cut, strict=True)
    ]
    joined = np.concatenate(list(overlap_add(stacked, overlap, no_pauses(size, overlap))), axis=1)
    np.testing.assert_allclose(joined[:3], expected, atol=1e-6)


def test_the_level_and_sign_that_training_leaves_open_are_fitted_to_the_mixture(
    tmp_path: Path,
) -> None:
    wave = noise(5 * RATE)
    result, got = separated(tmp_path, Halves((-0.02, 30.0)), wave)
    np.testing.assert_allclose(result.gains, [-50.0, 1 / 30], rtol=1e-5)
    np.testing.assert_allclose(got.sum(0), wave, atol=2 * STEP)


def test_outputs_that_would_clip_are_scaled_by_one_factor_with_a_warning(tmp_path: Path) -> None:
    class Overshooting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x + 2 * x * x, -2 * x * x], 1)

    wave = noise(2 * RATE, peak=0.9)
    result, got = separated(tmp_path, Overshooting(), wave)
    peak = np.max(np.abs([wave + 2 * wave**2, 2 * wave**2]))
    assert result.scale == pytest.approx(0.99 / peak, rel=1e-4)
    assert "clipped" in result.warnings[0]
    assert np.abs(got).max() == pytest.approx(0.99, abs=1e-3)
    np.testing.assert_allclose(got.sum(0), wave * result.scale, atol=2 * STEP)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("extra", [0, 1, 4093])
def test_outputs_have_the_rate_and_length_of_the_input_and_no_delay(
    tmp_path: Path, rate: int, extra: int
) -> None:
    num_samples = 6 * rate + extra
    time = np.arange(num_samples) / rate
    wave = (0.4 * np.sin(2 * np.pi * 310 * time) + 0.3 * np.sin(2 * np.pi * 1230 * time)).astype(
        np.float32
    )

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x, torch.zeros_like(x)], 1)

    result, got = separated(tmp_path, Scaled(), wave, rate, Windows(2.0, 0.5))
    assert result.sample_rate == rate
    assert got.shape == (2, num_samples)
    # A filter rings at the ends of a tone that starts at once.
    middle = slice(rate // 10, -rate // 10)
    np.testing.assert_allclose(got[0][middle], wave[middle], atol=2e-3)
    assert not got[1].any()


def test_streamed_resampling_is_that_of_the_whole_signal() -> None:
    import soxr

    wave = noise(50_000)
    whole = soxr.resample(wave, 44100, 8000, quality="HQ")
    blocks = np.array_split(wave, [10, 999, 30_000])
    streamed = np.concatenate([b[0] for b in resampled((b[None] for b in blocks), 44100, 8000)])
    assert abs(len(streamed) - len(whole)) <= 1
    shared = min(len(streamed), len(whole))
    np.testing.assert_allclose(streamed[:shared], whole[:shared], atol=1e-5)


def test_a_stereo_recording_is_the_mean_of_its_channels(tmp_path: Path) -> None:
    left, right = noise(RATE, 1), noise(RATE, 2)
    _, got = separated(tmp_path, Halves(), np.stack([left, right], 1))
    np.testing.assert_allclose(got, halves((left + right) / 2), atol=1.5 * STEP)


def test_a_recording_shorter_than_the_model_takes_is_padded_and_cut_again(tmp_path: Path) -> None:
    model = Halves()
    model.min_length = 16
    wave = np.array([0.5, -0.25, 0.25], dtype=np.float32)
    _, got = separated(tmp_path, model, wave)
    np.testing.assert_allclose(got, halves(wave), atol=STEP)


def test_flac_in_and_out(tmp_path: Path) -> None:
    wave = noise(RATE)
    recording = put(tmp_path / "in.flac", wave)
    result = Separator(Halves(), RATE).file(recording, tmp_path / "out", file_format="flac")
    assert [soundfile.info(name).format for name in result.outputs] == ["FLAC", "FLAC"]
    first, _ = soundfile.read(result.outputs[0])
    np.testing.assert_allclose(first, wave.clip(min=0), atol=1.5 * STEP)


def test_memory_does_not_grow_with_a_twenty_minute_recording(tmp_path: Path) -> None:
    block = noise(60 * RATE)
    with soundfile.SoundFile(str(tmp_path / "in.wav"), "w", RATE, 1, "PCM_16") as sound:
        for _ in range(20):
            sound.write(block)
    model, windows = Halves(), Windows(4.0, 1.0, batch_size=2)
    tracemalloc.start()
    Separator(model, RATE, windows=windows).file(tmp_path / "in.wav", tmp_path / "out")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.largest_batch == 2 * 4 * RATE
    assert peak_bytes < 8_000_000  # the recording alone is 38 MB as float32
    assert soundfile.info(str(tmp_path / "out" / "in_s2.wav")).frames == 20 * 60 * RATE


def test_a_silent_recording_gives_silent_outputs_and_a_warning(tmp_path: Path) -> None:
    silence = np.zeros(9 * RATE, dtype=np.float32)
    result, got = separated(tmp_path, ByPower(), silence, windows=Windows(2.0, 0.5))
    assert "silent" in result.warnings[0] and "in.wav" in result.warnings[0]
    assert got.shape == (2, 9 * RATE) and not got.any()


def test_the_model_gets_no_silence_from_inside_a_recording(tmp_path: Path) -> None:
    speech = [np.zeros(5 * RATE), noise(4 * RATE), np.zeros(6 * RATE), noise(RATE)]
    wave = np.concatenate(speech).astype(np.float32)
    _, got = separated(tmp_path, ByPower(), wave, windows=Windows(1.0, 0.5, batch_size=2))
    np.testing.assert_allclose(got, halves(wave), atol=2 * STEP)


def test_a_recording_that_cannot_be_separated_is_named_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    wave = noise(RATE)
    broken = wave.copy()
    broken[RATE // 2] = np.nan
    put(tmp_path / "nan.wav", broken, subtype="FLOAT")
    put(tmp_path / "empty.wav", wave[:0])
    put(tmp_path / "good.wav", wave)
    (tmp_path / "text.wav").write_text("this is no audio")
    whole = put(tmp_path / "whole.flac", noise(20 * RATE)).read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    cases = [
        ("nan.wav", Halves(), r"nan\.wav.*0\.5000 s"),
        ("empty.wav", Halves(), r"empty\.wav is empty"),
        ("text.wav", Halves(), r"text\.wav: cannot be decoded"),
        ("cut.flac", Halves(), r"cut\.flac is (cut short|damaged)"),
        ("good.wav", Const(float("nan")), r"good\.wav.*NaN"),
    ]
    for name, model, message in cases:
        with pytest.raises(SeparationError, match=message):
            Separator(model, RATE).file(tmp_path / name, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"absent\.wav"):
        Separator(Halves(), RATE).file(tmp_path / "absent.wav", tmp_path / "out")


def test_an_earlier_output_survives_a_later_failure(tmp_path: Path) -> None:
    _, before = separated(tmp_path, Halves(), noise(RATE))
    with pytest.raises(SeparationError):
        Separator(Const(float("inf")), RATE).file(tmp_path / "in.wav", tmp_path / "out")
    np.testing.assert_array_equal(outputs(tmp_path / "out"), before)


def test_earlier_outputs_are_there_again_if_a_later_one_cannot_be_written(tmp_path: Path) -> None:
    separated(tmp_path, Halves(), noise(RATE))
    first, second = sorted((tmp_path / "out").iterdir())
    kept = first.read_bytes()
    second.unlink()
    second.mkdir()
    put(tmp_path / "in.wav", noise(RATE, 5))
    with pytest.raises(IsADirectoryError, match=f"{second.name} is a folder"):
        Separator(Halves(), RATE).file(tmp_path / "in.wav", tmp_path / "out")
    assert first.read_bytes() == kept
    assert sorted((tmp_path / "out").iterdir()) == [first, second] and second.is_dir()


def test_a_recording_is_not_replaced_by_its_own_output(tmp_path: Path) -> None:
    put(tmp_path / "a_s1.wav", noise(RATE))
    before = (tmp_path / "a_s1.wav").read_bytes()
    with pytest.raises(SeparationError, match=r"a_s1\.wav: an output would replace it"):
        Separator(Halves(), RATE).file(tmp_path / "a_s1.wav", tmp_path, stem="a")
    assert (tmp_path / "a_s1.wav").read_bytes() == before


def test_a_model_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "in.wav", noise(RATE))
    with pytest.raises(SeparationError, match=r"\[B, S, T\]"):
        Separator(nn.Identity(), RATE).file(tmp_path / "in.wav", tmp_path / "out")


def test_an_overlap_above_half_a_window_is_refused() -> None:
    with pytest.raises(SeparationError, match="at most half"):
        Windows(window_seconds=2.0, overlap_seconds=1.5)


def test_estimates_that_are_equal_share_the_mixture(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x, x], 1)

    result, _ = separated(tmp_path, Twins(), noise(RATE))
    assert result.gains == pytest.approx([0.5, 0.5])


def test_recordings_and_outputs_on_object_storage(tmp_path: Path, bucket: str) -> None:
    wave = noise(RATE)
    storage.put_file(put(tmp_path / "in.wav", wave), f"s3://{bucket}/a/in.wav")
    result = Separator(Halves(), RATE).file(f"s3://{bucket}/a/in.wav", f"s3://{bucket}/out")
    assert result.outputs == [f"s3://{bucket}/out/in_s{number}.wav" for number in (1, 2)]
    for output in result.outputs:
        storage.fetch_file(output, tmp_path / "out" / output.rsplit("/", 1)[1])
    np.testing.assert_allclose(outputs(tmp_path / "out"), halves(wave), atol=1.5 * STEP)
    with pytest.raises(FileNotFoundError, match=r"a/absent\.wav"):
        Separator(Halves(), RATE).file(f"s3://{bucket}/a/absent.wav", f"s3://{bucket}/out")


def test_the_program_refuses_outputs_that_would_replace_a_recording(run_verb, capsys) -> None:
    assert run_verb(separate, "--model=m", "--output=x", "x/a.wav", "x/a_s1.wav") == 1
    assert "replace the recording" in capsys.readouterr().err


def test_the_program_names_a_model_that_is_not_there(tmp_path: Path, run_verb, capsys) -> None:
    model = str(tmp_path / "none")
    assert run_verb(separate, "--model", model, "--output", str(tmp_path), "a.wav") == 1
    assert model in capsys.readouterr().err


def test_help_says_what_the_program_does_with_examples(run_verb, capsys) -> None:
    assert run_verb(separate, "--help") == 0
    shown = capsys.readouterr().out
    assert "sepdist separate --model runs/a" in shown and "--overlap-seconds" in shown


def test_the_program_writes_what_a_separator_in_python_writes(
    tmp_path: Path, run_verb, capsys
) -> None:
    write_export(tmp_path / "model")
    recordings = [
        put(tmp_path / f"{name}.wav", noise(RATE, seed)) for seed, name in enumerate("ab")
    ]
    options = ["--window-seconds=0.5", "--overlap-seconds=0.2", "--format=flac", "--device=cpu"]
    words = [*options, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "cli")]
    assert run_verb(separate, *words, *map(str, recordings)) == 0
    separator = sepdist.load(tmp_path / "model", window_seconds=0.5, overlap_seconds=0.2)
    printed = capsys.readouterr().out.splitlines()
    for recording in recordings:
        result = separator.file(recording, tmp_path / "python", file_format="flac")
        for output in result.outputs:
            name = Path(output).name
            assert str(tmp_path / "cli" / name) in printed
            assert (tmp_path / "cli" / name).read_bytes() == Path(output).read_bytes()


def test_a_recording_that_fails_does_not_keep_the_program_from_the_next(
    tmp_path: Path, run_verb, capsys
) -> None:
    write_export(tmp_path / "model")
    put(tmp_path / "empty.wav", noise(RATE)[:0])
    put(tmp_path / "silent.wav", 0 * noise(RATE))
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    names = [str(tmp_path / name) for name in ("empty.wav", "silent.wav")]
    assert run_verb(separate, *words, *names) == 1
    shown = capsys.readouterr()
    assert "error:" in shown.err and "empty.wav is empty" in shown.err
    assert "warning:" in shown.err and "silent_s2.wav" in shown.out


def test_the_program_refuses_a_device_that_is_not_there(tmp_path: Path, run_verb, capsys) -> None:
    write_export(tmp_path / "model")
    put(tmp_path / "in.wav", noise(RATE))
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert run_verb(separate, *words, "--device=gpu7", str(tmp_path / "in.wav")) == 1
    assert "error: device 'gpu7' cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.seconds(15)
def test_ctrl_c_ends_the_program_with_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write_export(tmp_path / "model")
    with soundfile.SoundFile(str(tmp_path / "long.wav"), "w", RATE, 1, "PCM_16") as sound:
        sound.write(np.tile(noise(60 * RATE), 120))
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "sepdist", "separate", *words, str(tmp_path / "long.wav")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("out/.separating-*/0.f32")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert (out, err) == ("", "stopped; nothing is left of the unfinished recording\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_packages_that_the_user_names_are_used_before_the_model_is_loaded(
    tmp_path: Path, run_verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    monkeypatch.setattr(slots, "use_plugins", used.extend)
    words = ["--model", str(tmp_path / "none"), "--output", str(tmp_path)]
    assert run_verb(separate, *words, "--plugins=one", "--plugins=two", "a.wav") == 1
    assert used == ["one", "two"]
