"""Faults of real folders, for every corpus: scale, damage, gaps, encodings, contradictions."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from sepdist.audio import AudioError
from sepdist.corpora.libricss import LibriCss, read_transcripts
from sepdist.corpora.librimix import LibriMix
from sepdist.corpora.librispeech import LibriSpeech
from sepdist.corpora.overlap import Overlap
from sepdist.corpora.tables import Table
from sepdist.corpora.wham import Wham
from sepdist.corpora.wsj0_mix import Wsj0Mix
from sepdist.data.dataset import Dataset
from sepdist.data.members import DataError
from sepdist.data.records import Utterance
from sepdist.data.shards import verify, write_manifest
from tests.corpora.conftest import signal, write
from tests.support.libricss import meeting_name, write_meeting
from tests.support.shard_sets import write_shard

SPLIT = "train-clean-100"
HEADER = (
    "mixture_ID,source_1_path,source_1_gain,source_2_path,source_2_gain,noise_path,noise_gain\n"
)
ROW = (
    f"19-7-0002_26-7-0000,{SPLIT}/19/7/19-7-0002.flac,0.5,{SPLIT}/26/7/26-7-0000.flac,0.25,"
    "tr/long.wav,2.25\n"
)


def mixtures_from(table: bytes, speech_root: Path, noise_root: Path) -> LibriMix:
    folder = speech_root.parent / "metadata"
    folder.mkdir(exist_ok=True)
    (folder / f"libri2mix_{SPLIT}.csv").write_bytes(table)
    return LibriMix(
        metadata=str(folder), speech_root=str(speech_root), noise_root=str(noise_root), mode="max"
    )


def as_integers(path: Path) -> None:
    """Replace a file by one with floats at the scale of 16-bit integers."""
    wave, rate = soundfile.read(str(path), dtype="float32")
    soundfile.write(str(path), wave * 32768, rate, format="WAV", subtype="FLOAT")


def test_integer_scale_and_cuts_are_errors_of_every_corpus_that_name_the_file(
    speech_root: Path, noise_root: Path
) -> None:
    utterance = speech_root / SPLIT / "19" / "7" / "19-7-0002.flac"
    noise = noise_root / "tr" / "long.wav"
    speech = {record.id: record for record in LibriSpeech(str(speech_root)).records(SPLIT)}
    wham = {record.id: record for record in Wham(str(noise_root)).records("tr")}
    (mixed,) = mixtures_from((HEADER + ROW).encode(), speech_root, noise_root).records(SPLIT)
    overlap = Overlap(str(speech_root), SPLIT, num_mixtures=14).records("OV10")
    overlapped = next(record for record in overlap if "19-7-0002" in record.id)
    for path, records in (
        (utterance, [speech["19-7-0002"], mixed, overlapped]),
        (noise, [wham["long"], mixed]),
    ):
        whole = path.read_bytes()
        as_integers(path)
        for record in records:
            with pytest.raises(AudioError, match=rf"{path}: outside \[-1, 1\], its peak is \d"):
                record.load()
        path.write_bytes(whole[: len(whole) // 2])
        for record in records:
            with pytest.raises(AudioError, match=rf"{path}: (cut short|cannot be decoded)"):
                record.load()
        path.write_bytes(whole)
        for record in records:
            record.load()


def test_a_gain_that_would_clip_everything_names_the_file(
    speech_root: Path, noise_root: Path
) -> None:
    loud = ROW.replace(",0.5,", ",500,")
    (record,) = mixtures_from((HEADER + loud).encode(), speech_root, noise_root).records(SPLIT)
    with pytest.raises(AudioError, match=r"19-7-0002\.flac: outside .*lower its gain"):
        record.load()


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
        lambda text: text.replace("\n", "\r").encode(),
    ],
)
def test_a_byte_order_mark_and_other_ends_of_lines_change_no_table(
    encode: object, speech_root: Path, noise_root: Path
) -> None:
    table = encode(HEADER + ROW)  # type: ignore[operator]
    (record,) = mixtures_from(table, speech_root, noise_root).records(SPLIT)
    (plain,) = mixtures_from((HEADER + ROW).encode(), speech_root, noise_root).records(SPLIT)
    assert (record.id, record.speakers) == (plain.id, plain.speakers)
    np.testing.assert_array_equal(record.load()["s2"], plain.load()["s2"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((HEADER + ROW.replace("19/7", "José/7")).encode("latin-1"), "not text in UTF-8.*save it"),
        ((HEADER + ROW).encode("utf-16"), "not text in UTF-8"),
        ((HEADER + ROW).replace(",", ";").encode(), r"line 2.*its columns are mixture_ID"),
        ((HEADER + ROW + '"' + 140_000 * "x").encode(), "not a CSV file"),
    ],
)
def test_a_table_in_another_encoding_or_form_is_named(
    table: bytes, message: str, speech_root: Path, noise_root: Path
) -> None:
    with pytest.raises(ValueError, match=rf"libri2mix_{SPLIT}\.csv.*{message}"):
        list(mixtures_from(table, speech_root, noise_root).records(SPLIT))


def test_transcripts_are_read_with_a_byte_order_mark_and_without_those_of_macos(
    speech_root: Path,
) -> None:
    folder = speech_root / SPLIT / "26" / "7"
    (folder / "26-7.trans.txt").write_bytes("\ufeff26-7-0000 ÇA VA\r\n".encode())
    (folder / "._26-7.trans.txt").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X\xff")
    *_, record = LibriSpeech(str(speech_root)).records(SPLIT)
    assert (record.id, record.text) == ("26-7-0000", "ÇA VA")
    (folder / "26-7.trans.txt").write_bytes("26-7-0000 ÇA VA\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"26-7\.trans\.txt: is not text in UTF-8"):
        list(LibriSpeech(str(speech_root)).records(SPLIT))


def test_a_line_of_a_transcript_ends_at_no_other_separator_of_unicode(tmp_path: Path) -> None:
    said = "one\u2028two \x85 three\x1cfour"  # U+0085 is what becomes of the ellipsis of cp1252
    write(tmp_path / "wav" / "test" / "1" / "2" / "1-2-3.wav", signal(1, 8000))
    (tmp_path / "wav" / "test" / "1" / "2" / "1-2.trans.txt").write_text(f"1-2-3 {said}\n")
    (tmp_path / "text").write_text(f"1-2-3 {said}\r\n", newline="")
    (tmp_path / "wav.scp").write_text("1-2-3 wav/test/1/2/1-2-3.wav\n")
    (tmp_path / "css.txt").write_text(f"utterance_0\t{said}\n")
    spoken = next(LibriSpeech(str(tmp_path / "wav")).records("test"))
    lists = Table(layout="scp", table=str(tmp_path), root=str(tmp_path))
    listed = next(iter(lists.records("all")))
    assert isinstance(listed, Utterance)
    meeting = read_transcripts(tmp_path / "css.txt")["utterance_0"]
    assert spoken.text == listed.text == meeting == said


def test_speakers_behind_links_and_in_other_formats_are_read_and_hidden_files_said(
    speech_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "disk" / "40" / "1" / "40-1-0.wav", signal(40, 9000))
    (speech_root / SPLIT / "40").symlink_to(tmp_path / "disk" / "40")
    for suffix, wave in (("mp3", signal(41, 9000)), ("ogg", signal(42, 9000))):
        soundfile.write(
            str(tmp_path / "disk" / "40" / "1" / f"40-1-{suffix}.{suffix}"), wave, 16000
        )
    (speech_root / SPLIT / "40" / "1" / "._40-1-0.wav").write_bytes(b"\0\5\x16\7")
    (speech_root / SPLIT / "40" / "1" / "40-1-9.m4a").write_bytes(b"....ftypM4A ")
    records = list(LibriSpeech(str(speech_root), 16000).records(SPLIT))
    new = [record for record in records if record.speaker == "40"]
    assert len(records) == 10 and [record.id[5:] for record in new] == ["0", "mp3", "ogg"]
    for record in new:
        assert record.load().size == pytest.approx(9000, abs=3000)  # MP3 pads
    (said,) = (record.getMessage() for record in caplog.records)
    assert "1 hidden" in said and "1 .m4a" in said


def wsj0_tree(root: Path, num_speakers: int) -> tuple[Path, list[str]]:
    """Write two mixtures of `num_speakers`, their sums rounded as the published ones are."""
    base = root / f"{num_speakers}speakers" / "wav8k" / "min" / "tr"
    members = [f"s{number}" for number in range(1, num_speakers + 1)]
    for name in ("40na_1_01xo_-1.wav", "40nb_1_01xp_-1.wav"):
        waves = [signal(i, 3000).astype(np.float64) + 1e-5 for i in range(num_speakers)]
        for member, wave in zip((*members, "mix"), (*waves, sum(waves)), strict=True):
            write(base / member / name, np.round(wave * 32768).astype(np.int16), 8000)
    return base, members


@pytest.mark.parametrize("num_speakers", [2, 3])
def test_a_generated_mixture_that_lacks_any_member_is_an_error(
    tmp_path: Path, num_speakers: int
) -> None:
    base, members = wsj0_tree(tmp_path, num_speakers)
    corpus = Wsj0Mix(generated=str(tmp_path), num_speakers=num_speakers)
    assert len([record.load() for record in corpus.records("tr")]) == 2
    for absent in ([members[0]], [members[-1]], members):
        for member in absent:
            (base / member / "40nb_1_01xp_-1.wav").rename(base / member / "kept")
        with pytest.raises(AudioError, match=rf"{absent[0]}/40nb_1_01xp_-1\.wav: no such file"):
            list(corpus.records("tr"))
        for member in absent:
            (base / member / "kept").rename(base / member / "40nb_1_01xp_-1.wav")


def test_a_generated_mixture_that_is_not_the_sum_of_its_sources_is_an_error(
    tmp_path: Path,
) -> None:
    base, _ = wsj0_tree(tmp_path, 2)
    path = base / "mix" / "40nb_1_01xp_-1.wav"
    mixed, _ = soundfile.read(str(path), dtype="int16")
    one_step = mixed.copy()
    one_step[700] += 1
    write(path, one_step, 8000)
    *_, record = Wsj0Mix(generated=str(tmp_path)).records("tr")
    assert list(record.load()) == ["s1", "s2"]
    for wrong in (
        (0.9 * mixed).astype(np.int16),
        np.roll(mixed, 1),
        soundfile.read(str(base / "s1" / path.name), dtype="int16")[0],
    ):
        write(path, wrong, 8000)
        with pytest.raises(AudioError, match=rf"{path}: is not the sum of s1, s2, .* steps"):
            record.load()
    write(path, mixed[:-1], 8000)
    with pytest.raises(AudioError, match=rf"{path}: 2999 samples"):
        record.load()


def libri_tree(root: Path, kind: str, names: list[str], level: float = 0.05) -> Path:
    """Write mixtures as LibriMix's script does, with a sum `kind` of the right members."""
    base, folders = root / "wav8k" / "min", ["s1", "s2", "noise"]
    summed = {"mix_single": [0, 2], "mix_both": [0, 1, 2], "mix_clean": [0, 1]}[kind]
    rows = ["mixture_ID,mixture_path,source_1_path,source_2_path,noise_path"]
    for number, name in enumerate(names):
        waves = [signal(number + i, 3000, level) for i in range(3)]
        for folder, wave in zip(folders, waves, strict=True):
            write(base / "test" / folder / f"{name}.wav", wave, 8000)
        write(base / "test" / kind / f"{name}.wav", sum(waves[i] for i in summed), 8000)
        paths = [f"/gone/{folder}/{name}.wav" for folder in (kind, *folders)]
        rows.append(",".join([name, *paths]))
    (base / "metadata").mkdir(parents=True)
    (base / "metadata" / f"mixture_test_{kind}.csv").write_text("\n".join(rows) + "\n")
    return base


