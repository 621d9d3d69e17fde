"""LibriMix's arithmetic and draw, against plain NumPy, SciPy and pyloudnorm."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import scipy.signal
import soundfile

from sepdist import audio
from sepdist.audio import AudioError
from sepdist.corpora.files import require_unique, sample_key
from sepdist.corpora.recipes import Clip, Recipe, choose, extend_noise, level, render

STEP = 1 / 32768


def wave_of(seed: int, num_samples: int, level: float) -> np.ndarray:
    return (
        level * np.clip(np.random.default_rng(seed).standard_normal(num_samples), -3, 3)
    ).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), wave, rate, subtype="FLOAT")
    return path


@pytest.fixture
def pool(tmp_path: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Four speakers, most utterances of one, and two noises, at levels that need every guard."""
    speakers = {
        name: [
            write(
                tmp_path / "speech" / name / "1" / f"{name}-1-{i}.wav",
                wave_of(10 * n + i, 9000 + 700 * i, level),
            )
            for i in range(num)
        ]
        for n, (name, num, level) in enumerate((("a", 8, 0.02), ("b", 2, 0.3), ("c", 1, 0.1)))
    }
    spiky = wave_of(90, 8000, 0.003)
    spiky[::1500] = 0.9  # a peak far above the loudness: the target level would clip
    speakers["d"] = [write(tmp_path / "speech" / "d" / "1" / "d-1-0.wav", spiky)]
    noises = [
        write(tmp_path / "noise" / "tr" / f"{i}.wav", wave_of(50 + i, size, 0.2))
        for i, size in ((0, 8500), (1, 30000))
    ]
    return speakers, noises


def drawn(
    tmp_path: Path, pool: tuple[dict[str, list[Path]], list[Path]], **changes: object
) -> list[Recipe]:
    arguments = {"num_mixtures": 30, "num_sources": 2, "seed": 3, "split": "train"} | changes
    choices = choose(*pool, **arguments)  # type: ignore[arg-type]
    return level(choices, tmp_path / "speech", tmp_path / "noise")


def test_a_constant_noise_stays_constant_through_every_cross_fade() -> None:
    extended = extend_noise(np.full(13000, 0.25), 16000, 50000)
    np.testing.assert_allclose(extended, np.full(50000, 0.25), atol=1e-12)


def test_an_extended_noise_repeats_between_fades_of_half_a_hann_window() -> None:
    noise, rate = wave_of(1, 2500, 0.1).astype(np.float64), 1000
    fade, step = 501, 2500 - 501
    extended = extend_noise(noise, rate, 5000)
    rise = np.sin(np.pi * np.arange(fade) / rate) ** 2
    np.testing.assert_array_equal(extended[:step], noise[:step])
    np.testing.assert_allclose(
        extended[step:2500], noise[step:] * rise[::-1] + noise[:fade] * rise, atol=1e-12
    )
    np.testing.assert_array_equal(extended[2500 : 2 * step], noise[fade:step])
    assert extended.size == 5000


@pytest.mark.parametrize("size", [4, 5, 300, 501, 502, 700])
def test_noise_shorter_than_the_fade_is_extended_too(size: int) -> None:
    extended = extend_noise(np.ones(size), 1000, 3000)
    assert extended.size == 3000
    # Between one and two fades a seam is faded twice, so only there the constant is not kept.
    assert np.abs(extended - 1).max() < (1e-12 if size <= 501 else 1.0)


def test_long_noise_is_cut_and_a_noise_of_nothing_is_an_error() -> None:
    np.testing.assert_array_equal(extend_noise(np.arange(10.0), 8000, 4), [0, 1, 2, 3])
    with pytest.raises(AudioError, match="3 samples"):
        extend_noise(np.ones(3), 8000, 4)


@pytest.mark.parametrize(("mode", "length"), [("min", 5001), ("max", 6500)])
def test_a_recipe_is_rendered_as_scaled_resampled_and_fitted_members(
    tmp_path: Path, mode: str, length: int
) -> None:
    waves = {"a": wave_of(1, 10001, 0.1), "b": wave_of(2, 13000, 0.1), "n": wave_of(3, 20000, 0.1)}
    for name, wave in waves.items():
        write(tmp_path / f"{name}.wav", wave)
    recipe = Recipe("x", (Clip("a.wav", 0.7), Clip("b.wav", 1.3)), Clip("n.wav", 0.21))
    members = render(recipe, tmp_path, tmp_path, 8000, mode, 2)  # type: ignore[arg-type]
    assert list(members) == ["s1", "s2", "noise"]
    for member, name, gain in (("s1", "a", 0.7), ("s2", "b", 1.3), ("noise", "n", 0.21)):
        kept = waves[name].astype(np.float64)[:13000]
        expected = scipy.signal.resample_poly(gain * kept, 1, 2)
        expected = np.concatenate([expected, np.zeros(length)])[:length]
        assert members[member].dtype == np.float32
        np.testing.assert_allclose(members[member], expected, atol=STEP / 2)


def test_a_libri1mix_item_is_the_first_source_at_the_length_of_its_pair(tmp_path: Path) -> None:
    for name, size in (("a", 9000), ("b", 6000), ("n", 9000)):
        write(tmp_path / f"{name}.wav", wave_of(size, size, 0.1), 8000)
    recipe = Recipe("x", (Clip("a.wav", 1.0), Clip("b.wav", 1.0)), Clip("n.wav", 1.0))
    members = render(recipe, tmp_path, tmp_path, 8000, "min", 1)
    assert {name: wave.size for name, wave in members.items()} == {"s1": 6000, "noise": 6000}
    assert list(render(recipe, tmp_path, None, 8000, "max", 2)) == ["s1", "s2"]


