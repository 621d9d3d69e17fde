"""LibriSpeech's published tree read as Utterances."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from sepdist.audio import AudioError
from sepdist.corpora.librispeech import LibriSpeech
from tests.corpora.conftest import signal, write


def test_every_utterance_comes_once_in_order_with_speaker_and_text(speech_root: Path) -> None:
    records = list(LibriSpeech(str(speech_root)).records("train-clean-100"))
    assert [record.id for record in records] == [
        *("103-7-0000", "103-7-0001", "1034-7-0000", "19-7-0000", "19-7-0001", "19-7-0002"),
        "26-7-0000",
    ]
    assert [record.speaker for record in records] == ["103", "103", "1034", "19", "19", "19", "26"]
    assert records[4].text == "WORDS OF 19-7-0001"
    again = LibriSpeech(str(speech_root)).records("train-clean-100")
    assert [record.id for record in again] == [record.id for record in records]


def test_audio_is_read_as_it_is_or_resampled_by_soxr_and_records_survive_pickling(
    speech_root: Path,
) -> None:
    path = speech_root / "train-clean-100" / "26" / "7" / "26-7-0000.flac"
    stored = soundfile.read(str(path), dtype="float32")[0]
    (native,) = (
        r
        for r in LibriSpeech(str(speech_root), 16000).records("train-clean-100")
        if r.speaker == "26"
    )
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(native)).load(), stored)
    (halved,) = (
        r
        for r in LibriSpeech(str(speech_root), 8000).records("train-clean-100")
        if r.speaker == "26"
    )
    expected = soxr.resample(stored, 16000, 8000, quality="VHQ")
    np.testing.assert_array_equal(halved.load(), expected)
    assert halved.sample_rate == 8000 and halved.load().dtype == np.float32


def test_a_tree_without_transcripts_is_read_too(tmp_path: Path) -> None:
    write(tmp_path / "train" / "5" / "1" / "5-1-0.wav", signal(1, 4000))
    (record,) = LibriSpeech(str(tmp_path)).records("train")
    assert (record.id, record.text) == ("5-1-0", "")


def test_faults_name_the_file_and_say_what_to_do(speech_root: Path) -> None:
    with pytest.raises(
        AudioError, match=r"dev-clean: no such folder \(its parent holds train-clean-100\)"
    ):
        list(LibriSpeech(str(speech_root)).records("dev-clean"))
    with pytest.raises(AudioError, match=r"not at <speaker>/<chapter>/<file>"):
        list(LibriSpeech(str(speech_root.parent)).records("LibriSpeech"))
    with pytest.raises(AudioError, match=r"103-7-0000\.flac: its rate is 16000 Hz where 44100"):
        next(LibriSpeech(str(speech_root), 44100).records("train-clean-100")).load()
    damaged = speech_root / "train-clean-100" / "103" / "7" / "103-7-0000.flac"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(AudioError, match=r"103-7-0000\.flac"):
        next(LibriSpeech(str(speech_root)).records("train-clean-100")).load()