@pytest.mark.parametrize(
    ("kind", "num_speakers", "noise"),
    [("mix_both", 2, True), ("mix_clean", 2, False), ("mix_single", 1, True)],
)
@pytest.mark.parametrize("level", [0.05, 0.2])  # the sum of the louder ones clips
def test_the_sums_of_librimix_are_compared_with_what_they_are_sums_of(
    tmp_path: Path, kind: str, num_speakers: int, noise: bool, level: float
) -> None:
    base = libri_tree(tmp_path, kind, ["19-7-0_26-7-0"], level)
    corpus = LibriMix(generated=str(tmp_path), num_speakers=num_speakers, noise=noise)
    (record,) = corpus.records("test")
    assert len(record.load()) == num_speakers + noise
    left_out = base / "test" / ("noise" if noise else "s2") / "19-7-0_26-7-0.wav"
    write(left_out, signal(9, 3000), 8000)
    with pytest.raises(AudioError, match=rf"{kind}/19-7-0_26-7-0\.wav: is not the sum of s1, "):
        record.load()
    (base / "test" / kind / left_out.name).unlink()  # not needed, so not required
    record.load()


def test_mixtures_that_the_table_does_not_list_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"19-7-{number}_26-7-0" for number in range(5)]
    base = libri_tree(tmp_path, "mix_both", names)
    corpus = LibriMix(generated=str(tmp_path))
    assert len(list(corpus.records("test"))) == 5 and caplog.records == []
    table = base / "metadata" / "mixture_test_mix_both.csv"
    table.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(table.read_bytes().splitlines()[:3]))
    assert [record.id for record in corpus.records("test")] == names[:2]
    (said,) = (record.getMessage() for record in caplog.records)
    assert "left out 3 mixtures that mixture_test_mix_both.csv does not list" in said
    table.write_text("mixture_ID,source_1_path\na_b\n")
    with pytest.raises(ValueError, match="mixture a_b has no source_1_path"):
        list(corpus.records("test"))
    table.write_text(";mixture_path\na;b\n")
    with pytest.raises(ValueError, match="has no mixture_ID"):
        list(corpus.records("test"))