def test_files_of_different_rates_in_one_mixture_are_an_error_that_names_one(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.wav", wave_of(1, 9000, 0.1), 16000)
    write(tmp_path / "b.wav", wave_of(1, 9000, 0.1), 8000)
    recipe = Recipe("x", (Clip("a.wav", 1.0), Clip("b.wav", 1.0)), None)
    with pytest.raises(AudioError, match=r"b\.wav: its rate is 8000 Hz.*16000"):
        render(recipe, tmp_path, None, 8000, "min", 2)
    with pytest.raises(ValueError, match="no noise"):
        render(Recipe("x", (Clip("a.wav", 1.0),), None), tmp_path, tmp_path, 8000, "min", 1)


def test_speakers_are_equally_likely_however_many_utterances_they_have(
    pool: tuple[dict[str, list[Path]], list[Path]],
) -> None:
    paths = {name: [Path(f"{name}/{i}") for i in range(40)] for name in "wxyz"}
    paths["w"] = [Path(f"w/{i}") for i in range(400)]
    choices = choose(paths, [], num_mixtures=600, num_sources=2, seed=0, split="train")
    counts = Counter(path.parts[0] for choice in choices for path in choice.sources)
    assert all(240 <= counts[name] <= 360 for name in "wxyz")  # 300 expected, standard deviation 12
    assert all(len({path.parts[0] for path in choice.sources}) == 2 for choice in choices)
    assert len({frozenset(choice.sources) for choice in choices}) == 600


def test_a_draw_depends_on_seed_and_split_and_a_longer_one_begins_with_a_shorter(
    tmp_path: Path, pool: tuple[dict[str, list[Path]], list[Path]]
) -> None:
    first = drawn(tmp_path, pool)
    assert first == drawn(tmp_path, pool)
    assert first[:10] == drawn(tmp_path, pool, num_mixtures=10)
    assert first != drawn(tmp_path, pool, seed=4)
    assert first != drawn(tmp_path, pool, split="dev")
    assert len({recipe.id for recipe in first}) == len(first)


def test_drawn_gains_give_the_drawn_loudness_and_librimixs_two_guards(
    tmp_path: Path, pool: tuple[dict[str, list[Path]], list[Path]]
) -> None:
    choices = choose(*pool, num_mixtures=30, num_sources=2, seed=3, split="train")
    outcomes: Counter[str] = Counter()
    for choice, recipe in zip(choices, drawn(tmp_path, pool), strict=True):
        assert recipe.noise is not None and choice.noise is not None
        waves = [soundfile.read(str(path), dtype="float64")[0] for path in choice.sources]
        noise = extend_noise(
            soundfile.read(str(choice.noise), dtype="float64")[0], 16000, max(map(len, waves))
        )
        scaled, guarded = [], False
        for wave, target in zip([*waves, noise], [*choice.levels, choice.noise_level], strict=True):
            now = pyloudnorm.Meter(16000).integrated_loudness(wave)
            normal = wave * 10 ** ((target - now) / 20)
            if np.abs(normal).max() >= 1:
                normal, guarded = wave * 0.9 / np.abs(wave).max(), True
            scaled.append(normal)
        total = sum(np.pad(wave, (0, len(noise) - len(wave))) for wave in scaled)
        lowered = np.abs(total).max() > 0.9
        factor = 0.9 / np.abs(total).max() if lowered else 1.0
        outcomes["source guarded"] += guarded
        outcomes["mixture lowered"] += lowered
        outcomes["as drawn"] += not guarded and not lowered
        gains = [*(clip.gain for clip in recipe.sources), recipe.noise.gain]
        for gain, wave, raw in zip(gains, scaled, [*waves, noise], strict=True):
            np.testing.assert_allclose(gain * raw, wave * factor, atol=STEP / 4)
        assert (
            all(-33 <= level <= -25 for level in choice.levels) and -38 <= choice.noise_level <= -30
        )
    assert min(outcomes[name] for name in ("source guarded", "mixture lowered", "as drawn")) >= 3, (
        outcomes
    )


def test_a_draw_measures_each_utterance_once(
    tmp_path: Path, pool: tuple[dict[str, list[Path]], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: Counter[str] = Counter()
    original = audio.loudness

    def counting(wave: np.ndarray, rate: int, path: str) -> float:
        measured[path] += 1
        return original(wave, rate, path)

    monkeypatch.setattr(audio, "loudness", counting)
    drawn(tmp_path, pool)
    utterances = {str(path) for paths in pool[0].values() for path in paths}
    assert {measured[path] for path in utterances} == {1}


def test_an_impossible_draw_is_an_error_with_the_numbers(
    tmp_path: Path, pool: tuple[dict[str, list[Path]], list[Path]]
) -> None:
    with pytest.raises(ValueError, match="'train' has 4 speakers, a mixture needs 5"):
        drawn(tmp_path, pool, num_sources=5)
    few = {"a": pool[0]["a"][:2], "b": pool[0]["b"][:1]}
    with pytest.raises(ValueError, match="after 2 of 3 mixtures from 3 utterances of 2 speakers"):
        drawn(tmp_path, (few, []), num_mixtures=3)


def test_a_key_has_no_dot_and_a_published_name_can_be_recovered() -> None:
    name = "40na010p_1.9857_01po031a_-1.9857"
    key = sample_key(name)
    fields = key.split("_")
    fields[1::2] = [field.replace("p", ".", 1) for field in fields[1::2]]
    assert "." not in key and "_".join(fields) == name
    require_unique([], "here")
    with pytest.raises(ValueError, match="'b'"):
        require_unique(["a", "b", "b"], "here")
