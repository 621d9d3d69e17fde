"""LibriMix from its metadata, from generated folders and by drawing, on tiny trees."""

import csv
import hashlib
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import soundfile

from sepdist.audio import AudioError
from sepdist.corpora.librimix import LibriMix
from sepdist.data.records import Mixture
from tests.corpora.conftest import SPEAKERS, signal, write

STEP = 1 / 32768
SPLIT = "train-clean-100"
HEADER = (
    "mixture_ID,source_1_path,source_1_gain,source_2_path,source_2_gain,noise_path,noise_gain\n"
)
ROW = (
    "19-7-0002_26-7-0000,train-clean-100/19/7/19-7-0002.flac,0.5,"
    "train-clean-100/26/7/26-7-0000.flac,0.25,"
    "tr/40na010x_1.9857_01xo031a_-1.9857.wav,2.25\n"
)


def read(path: Path) -> np.ndarray:
    return soundfile.read(str(path), dtype="float64")[0]


def from_metadata(
    speech_root: Path, noise_root: Path | None, tmp_path: Path, **changes: Any
) -> list[Mixture]:
    (tmp_path / "md").mkdir(exist_ok=True)
    (tmp_path / "md" / f"libri2mix_{SPLIT}.csv").write_text(HEADER + ROW)
    arguments = {"metadata": str(tmp_path / "md"), "speech_root": str(speech_root)}
    if noise_root is not None:
        arguments["noise_root"] = str(noise_root)
    return list(LibriMix(**{**arguments, **changes}).records(SPLIT))


def same_audio(first: list[Mixture], second: list[Mixture]) -> bool:
    for one, other in zip(first, second, strict=True):
        a, b = one.load(), other.load()
        if (
            one.id != other.id
            or list(a) != list(b)
            or not all(np.array_equal(a[m], b[m]) for m in a)
        ):
            return False
    return True


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_row_of_the_metadata_is_mixed_as_librimixs_scripts_do(
    speech_root: Path, noise_root: Path, tmp_path: Path, mode: str
) -> None:
    (record,) = from_metadata(speech_root, noise_root, tmp_path, mode=mode)
    assert (
        record.id == "19-7-0002_26-7-0000"
        and record.speakers == ("19", "26")
        and record.sample_rate == 8000
    )
    assert record.texts == ("WORDS OF 19-7-0002", "WORDS OF 26-7-0000")
    loaded = pickle.loads(pickle.dumps(record)).load()

    first = read(speech_root / SPLIT / "19" / "7" / "19-7-0002.flac")
    second = read(speech_root / SPLIT / "26" / "7" / "26-7-0000.flac")
    noise = read(noise_root / "tr" / "40na010x_1.9857_01xo031a_-1.9857.wav")[:, 0]
    assert len(noise) == 17000 < len(second) == 18004  # one repeat, cross-faded over 8001 samples
    rise = np.sin(np.pi * np.arange(8001) / 16000) ** 2
    seam = noise[-8001:] * rise[::-1] + noise[:8001] * rise
    noise = np.concatenate([noise[:-8001], seam, noise[8001:]])[: len(second)]
    length = {"min": 8252, "max": 9002}[mode]  # 16503 and 18004 samples at 16 kHz
    for member, wave, gain in (("s1", first, 0.5), ("s2", second, 0.25), ("noise", noise, 2.25)):
        expected = np.clip(scipy.signal.resample_poly(gain * wave, 8000, 16000), -1, 1)
        expected = np.pad(expected, (0, 9002 - len(expected)))[:length]
        np.testing.assert_allclose(loaded[member], expected, atol=STEP / 2)


def test_libri1mix_is_the_first_source_and_the_noise_at_the_pairs_length(
    speech_root: Path, noise_root: Path, tmp_path: Path
) -> None:
    (pair,) = from_metadata(speech_root, noise_root, tmp_path)
    (single,) = from_metadata(speech_root, noise_root, tmp_path, num_speakers=1)
    assert single.speakers == ("19",) and single.texts == ("WORDS OF 19-7-0002",)
    assert list(single.load()) == ["s1", "noise"]
    for member, wave in single.load().items():
        np.testing.assert_array_equal(wave, pair.load()[member])


def test_without_noise_no_noise_is_needed_on_disk(speech_root: Path, tmp_path: Path) -> None:
    (record,) = from_metadata(speech_root, None, tmp_path, noise=False)
    assert list(record.load()) == ["s1", "s2"]


