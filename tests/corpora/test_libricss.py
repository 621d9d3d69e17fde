"""LibriCSS in both layouts, of seven-channel tones, from files to records and on into shards."""

import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from sepdist.audio import AudioError
from sepdist.config import ShardConfig
from sepdist.corpora.libricss import LibriCss, parse_meeting
from sepdist.data.sharding import write_data_set
from sepdist.data.shards import verify
from tests.corpora.conftest import RATE, signal, write
from tests.support.libricss import meeting_name, write_meeting


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Condition OV20 with sessions 2 and 10, and 0S with one utterance."""
    root = tmp_path / "for_release"
    for session, numbers in ((10, [0]), (2, [0, 2, 10])):
        utterances = {
            n: (f"WORDS {session} {n}", signal(session + n, 2000 + 100 * n)) for n in numbers
        }
        write_meeting(root, "OV20", meeting_name(20, session), utterances)
    write_meeting(root, "0S", meeting_name(0, 0, "0.1_0.5"), {0: ("HELLO", signal(7, 2000))})
    return root


def test_utterances_come_by_session_and_number_with_transcript_and_an_id_without_dots(
    root: Path,
) -> None:
    records = list(LibriCss(str(root)).records("OV20"))
    assert [record.texts for record in records] == [
        ("WORDS 2 0",),
        ("WORDS 2 2",),
        ("WORDS 2 10",),
        ("WORDS 10 0",),
    ]
    assert records[2].id == "overlap_ratio_20p0_sil0p1_1p0_session2_actual20p2_utterance_10"
    assert [record.texts for record in LibriCss(str(root)).records("0S")] == [("HELLO",)]


def test_the_first_channel_is_read_at_another_rate_or_as_it_is_and_records_survive_pickling(
    root: Path,
) -> None:
    folder = root / "OV20" / meeting_name(20, 2) / "record" / "utterances"
    stored = soundfile.read(str(folder / "utterance_2.wav"), dtype="float32")[0]
    assert stored.shape == (2200, 7)
    record = pickle.loads(pickle.dumps(list(LibriCss(str(root)).records("OV20"))[1]))
    assert record.sample_rate == 8000
    np.testing.assert_array_equal(
        record.load()["mix"], soxr.resample(stored[:, 0], RATE, 8000, quality="VHQ")
    )
    np.testing.assert_array_equal(
        list(LibriCss(str(root), 16000).records("OV20"))[1].load()["mix"],
        np.ascontiguousarray(stored[:, 0]),
    )


@pytest.mark.parametrize("place", ["", "monaural", "monaural/utterances"])
def test_the_layout_of_dataprep_gives_the_same_records(
    root: Path, tmp_path: Path, place: str
) -> None:
    exp, lines = tmp_path / "exp", []
    for meeting in root.glob("*/*"):
        folder = exp / "monaural" / "utterances" / meeting.name
        folder.mkdir(parents=True)
        for path in (meeting / "record" / "utterances").iterdir():
            write(folder / path.name, soundfile.read(str(path))[0][:, :1])
        for line in (
            (meeting / "transcription" / "utterance_transcription.txt").read_text().splitlines()
        ):
            lines.append(f"{meeting.name}_{line.replace('.wav', '')}\n")
    (exp / place / "utterance_transcription.txt").write_text("".join(sorted(lines)))
    published = list(LibriCss(str(root)).records("OV20"))
    prepared = list(LibriCss(str(exp if place == "" else exp / "monaural")).records("OV20"))
    assert [(record.id, record.texts) for record in prepared] == [
        (record.id, record.texts) for record in published
    ]
    np.testing.assert_array_equal(prepared[3].load()["mix"], published[3].load()["mix"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("overlap_ratio_0.0_sil2.9_3.0_session4_actual0.0", ("0L", 4)),
        ("overlap_ratio_0.0_sil0.1_0.5_session0_actual0.0", ("0S", 0)),
        ("overlap_ratio_40.0_sil0.1_1.0_session9_actual39.7", ("OV40", 9)),
        ("overlap_ratio_40.0", None),
    ],
)
def test_condition_and_session_are_in_the_name_of_a_meeting(
    name: str, expected: tuple[str, int] | None
) -> None:
    assert parse_meeting(name) == expected


def test_shards_keep_the_transcripts_of_mixtures_without_sources(
    root: Path, tmp_path: Path
) -> None:
    node = {"_target_": "sepdist.corpora.libricss.LibriCss", "root": str(root)}
    output = tmp_path / "shards"
    written = write_data_set(ShardConfig(corpus=node, split="OV20", output=str(output))).manifest
    assert (written.num_samples, written.members, written.num_speakers) == (4, ("mix",), 0)
    assert verify(output) == []
    with tarfile.open(next(output.glob("*.tar"))) as tar:
        found = [
            json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")
        ]
    assert {one["id"]: one["texts"] for one in found} == {
        record.id: list(record.texts) for record in LibriCss(str(root)).records("OV20")
    }


def test_missing_files_and_lines_are_one_error_that_names_them(root: Path) -> None:
    def message(split: str) -> str:
        with pytest.raises(ValueError) as caught:
            list(LibriCss(str(root)).records(split))
        return str(caught.value)

    assert "OV50" in message("OV50") and "0L, 0S, OV10" in message("OV50")
    (root / "OV10").mkdir()
    assert f"{root}/OV10: no meeting" in message("OV10")
    assert f"{root}/utterances: no meeting" in message("OV30")
    meeting = root / "OV20" / meeting_name(20, 2)
    transcripts = meeting / "transcription" / "utterance_transcription.txt"
    whole = transcripts.read_text()
    transcripts.write_text(whole.replace("utterance_2.wav\tWORDS 2 2\n", ""))
    assert "utterance_2 has no transcript (3 files, 2 transcripts)" in message("OV20")
    transcripts.write_text(whole + "utterance_5.wav\n")
    assert "line 4" in message("OV20")
    transcripts.unlink()
    assert f"{transcripts}: no such transcript" in message("OV20")
    transcripts.write_text(whole)
    (meeting / "record" / "utterances" / "utterance_10.wav").unlink()
    assert "utterance_10 has no audio" in message("OV20")
    shutil.rmtree(meeting / "record")
    transcripts.write_text("")
    assert "has no audio (0 files, 0 transcripts)" in message("OV20")
    with pytest.raises(AudioError, match=r"44100 Hz is wanted"):
        next(LibriCss(str(root), 44100).records("0S")).load()