def test_utterances_without_a_transcript_and_folders_that_are_no_meeting_are_counted(
    speech_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (speech_root / SPLIT / "19" / "7" / "19-7.trans.txt").unlink()
    records = list(Overlap(str(speech_root), SPLIT, num_mixtures=2).records("OV10"))
    assert len(records) == 2
    assert caplog.messages == [f"{speech_root}: left out 3 utterances without a transcript"]
    caplog.clear()
    root, utterances = tmp_path / "css", {0: ("WORDS", signal(1, 2000))}
    for name in (
        meeting_name(20, 1),
        meeting_name(20, 1).replace("actual20.1", "actual20.7"),
        "my notes",
    ):
        write_meeting(root, "OV20", name, utterances)
    assert len(list(LibriCss(str(root)).records("OV20"))) == 2  # both are session 1
    assert caplog.messages == [f"{root}/OV20: left out 1 folders that are no meeting"]


def test_lists_and_levels_of_wsj0_are_read_with_a_byte_order_mark(tmp_path: Path) -> None:
    for folder, name in (("40n", "40na010x"), ("01x", "01xo031a")):
        write(tmp_path / "si_tr_s" / folder / f"{name}.wav", signal(1, 4000))
    (tmp_path / "mix_2_spk_tr.txt").write_bytes(
        b"\xef\xbb\xbfsi_tr_s/40n/40na010x.wav 1.5 si_tr_s/01x/01xo031a.wav -1.5\r\n"
    )
    levels = tmp_path / "levels"
    levels.mkdir()
    (levels / "activlev_tr.txt").write_bytes(b"\xef\xbb\xbf40na010x 0.001\r\n01xo031a 0.002\r\n")
    (levels / "._activlev_tr.txt").write_bytes(b"\0\5\x16\7\xff")
    corpus = Wsj0Mix(wsj0=str(tmp_path), lists=str(tmp_path), levels=str(levels))
    assert [record.id for record in corpus.records("tr")] == ["40na010x_1p5_01xo031a_-1p5"]


def test_a_generated_mixture_may_have_a_source_that_is_silent_throughout(tmp_path: Path) -> None:
    base = libri_tree(tmp_path / "libri", "mix_both", ["19-7-0_26-7-0"])
    silence, name = np.zeros(3000, dtype=np.float32), "19-7-0_26-7-0.wav"
    s1, noise = (
        soundfile.read(base / "test" / folder / name, dtype="float32")[0]
        for folder in ("s1", "noise")
    )
    write(base / "test" / "s2" / name, silence, 8000)
    write(base / "test" / "mix_both" / name, s1 + noise, 8000)
    corpus = LibriMix(generated=str(tmp_path / "libri"), num_speakers=2, noise=True)
    info = write_shard(list(corpus.records("test")), tmp_path / "out", "a-test-000000.tar")
    write_manifest(tmp_path / "out", "a", "test", 8000, [info])
    assert verify(tmp_path / "out") == []
    dataset = Dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), noise=True)
    assert not dataset.full(0, 9.0).sources[0, 1].any() and dataset.metadata(0)["silent"] == ["s2"]
    write(base / "test" / "s1" / name, silence, 8000)
    write(base / "test" / "mix_both" / name, noise, 8000)
    with pytest.raises(DataError, match="silent"):
        write_shard(list(corpus.records("test")), tmp_path / "all", "a-test-000000.tar")