def drawing(speech_root: Path, noise_root: Path | None, **changes: Any) -> LibriMix:
    arguments: dict[str, Any] = {"speech_root": str(speech_root), "draw": True, "num_mixtures": 6}
    if noise_root is not None:
        arguments["noise_root"] = str(noise_root)
    return LibriMix(**{**arguments, "min_seconds": 0.5, "seed": 5, **changes})


@pytest.mark.parametrize("num_speakers", [1, 2, 3])
def test_a_draw_written_as_csv_reads_back_to_the_same_audio(
    speech_root: Path, noise_root: Path, tmp_path: Path, num_speakers: int
) -> None:
    drawn = list(
        drawing(
            speech_root, noise_root, num_speakers=num_speakers, metadata_out=str(tmp_path / "md")
        ).records(SPLIT)
    )
    corpus = LibriMix(
        num_speakers=num_speakers,
        speech_root=str(speech_root),
        noise_root=str(noise_root),
        metadata=str(tmp_path / "md"),
    )
    back = list(corpus.records(SPLIT))
    assert len(drawn) == 6 and same_audio(drawn, back)
    assert all(len(set(record.speakers)) == num_speakers for record in drawn)
    with (tmp_path / "md" / f"libri{max(2, num_speakers)}mix_{SPLIT}.csv").open() as file:
        columns = next(csv.reader(file))
    assert (
        ",".join(columns[:5])
        == "mixture_ID,source_1_path,source_1_gain,source_2_path,source_2_gain"
    )
    assert columns[-2:] == ["noise_path", "noise_gain"]


def test_a_draw_is_the_same_again_and_its_mixtures_never_clip(
    speech_root: Path, noise_root: Path
) -> None:
    records = list(drawing(speech_root, noise_root).records(SPLIT))
    assert same_audio(records, list(drawing(speech_root, noise_root).records(SPLIT)))
    assert not same_audio(
        records[:3], list(drawing(speech_root, noise_root, num_mixtures=3, seed=6).records(SPLIT))
    )
    for record in records:
        members = record.load()
        assert (
            np.abs(sum(members.values())).max() < 0.95
            and len({wave.size for wave in members.values()}) == 1
        )


def test_a_draw_without_noise_is_written_and_read_without_noise(
    speech_root: Path, tmp_path: Path
) -> None:
    drawn = list(drawing(speech_root, None, noise=False, metadata_out=str(tmp_path)).records(SPLIT))
    back = LibriMix(metadata=str(tmp_path), speech_root=str(speech_root), noise=False)
    assert same_audio(drawn, list(back.records(SPLIT))) and list(drawn[0].load()) == ["s1", "s2"]


