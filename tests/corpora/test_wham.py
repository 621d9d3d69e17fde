"""WHAM!'s noise, and mixtures of WHAM! and WHAMR! in trees like those that their scripts write."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from sepdist.audio import AudioError
from sepdist.corpora.wham import Wham
from sepdist.data.records import Mixture
from tests.corpora.conftest import signal, write


def test_noises_come_sorted_with_keys_without_dots_and_their_first_channel(
    noise_root: Path,
) -> None:
    records = list(Wham(str(noise_root)).records("tr"))
    assert [record.id for record in records] == ["40na010x_1p9857_01xo031a_-1p9857", "long"]
    assert {record.speaker for record in records} == {"noise"}
    left = soundfile.read(str(noise_root / "tr" / "long.wav"))[0][:, 0]
    loaded = pickle.loads(pickle.dumps(records[1])).load()
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, scipy.signal.resample_poly(left, 1, 2), atol=1 / 65536)


def test_names_that_would_meet_in_one_key_are_an_error(tmp_path: Path) -> None:
    for name in ("a.b", "apb"):
        write(tmp_path / "tr" / f"{name}.wav", signal(1, 1000))
    with pytest.raises(ValueError, match="'apb'"):
        list(Wham(str(tmp_path)).records("tr"))


def test_folders_below_the_split_enter_the_key(tmp_path: Path) -> None:
    for name in ("rain/1.flac", "wind/1.flac"):
        write(tmp_path / "tr" / name, signal(1, 1000), 8000)
    assert [record.id for record in Wham(str(tmp_path)).records("tr")] == ["rain-1", "wind-1"]


NAME = "40na010x_1.9857_01xo031a_-1.9857"


def tree(root: Path, rooms: dict[str, dict[str, np.ndarray]], noise: np.ndarray) -> Path:
    """Write one mixture as floats, as the scripts do: sums of the sources of a room and noise."""
    base = root / "wav8k" / "min" / "tr"
    for room, sources in rooms.items():
        s1, s2 = sources["s1"], sources["s2"]
        folders = {"s1": s1, "s2": s2, "mix_clean": s1 + s2, "mix_single": s1 + noise}
        for folder, wave in {**folders, "mix_both": s1 + s2 + noise}.items():
            path = base / f"{folder}{room}" / f"{NAME}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(str(path), wave, 8000, subtype="FLOAT")
    (base / "noise").mkdir(exist_ok=True)
    soundfile.write(str(base / "noise" / f"{NAME}.wav"), noise, 8000, subtype="FLOAT")
    return base


def sources(seed: int) -> dict[str, np.ndarray]:
    return {"s1": signal(seed, 3000), "s2": signal(seed + 1, 3000)}


@pytest.mark.parametrize(
    ("task", "wanted", "speakers"),
    [
        ("sep_clean", {"s1": "s1", "s2": "s2"}, ("40n", "01x")),
        ("sep_noisy", {"s1": "s1", "s2": "s2", "noise": "noise"}, ("40n", "01x")),
        ("enh_single", {"s1": "s1", "noise": "noise"}, ("40n",)),
        ("enh_both", {"s1": "mix_clean", "noise": "noise"}, ("40n+01x",)),
    ],
)
@pytest.mark.parametrize("room", ["", "_anechoic"])
def test_the_tasks_of_wham_have_its_sources_and_their_sum_is_its_mixture(
    tmp_path: Path, task: str, wanted: dict[str, str], speakers: tuple[str, ...], room: str
) -> None:
    base = tree(tmp_path, {room: sources(1)}, signal(9, 3000))
    (record,) = Wham(str(tmp_path), task=task).records("tr")
    assert isinstance(record, Mixture) and record.speakers == speakers
    assert record.id == "40na010x_1p9857_01xo031a_-1p9857"
    loaded = pickle.loads(pickle.dumps(record)).load()
    assert list(loaded) == list(wanted)
    for member, folder in wanted.items():
        where = base / (folder if folder == "noise" else f"{folder}{room}") / f"{NAME}.wav"
        np.testing.assert_array_equal(loaded[member], soundfile.read(str(where))[0])
    kind = {"sep_clean": "mix_clean", "enh_single": "mix_single"}.get(task, "mix_both")
    mixed = soundfile.read(str(base / f"{kind}{room}" / f"{NAME}.wav"))[0]
    np.testing.assert_allclose(sum(loaded.values()), mixed, atol=1e-6)
    write(base / f"{kind}{room}" / f"{NAME}.wav", signal(5, 3000), 8000)
    with pytest.raises(AudioError, match=f"{kind}{room}/.* is not the sum"):
        record.load()


@pytest.mark.parametrize(
    ("task", "mixture", "dry", "wet"),
    [
        ("sep_reverb", "mix_clean", ["s1", "s2"], ["s1", "s2"]),
        ("sep_noisy_reverb", "mix_both", ["s1", "s2"], ["s1", "s2", "noise"]),
        ("enh_single_reverb", "mix_single", ["s1"], ["s1", "noise"]),
        ("enh_both_reverb", "mix_both", ["mix_clean"], ["mix_clean", "noise"]),
    ],
)
def test_the_sources_of_whamr_are_dry_beside_the_wet_mixture_or_as_wet_as_it(
    tmp_path: Path, task: str, mixture: str, dry: list[str], wet: list[str]
) -> None:
    rooms = {"_anechoic": sources(1), "_reverb": sources(3)}
    base = tree(tmp_path, rooms, signal(9, 3000))

    def stored(folder: str, room: str) -> np.ndarray:
        name = folder if folder == "noise" else f"{folder}{room}"
        return np.asarray(soundfile.read(str(base / name / f"{NAME}.wav"))[0])

    (record,) = Wham(str(tmp_path), task=task).records("tr")
    loaded = dict(record.load())
    np.testing.assert_array_equal(loaded.pop("mix"), stored(mixture, "_reverb"))
    for wave, folder in zip(loaded.values(), dry, strict=True):
        np.testing.assert_array_equal(wave, stored(folder, "_anechoic"))
    (record,) = Wham(str(tmp_path), task=task, target="wet").records("tr")
    for wave, folder in zip(record.load().values(), wet, strict=True):
        np.testing.assert_array_equal(wave, stored(folder, "_reverb"))


def test_faults_of_tasks_are_named(tmp_path: Path) -> None:
    tree(tmp_path, {"": sources(1)}, signal(9, 3000))
    with pytest.raises(AudioError, match=r"has no s1_anechoic, so it is not WHAMR!"):
        list(Wham(str(tmp_path), task="sep_reverb").records("tr"))
    with pytest.raises(AudioError, match=r"wav16k"):
        list(Wham(str(tmp_path), 16000, task="sep_noisy").records("tr"))
    for wrong in ({"task": "sep_reverb_noisy"}, {"task": "sep_noisy", "target": "damp"}):
        with pytest.raises(ValueError, match=r"task is noise, sep_clean, .* target dry or wet"):
            Wham(str(tmp_path), **wrong)  # type: ignore[arg-type]
