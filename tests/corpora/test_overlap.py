"""Overlapped mixtures of a small LibriSpeech tree: pairs of speakers, lengths, places, levels."""

from pathlib import Path

import numpy as np
import pyloudnorm
import pytest

from sepdist.corpora.librispeech import LibriSpeech
from sepdist.corpora.overlap import Overlap
from sepdist.corpora.recipes import SPEECH_LUFS
from tests.corpora.conftest import signal, write

SPLIT = "train-clean-100"


def corpus(root: Path, **changes: object) -> Overlap:
    return Overlap(**({"root": str(root), "speech_split": SPLIT, "num_mixtures": 14} | changes))


def scaled_copy(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether one wave is the other times a factor, to the precision of float32."""
    return abs(np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second)) > 1 - 1e-6


@pytest.mark.parametrize("percent", [10, 40])
def test_another_speaker_talks_into_that_share_of_a_whole_utterance_at_one_of_its_ends(
    speech_root: Path, percent: int
) -> None:
    originals = {record.id: record for record in LibriSpeech(str(speech_root)).records(SPLIT)}
    ends = set()
    for record in corpus(speech_root).records(f"OV{percent}"):
        _, target, other = record.id.split("_")
        assert record.speakers == (target.split("-")[0], other.split("-")[0])
        assert record.speakers[0] != record.speakers[1]
        assert record.texts == (f"WORDS OF {target}", "")
        members = record.load()
        s1, s2 = members["s1"], members["s2"]
        assert s1.dtype == s2.dtype == np.float32 and s1.size == s2.size
        assert scaled_copy(s1, originals[target].load())
        count = round(percent / 100 * s1.size)
        whole = originals[other].load()
        if np.any(s2[: s1.size - count]):
            assert not np.any(s2[count:]) and scaled_copy(s2[:count], whole[-count:])
            ends.add("beginning")
        else:
            assert np.count_nonzero(s2[-count:]) > 0.99 * count and scaled_copy(
                s2[-count:], whole[:count]
            )
            ends.add("end")
    assert len(ends) == 2


def test_both_are_as_loud_as_in_librimix_and_the_sum_peaks_at_0_9_at_most(
    speech_root: Path,
) -> None:
    meter, levels = pyloudnorm.Meter(8000), []
    for record in corpus(speech_root).records("OV30"):
        members = record.load()
        levels.append(meter.integrated_loudness(members["s1"]))
        assert np.abs(members["s1"] + members["s2"]).max() < 0.9 + 1e-6
    assert all(SPEECH_LUFS[0] - 0.1 < level < SPEECH_LUFS[1] + 0.1 for level in levels)
    assert max(levels) - min(levels) > 2


def test_conditions_differ_by_the_overlap_alone_and_a_seed_gives_the_same_again(
    speech_root: Path,
) -> None:
    ten, twenty = (list(corpus(speech_root).records(split)) for split in ("OV10", "OV20"))
    assert [record.id for record in ten] == [record.id for record in twenty]
    assert sorted(record.id.split("_")[1] for record in ten[:7]) == sorted(
        record.id for record in LibriSpeech(str(speech_root)).records(SPLIT)
    )  # each is the target once before any is twice
    np.testing.assert_array_equal(ten[3].load()["s1"], twenty[3].load()["s1"])
    again = list(corpus(speech_root).records("OV10"))
    np.testing.assert_array_equal(ten[3].load()["s2"], again[3].load()["s2"])
    other = [record.id for record in corpus(speech_root, seed=1).records("OV10")]
    assert other != [record.id for record in ten] and len(set(other)) == 14


def test_without_overlap_the_target_is_alone(speech_root: Path) -> None:
    silent, spoken = (next(corpus(speech_root).records(split)) for split in ("OV0", "OV10"))
    assert silent.load().keys() == {"s1"} and len(silent.speakers) == len(silent.texts) == 1
    np.testing.assert_array_equal(silent.load()["s1"], spoken.load()["s1"])


def test_utterances_without_transcript_are_left_out_and_what_cannot_be_is_an_error(
    speech_root: Path, tmp_path: Path
) -> None:
    (speech_root / SPLIT / "26" / "7" / "26-7.trans.txt").unlink()
    assert all("26" not in record.speakers for record in corpus(speech_root).records("OV20"))
    for split in ("20", "OV101", "OV2.5", "test"):
        with pytest.raises(ValueError, match="OV0 to OV100"):
            next(corpus(speech_root).records(split))
    lone = tmp_path / "lone"
    for speaker, size in (("5", 40000), ("6", 8000)):
        write(lone / "test" / speaker / "1" / f"{speaker}-1-0.wav", signal(1, size))
    with pytest.raises(ValueError, match=r"0 speaker\(s\) with a transcript"):
        next(corpus(lone, speech_split="test").records("OV20"))
    for speaker in "56":
        (lone / "test" / speaker / "1" / f"{speaker}-1.trans.txt").write_text(
            f"{speaker}-1-0 YES\n"
        )
    assert len(list(corpus(lone, speech_split="test").records("OV20"))) == 14
    with pytest.raises(ValueError, match=r"5-1-0\.wav: no other speaker .* 2\.2 s, OV90"):
        list(corpus(lone, speech_split="test").records("OV90"))