def test_written_mixtures_are_kept_by_an_equal_draw_and_never_overwritten_by_another(
    speech_root: Path, noise_root: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        list(drawing(speech_root, noise_root, metadata_out=str(tmp_path)).records(SPLIT))
    with pytest.raises(FileExistsError, match="other mixtures"):
        list(drawing(speech_root, noise_root, metadata_out=str(tmp_path), seed=6).records(SPLIT))


def test_ranges_of_speakers_that_do_not_overlap_share_no_speaker(
    speech_root: Path, noise_root: Path
) -> None:
    places = {
        name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in SPEAKERS
    }
    ordered = sorted(places, key=places.__getitem__)
    cut = (places[ordered[1]] + places[ordered[2]]) / 2
    halves = []
    for speakers in ([0.0, cut], [cut, 1.0]):
        drawn = drawing(
            speech_root, noise_root, num_mixtures=1, speakers=speakers, min_seconds=0.0
        ).records(SPLIT)
        halves.append({speaker for record in drawn for speaker in record.speakers})
    assert halves == [set(ordered[:2]), set(ordered[2:])]


def test_utterances_below_the_least_length_are_not_drawn(
    speech_root: Path, noise_root: Path
) -> None:
    records = drawing(speech_root, noise_root, min_seconds=1.1, num_mixtures=4).records(SPLIT)
    # 26-7-0000 (18,004 samples), 103-7-000{0,1} and 1034-7-0000 have at least 17,600 samples.
    assert {speaker for record in records for speaker in record.speakers} <= {"26", "103", "1034"}


def test_an_even_draw_takes_every_utterance_as_often_as_another(
    speech_root: Path, noise_root: Path
) -> None:
    uneven, even = (
        Counter(clip.path for recipe in corpus.recipes(SPLIT) for clip in recipe.sources)
        for corpus in (
            drawing(speech_root, noise_root, num_mixtures=14, min_seconds=0, even=even)
            for even in (False, True)
        )
    )
    assert len(even) == sum(SPEAKERS.values()) and sum(even.values()) == 28
    gaps = [max(drawn.values()) - min(drawn.values()) for drawn in (even, uneven)]
    assert gaps[0] <= 2 < gaps[1]


def test_a_segment_is_one_place_of_all_members_of_the_mixture(
    speech_root: Path, noise_root: Path
) -> None:
    whole = list(drawing(speech_root, noise_root).records(SPLIT))
    cut = list(drawing(speech_root, noise_root, segment_seconds=0.5).records(SPLIT))
    places = []
    for record, full in zip(cut, whole, strict=True):
        parts, members = record.load(), full.load()
        assert {key: wave.shape for key, wave in parts.items()} == dict.fromkeys(members, (4000,))
        for place in range(len(members["s1"]) - 3999):
            if all(np.array_equal(parts[k], members[k][place : place + 4000]) for k in parts):
                places.append(place)
    assert len(places) == len(whole) and len(set(places)) > 1
    again = drawing(speech_root, noise_root, segment_seconds=0.5).records(SPLIT)
    assert same_audio(cut, list(again))


@pytest.mark.parametrize(
    ("split", "noise_folder"), [("train-clean-100", "tr"), ("dev-x", "cv"), ("own", "own")]
)
def test_the_noise_split_follows_from_the_speech_split(
    speech_root: Path, noise_root: Path, split: str, noise_folder: str
) -> None:
    (speech_root / SPLIT).rename(speech_root / split)
    (noise_root / "tr").rename(noise_root / noise_folder)
    recipes = drawing(speech_root, noise_root).recipes(split)
    assert {recipe.noise.path.split("/")[0] for recipe in recipes if recipe.noise} == {noise_folder}
    with pytest.raises(AudioError, match="elsewhere"):
        drawing(speech_root, noise_root, noise_split="elsewhere").recipes(split)


def generated_tree(root: Path, kind: str) -> dict[str, np.ndarray]:
    """Write the output of LibriMix's script; the paths in its table are of another machine."""
    base, columns = root / "wav8k" / "min", ["source_1_path", "source_2_path", "noise_path"]
    if kind == "mix_clean":
        columns = columns[:2]
    waves = {folder: signal(i, 4000) for i, folder in enumerate(("s1", "s2", "noise"))}
    for folder, wave in waves.items():
        write(base / "train-100" / folder / "19-7-0_26-7-0.wav", wave, 8000)
    paths = [
        f"/gone/Libri2Mix/wav8k/min/train-100/{folder}/19-7-0_26-7-0.wav"
        for folder in list(waves)[: len(columns)]
    ]
    (base / "metadata").mkdir()
    (base / "metadata" / f"mixture_train-100_{kind}.csv").write_text(
        ",".join(["mixture_ID", "mixture_path", *columns, "length"])
        + "\n"
        + ",".join(["19-7-0_26-7-0", "/gone/mix.wav", *paths, "4000"])
        + "\n"
    )
    return waves


@pytest.mark.parametrize(
    ("kind", "num_speakers", "noise", "members"),
    [
        ("mix_both", 2, True, ["s1", "s2", "noise"]),
        ("mix_both", 1, True, ["s1", "noise"]),
        ("mix_clean", 2, False, ["s1", "s2"]),
        ("mix_both", 2, False, ["s1", "s2"]),
    ],
)
def test_a_generated_folder_is_read_wherever_it_was_moved(
    tmp_path: Path, kind: str, num_speakers: int, noise: bool, members: list[str]
) -> None:
    waves = generated_tree(tmp_path, kind)
    corpus = LibriMix(generated=str(tmp_path), num_speakers=num_speakers, noise=noise)
    (record,) = corpus.records("train-100")
    assert record.id == "19-7-0_26-7-0" and record.speakers == ("19", "26")[:num_speakers]
    loaded = pickle.loads(pickle.dumps(record)).load()
    assert list(loaded) == members
    for member, wave in loaded.items():
        np.testing.assert_allclose(wave, waves[member], atol=STEP)


def test_three_speakers_are_read_from_a_generated_folder(tmp_path: Path) -> None:
    base, name = tmp_path / "wav16k" / "max", "1-1-0_2-2-0_3-3-0"
    members = ("s1", "s2", "s3", "noise")
    waves = {member: signal(i, 4000) for i, member in enumerate(members)}
    for folder, wave in {**waves, "mix_both": sum(waves.values())}.items():
        write(base / "dev" / folder / f"{name}.wav", np.asarray(wave), 16000)
    columns = [*(f"source_{i}_path" for i in (1, 2, 3)), "noise_path"]
    paths = [f"/gone/{member}/{name}.wav" for member in members]
    (base / "metadata").mkdir()
    (base / "metadata" / "mixture_dev_mix_both.csv").write_text(
        ",".join(["mixture_ID", *columns]) + "\n" + ",".join([name, *paths]) + "\n"
    )
    options: dict[str, Any] = {"num_speakers": 3, "sample_rate": 16000, "mode": "max"}
    (record,) = LibriMix(generated=str(tmp_path), **options).records("dev")
    assert isinstance(record, Mixture) and record.speakers == ("1", "2", "3")
    for member, wave in record.load().items():
        np.testing.assert_allclose(wave, waves[member], atol=STEP)


def test_faults_of_a_generated_folder_name_the_file(tmp_path: Path) -> None:
    generated_tree(tmp_path, "mix_clean")
    with pytest.raises(ValueError, match=r"mixture_train-100_mix_both\.csv.*noise=false"):
        list(LibriMix(generated=str(tmp_path)).records("train-100"))
    corpus = LibriMix(generated=str(tmp_path), noise=False)
    path = tmp_path / "wav8k" / "min" / "train-100" / "s2" / "19-7-0_26-7-0.wav"
    for wave, rate, message in (
        (signal(1, 4000), 16000, "16000 Hz where 8000"),
        (signal(1, 9), 8000, "9 samples"),
    ):
        write(path, wave, rate)
        with pytest.raises(AudioError, match=message):
            next(corpus.records("train-100")).load()
    path.unlink()
    with pytest.raises(AudioError, match=r"s2/19-7-0_26-7-0\.wav: no such file"):
        list(corpus.records("train-100"))


def test_faults_of_metadata_name_the_file_and_line(
    speech_root: Path, noise_root: Path, tmp_path: Path
) -> None:
    table = tmp_path / "md" / f"libri2mix_{SPLIT}.csv"
    from_metadata(speech_root, noise_root, tmp_path)
    corpus = LibriMix(
        metadata=str(tmp_path / "md"), speech_root=str(speech_root), noise_root=str(noise_root)
    )
    with pytest.raises(ValueError, match=rf"libri2mix_dev\.csv: no such metadata.*{table.name}"):
        list(corpus.records("dev"))
    table.write_text(HEADER + ROW.replace("0.25", "loud"))
    with pytest.raises(ValueError, match=rf"{table.name}, line 2.*loud"):
        list(corpus.records(SPLIT))
    table.write_text(HEADER + ROW + ROW)
    with pytest.raises(ValueError, match="two items"):
        list(corpus.records(SPLIT))
    table.write_text(HEADER + ROW.replace("-1.9857.wav", "-1.9857sp08.wav"))
    with pytest.raises(
        AudioError, match=r"sp08\.wav: no such file \(1 of 3 are missing\).*augment_train_noise"
    ):
        list(corpus.records(SPLIT))


SEGMENTS = {"speech_root": "b", "noise": False, "segment_seconds": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"metadata": "a", "draw": True}, "exactly one"),
        ({"generated": "a", "mode": "mid"}, "mid"),
        ({"generated": "a", "num_speakers": 4}, "num_speakers"),
        ({"metadata": "a", "speech_root": "b"}, "noise_root"),
        ({"draw": True, "speech_root": "b", "noise": False}, "num_mixtures"),
        ({"generated": "a", "segment_seconds": 1}, "segment_seconds"),
        ({"draw": True, "num_mixtures": 1, "mode": "max"} | SEGMENTS, "segment_seconds"),
        ({"draw": True, "num_mixtures": 1, "min_seconds": 0.5} | SEGMENTS, "segment_seconds"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LibriMix(**arguments)
