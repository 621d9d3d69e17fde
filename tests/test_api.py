"""The Python interface: `sepdist.load(...)` and what a program sees of it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

import sepdist
from sepdist import slots, storage
from sepdist.config import ConfigError
from sepdist.inference.separator import Separator
from sepdist.inference.windows import SeparationError, Windows
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.training.checkpoint import CheckpointError
from tests.support.exports import voices, write_export

ROOT = Path(__file__).parent.parent
RATE = 8000
USER_PROGRAM = """
import numpy as np
import torch
from numpy.typing import NDArray

import sepdist


def separate(folder: str, wave: NDArray[np.float64]) -> NDArray[np.float32]:
    separator = sepdist.load(folder, device="cpu", window_seconds=6.0)
    result = separator.file("meeting.wav", folder, file_format="flac")
    counts: int = separator.num_speakers + result.num_samples + len(sepdist.__version__)
    separator(torch.zeros(8000), 8000)
    separator([0.0] * counts, separator.sample_rate)
    return separator(wave, 16000)
"""


class Bands(nn.Module):
    """Speaker 1 is what exceeds 0.1 in magnitude, speaker 2 the rest: the two add up to the wave.

    Both are scaled, by 3 and by -0.5, as models leave the level open.
    """

    def forward(self, mixture_BT: Tensor) -> Tensor:
        quiet_BT = mixture_BT.clamp(-0.1, 0.1)
        return torch.stack([3 * (mixture_BT - quiet_BT), -0.5 * quiet_BT], 1)


def bands(wave: np.ndarray) -> np.ndarray:
    """What `Bands` gives at the level of the mixture, worked out by NumPy."""
    quiet = wave.clip(-0.1, 0.1)
    return np.stack([wave - quiet, quiet])


@pytest.fixture
def separator() -> Separator:
    return Separator(Bands(), RATE, windows=Windows(1.0, 0.25))


@pytest.fixture
def wave() -> np.ndarray:
    return voices(3 * RATE + 17).sum(0)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_export(tmp_path / "export")
    return tmp_path / "export"


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)


def test_importing_sepdist_imports_nothing_heavy_and_lists_what_it_offers() -> None:
    program = (
        "import sys, sepdist; "
        "print(sorted({'numpy', 'torch', 'hydra', 'soundfile', 'ray', 'rich'} & {*sys.modules}), "
        "sorted({*sepdist.__all__} - {*dir(sepdist)}), sepdist.__version__)"
    )
    assert python("-c", program).stdout.split() == ["[]", "[]", sepdist.__version__]


def test_a_name_that_sepdist_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'sepdist' has no attribute 'separete'"):
        sepdist.separete  # noqa: B018


def test_loading_a_model_imports_neither_ray_nor_deepspeed_nor_scipy(export: Path) -> None:
    program = (
        f"import sys, sepdist; sepdist.load({str(export)!r}); "
        "print(sorted({'ray', 'deepspeed', 'hydra', 'scipy', 'matplotlib'} & {*sys.modules}))"
    )
    assert python("-c", program).stdout == "[]\n"


def test_a_loaded_separator_tells_where_it_comes_from(export: Path) -> None:
    separator = sepdist.load(export, device="cpu")
    assert separator.sample_rate == 8000 and separator.num_speakers == 2
    assert separator.device == torch.device("cpu") and isinstance(separator.model, ConvTasNet)
    assert separator.lineage == {"run": "toy", "step": 12} and separator.url == str(export)
    assert repr(separator) == f"<Separator: ConvTasNet at 8000 Hz on cpu from {export}>"


def test_the_first_four_lines_of_python_separate_a_wave(export: Path, wave: np.ndarray) -> None:
    separator = sepdist.load(export)
    estimates = separator(wave, 8000)
    assert estimates.shape == (2, len(wave)) and estimates.dtype == np.float32
    assert isinstance(estimates, np.ndarray) and estimates.flags.c_contiguous
    with torch.inference_mode():
        raw = separator.model(torch.from_numpy(wave)[None])[0].numpy().astype(np.float64)
    gains, *_ = np.linalg.lstsq(raw.T, wave.astype(np.float64), rcond=None)
    np.testing.assert_allclose(estimates, raw * gains[:, None], atol=1e-5)


def test_a_model_may_be_a_path_a_string_with_a_tilde_or_in_a_bucket(
    export: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, wave: np.ndarray
) -> None:
    for path in export.iterdir():
        storage.put_file(path, f"s3://{bucket}/models/a/{path.name}")
    monkeypatch.setenv("HOME", str(export.parent))
    names = [export, str(export), "~/export", f"s3://{bucket}/models/a"]
    estimates = [sepdist.load(name)(wave, RATE) for name in names]
    for other in estimates[1:]:
        np.testing.assert_array_equal(estimates[0], other)


def test_recordings_and_outputs_may_be_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: Separator, wave: np.ndarray
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    soundfile.write(tmp_path / "Mötley 1.wav", wave, RATE)
    result = separator.file("~/Mötley 1.wav", Path("~/out"))
    assert result.outputs == [str(tmp_path / "out" / f"Mötley 1_s{n}.wav") for n in (1, 2)]
    assert sorted(map(str, (tmp_path / "out").iterdir())) == result.outputs


def test_models_that_cannot_be_loaded_are_named(tmp_path: Path, export: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "none")):
        sepdist.load(tmp_path / "none")
    with pytest.raises(SeparationError, match="device 'gpu7' cannot be used"):
        sepdist.load(export, device="gpu7")
    with pytest.raises(SeparationError, match="at most half"):
        sepdist.load(export, window_seconds=2.0, overlap_seconds=1.5)
    with pytest.raises(SeparationError, match="does not fit a window of inf s"):
        sepdist.load(export, window_seconds=float("inf"))


def test_a_model_of_a_package_of_ones_own_is_loaded_where_the_package_is_named(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch, wave: np.ndarray
) -> None:
    (tmp_path / "my_voices.py").write_text(
        "from sepdist.models.conv_tasnet import ConvTasNet\n\n\nclass Mine(ConvTasNet):\n    pass\n"
    )
    card = (export / "model.yaml").read_text()
    own = card.replace("sepdist.models.conv_tasnet.ConvTasNet", "my_voices.Mine")
    (export / "model.yaml").write_text(own)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(slots, "_named", [])
    with pytest.raises(ConfigError, match="my_voices"):
        sepdist.load(export)
    assert "my_voices" not in sys.modules
    for plugins in ("my_voices", ["my_voices"]):
        separator = sepdist.load(export, plugins=plugins)
        assert type(separator.model).__name__ == "Mine"
        assert separator(wave, RATE).shape == (2, len(wave))


@pytest.mark.parametrize("compile", [False, True])
def test_a_loaded_model_is_compiled_only_on_request(tmp_path: Path, compile: bool) -> None:
    folder = tmp_path / "export"
    write_export(folder)
    card = (folder / "model.yaml").read_text()
    (folder / "model.yaml").write_text(card.replace("compile: false", "compile: true"))
    model = sepdist.load(folder, compile=compile).model
    found = [module.compiled for module in model.modules() if hasattr(module, "compiled")]
    assert found == [compile] * 3  # two blocks, and the masks


def test_arrays_of_every_kind_give_the_voices_of_the_same_wave(separator: Separator) -> None:
    wave = np.round(voices(2 * RATE).sum(0) * 2**15) / 2**15  # on the grid of 16 bits
    expected = separator(wave.astype(np.float32), RATE)
    np.testing.assert_allclose(expected, bands(wave), atol=1e-6)
    same = [
        wave,
        wave[None],
        np.stack([wave, wave]),
        np.asfortranarray(np.stack([wave, wave])),
        wave.tolist(),
        torch.from_numpy(wave),
        torch.from_numpy(wave)[None].float().requires_grad_(),
        (wave * 2**15).astype(np.int16),
        torch.from_numpy(wave * 2**15).short(),
        (wave * 2**31).astype(np.int32),
        np.repeat(wave, 2)[::2],
    ]
    for other in same:
        np.testing.assert_array_equal(separator(other, RATE), expected)
    rough = separator(torch.from_numpy(wave).bfloat16(), RATE)
    np.testing.assert_allclose(rough.sum(0), wave, atol=2**-8 * np.abs(wave).max())


def test_channels_are_averaged_and_the_rate_may_be_a_whole_float(separator: Separator) -> None:
    left, right = voices(RATE)
    expected = separator((left + right) / 2, RATE)
    np.testing.assert_allclose(separator(np.stack([left, right]), 8000.0), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(0), "is empty"),
        ([], "is empty"),
        (np.zeros((2, 0)), "is empty"),
        (np.float32(1.0), r"shape \(\): give \[T\]"),
        (np.zeros((1, 2, 800)), r"shape \(1, 2, 800\)"),
        (np.zeros((800, 2)), r"shape \(800, 2\).*wave\.T"),
        (np.zeros(800, np.uint8), "holds uint8: give floats, int16 or int32"),
        (np.zeros(800, complex), "holds complex128"),
        (["a", "b"], "holds <U1"),
        (np.array([0.0] * 799 + [np.nan]), r"NaN or infinity 0\.0999 s from its start"),
        (np.array([1e300] * 800), r"NaN or infinity 0\.0000 s"),
    ],
)
def test_what_is_no_wave_is_refused_with_what_to_give(
    separator: Separator, wave: object, message: str
) -> None:
    with pytest.raises(SeparationError, match=message):
        separator(wave, RATE)


@pytest.mark.parametrize("rate", [0, -8000, 16, 8000.5, float("nan"), float("inf")])
def test_a_rate_that_is_no_sample_rate_is_refused(separator: Separator, rate: float) -> None:
    with pytest.raises(SeparationError, match="a sample rate is whole, from 1000 up"):
        separator(np.zeros(800), rate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
@pytest.mark.parametrize("num_samples", [1, 2, 5, 999, 30_001])
def test_voices_have_the_rate_and_length_of_the_wave(
    separator: Separator, rate: int, num_samples: int
) -> None:
    estimates = separator(voices(num_samples).sum(0), rate)
    assert estimates.shape == (2, num_samples) and np.isfinite(estimates).all()


def test_silence_gives_silence(separator: Separator) -> None:
    estimates = separator(np.zeros(3 * RATE, np.int16), RATE)
    assert estimates.shape == (2, 3 * RATE) and not estimates.any()


@pytest.mark.parametrize("rate", [8000, 22050])
def test_a_file_and_its_samples_give_the_same_voices(
    tmp_path: Path, export: Path, rate: int
) -> None:
    separator = sepdist.load(export, window_seconds=1.0, overlap_seconds=0.5)
    soundfile.write(tmp_path / "in.wav", 3 * voices(5 * rate + 3).T, rate)
    stereo, _ = soundfile.read(tmp_path / "in.wav", dtype="int16")
    expected = separator(stereo.T, rate)
    result = separator.file(tmp_path / "in.wav", tmp_path / "out")
    for output, wave in zip(result.outputs, expected, strict=True):
        written, _ = soundfile.read(output)
        np.testing.assert_allclose(written, wave * result.scale, atol=1 / 2**15)


def test_a_call_gives_the_same_bits_whatever_was_separated_before(
    export: Path, wave: np.ndarray
) -> None:
    separator = sepdist.load(export, window_seconds=0.5, overlap_seconds=0.25, batch_size=3)
    first = separator(wave, RATE)
    separator(-2 * wave[:5000], 16000)
    np.testing.assert_array_equal(separator(wave, RATE), first)
    np.testing.assert_array_equal(sepdist.load(export)(wave[:100], RATE).shape, (2, 100))


def test_a_wave_is_not_changed_and_voices_may_exceed_full_scale(separator: Separator) -> None:
    wave = 20 * voices(RATE).sum(0)
    before = wave.copy()
    estimates = separator(wave, RATE)
    np.testing.assert_array_equal(wave, before)
    np.testing.assert_allclose(estimates.sum(0), wave, rtol=1e-4, atol=1e-4)
    assert np.abs(estimates).max() > 1


# What sepdist imports and a user's program does not see; torch alone takes mypy half a minute.
SKIPPED = "torch ray deepspeed omegaconf hydra scipy rich matplotlib s3fs fsspec safetensors yaml"


@pytest.mark.parametrize("skipped", [SKIPPED, pytest.param("", marks=pytest.mark.slow)])
def test_a_typed_program_of_a_user_passes_mypy_strict(skipped: str, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(USER_PROGRAM)
    (tmp_path / "wrong.py").write_text("import sepdist\n\nsepdist.load(3).fil('a', 'b')\n")
    sections = [f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in skipped.split()]
    (tmp_path / "mypy.ini").write_text("".join(["[mypy]\n", *sections]))
    cache = ROOT / ".mypy_cache" / f"user{len(skipped)}"
    flags = ["--strict", f"--cache-dir={cache}", f"--config-file={tmp_path / 'mypy.ini'}"]
    found = python("-m", "mypy", *flags, str(tmp_path / "program.py"), str(tmp_path / "wrong.py"))
    assert "program.py" not in found.stdout
    assert "[arg-type]" in found.stdout and "[attr-defined]" in found.stdout
    assert "Found 2 errors in 1 file" in found.stdout
