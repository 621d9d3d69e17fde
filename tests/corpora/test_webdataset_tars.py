"""Tars that others made: members by their endings, nothing run, and no tar that is cut short."""

import io
import json
import logging
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from sepdist import storage
from sepdist.config import ShardConfig
from sepdist.corpora.webdataset_tars import WebdatasetTars, find_tars
from sepdist.data import shards
from sepdist.data.members import DataError
from sepdist.data.records import Mixture, Utterance
from sepdist.data.sharding import write_data_set
from tests.support.shard_sets import write_shard

RATE = 8000
NODE = {"_target_": "sepdist.corpora.webdataset_tars.WebdatasetTars"}
PAIR = {"s1": "spk1.wav", "s2": "spk2.wav"}


def pcm(number: int, length: int = 4000) -> np.ndarray:
    return np.random.default_rng(number).integers(-9000, 9000, length).astype(np.int16)


def encoded(wave: np.ndarray, kind: str = "WAV", rate: int = RATE) -> bytes:
    stream = io.BytesIO()
    subtype = {"MP3": "MPEG_LAYER_III"}.get(kind, "PCM_16")
    soundfile.write(stream, wave, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def pair(key: str, number: int, **more: bytes) -> list[tuple[str, bytes]]:
    waves = {f"spk{i}.wav": encoded(pcm(10 * number + i)) for i in (1, 2)}
    return [(f"{key}.{ending}", data) for ending, data in (waves | more).items()]


def two_tars(folder: Path) -> str:
    folder.mkdir()
    for tar, keys in (("a", ("x/000", "x/001")), ("b", ("x/002",))):
        files = [one for key in keys for one in pair(key, int(key[-3:]))]
        write_tar(folder / f"train-{tar}.tar", files)
    return str(folder)


def load(record: Utterance | Mixture) -> Mapping[str, np.ndarray]:
    found = pickle.loads(pickle.dumps(record)).load()  # as another machine gets it
    return found if isinstance(found, Mapping) else {"s1": found}


def test_records_hold_the_audio_of_the_tars_and_are_small(tmp_path: Path) -> None:
    records = list(WebdatasetTars(two_tars(tmp_path / "tars"), PAIR).records("any"))
    assert [record.id for record in records] == ["x-000", "x-001", "x-002"]
    for number, record in enumerate(records):
        assert isinstance(record, Mixture) and len(pickle.dumps(record)) < 2000
        for i, wave in enumerate(load(record).values(), start=1):
            np.testing.assert_array_equal(wave, pcm(10 * number + i) / np.float32(2**15))


def test_a_data_set_of_them_is_what_their_own_reader_gives(tmp_path: Path, bucket: str) -> None:
    """Written by the library in S3, listed by braces, and read again by the library."""
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
            for i in range(3):
                sample = {"wav": encoded(pcm(10 * number + i)), "cls": str(i % 2)}
                writer.write({"__key__": f"{number}{i}"} | sample)
        storage.put_file(tmp_path / "x.tar", f"s3://{bucket}/theirs/train-{number:03d}.tar")
    node = NODE | {"tars": f"s3://{bucket}/theirs/train-{{000..001}}.tar", "members": {"s1": "wav"}}
    node |= {"speakers": ["cls"]}
    cfg = ShardConfig(corpus=node, split="train", output=str(tmp_path / "ours"))
    manifest = write_data_set(cfg).manifest
    assert (manifest.num_samples, manifest.speakers) == (6, ("0", "1"))
    assert shards.verify(cfg.output) == []
    ours = webdataset.WebDataset(f"{cfg.output}/{manifest.shards[0].name}", shardshuffle=False)
    for place, sample in enumerate(ours):
        number, i = divmod(place, 3)
        assert sample["__key__"] == f"{number}{i}"
        wave, _ = soundfile.read(io.BytesIO(sample["s1.flac"]), dtype="int16")
        np.testing.assert_array_equal(wave, pcm(10 * number + i))


def test_keys_that_occur_in_several_tars_get_the_names_of_their_tars(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", pair("000", 1))
    ids = [one.id for one in WebdatasetTars(str(tmp_path), PAIR).records("any")]
    assert ids == ["a-000", "b-000"]
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "a.tar", pair("000", 1))
    with pytest.raises(ValueError, match="two items have the id 'a-000'"):
        list(WebdatasetTars([str(tmp_path), str(tmp_path / "more")], PAIR).records("any"))


def test_speakers_and_texts_come_from_json_a_text_or_the_key(tmp_path: Path) -> None:
    meta = json.dumps({"speakers": ["ann", "bo"], "text": {"en": "hej"}}).encode()
    files = [("19-x.wav", encoded(pcm(1))), ("19-x.json", meta), ("19-x.txt", b" god dag\n")]
    files += [("7-y.wav", encoded(pcm(2))), ("7-y.json", b"[" * 9999)]
    tar = write_tar(tmp_path / "a.tar", files)

    def found(speaker: str, text: str) -> list[tuple[str, str]]:
        options = {"members": {"s1": "WAV"}, "speakers": [speaker], "texts": [text]}
        records = WebdatasetTars(tar, **options).records("any")  # type: ignore[arg-type]
        return [(one.speaker, one.text) for one in records if isinstance(one, Utterance)]

    assert found("json:speakers.1", "txt") == [("bo", "god dag"), ("7-y-s1", "")]
    assert found(r"key:^(\d+)-", "json:text.en") == [("19", "hej"), ("7", "")]
    assert found("key:[a-z]", "json:absent") == [("x", ""), ("y", "")]


def test_a_stored_mixture_beside_sources_makes_a_set_of_format_2(tmp_path: Path) -> None:
    mixed = encoded(pcm(99))
    tar = write_tar(tmp_path / "a.tar", pair("u", 1, **{"mix.wav": mixed}))
    node = NODE | {"tars": tar, "members": PAIR | {"mix": "mix.wav"}}
    manifest = write_data_set(ShardConfig(corpus=node, split="x", output=str(tmp_path / "o")))
    assert manifest.manifest.format_version == 2
    assert manifest.manifest.members == ("s1", "s2", "mix")


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG"])
def test_audio_is_decoded_and_brought_to_the_rate(kind: str, tmp_path: Path) -> None:
    tone = (9000 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.int16)
    stream = io.BytesIO()
    soundfile.write(stream, tone, 16000, format=kind)
    tar = write_tar(tmp_path / "a.tar", [("u.audio", stream.getvalue())])
    (record,) = WebdatasetTars(tar, {"s1": "audio"}).records("any")
    wave = load(record)["s1"]
    assert abs(wave.size - 8000) < 600
    assert np.abs(np.fft.rfft(wave[:8000])).argmax() == pytest.approx(440, abs=1)
    (record,) = WebdatasetTars(tar, {"s1": "audio"}, sample_rate=44100).records("any")
    with pytest.raises(ValueError, match=r"a\.tar, u, s1: its rate is 16000 Hz"):
        load(record)


def test_members_may_lie_apart_and_what_is_not_used_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sorted by ending instead of by key; with a folder, a link, a hidden file and a picture."""
    first, second = pair("./d.1/u", 1), pair("./d.1/v", 2)
    files = [first[0], second[0], first[1], second[1], ("d.1/u.jpg", b"x"), ("._u.wav", b"x")]
    path = tmp_path / "a.tar"
    write_tar(path, files)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("d.1/w.spk1.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with caplog.at_level(logging.WARNING):
        records = list(WebdatasetTars(str(path), PAIR).records("any"))
    assert [record.id for record in records] == ["dp1-u", "dp1-v"]
    assert [load(record)["s2"][0] for record in records] == [pcm(12)[0] / 2**15, pcm(22)[0] / 2**15]
    assert "left out 1 files of other endings" in caplog.text
    assert "left out 2 files that are no WebDataset members" in caplog.text


def test_a_sample_without_a_member_is_a_bad_record(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [*pair("u", 1), pair("v", 2)[0], ("w.spk1.wav", b"no")])
    node = NODE | {"tars": tar, "members": PAIR}
    cfg = ShardConfig(corpus=node, split="x", output=str(tmp_path / "o"))
    with pytest.raises(DataError, match=r"2 records .*\n.*a\.tar, v, s2: there is no such member"):
        write_data_set(cfg)
    cfg.on_error = "skip"
    assert write_data_set(cfg).manifest.num_samples == 1
    lines = (tmp_path / "o" / "skipped.jsonl").read_text()
    assert "a.tar, w, s1: cannot be decoded" in lines and "/proc" not in lines


@pytest.mark.parametrize("cut", ["in a member", "between members", "no end"])
def test_a_tar_that_is_cut_short_is_refused(cut: str, tmp_path: Path) -> None:
    """The library takes the second and the third for whole ones."""
    path = Path(write_tar(tmp_path / "a.tar", [*pair("u", 1), *pair("v", 2)]))
    with tarfile.open(path) as tar:
        entries = tar.getmembers()
    ends = {"in a member": entries[3].offset_data + 99, "between members": entries[2].offset}
    size = ends.get(cut, entries[3].offset_data + -(-entries[3].size // 512) * 512)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"a\.tar: is (cut short|no whole.*unexpected end)"):
        list(WebdatasetTars(str(path), PAIR).records("any"))


def test_what_is_no_tar_of_samples_is_named(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "a.tar", pair("u", 1)))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(path.read_bytes() * 2)
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.add(path, "u.wav")
    (tmp_path / "none.tar").write_bytes(b"")
    twice = write_tar(tmp_path / "twice.tar", pair("u", 1) * 2)
    for name, reason in (
        ("joined", "goes on after its end"),
        ("gz", "no whole, uncompressed tar"),
        ("none", "no whole, uncompressed tar"),
    ):
        with pytest.raises(DataError, match=rf"{name}\.tar: .*{reason}"):
            list(WebdatasetTars(str(tmp_path / f"{name}.tar"), PAIR).records("any"))
    with pytest.raises(DataError, match=r"two files u\.spk1\.wav"):
        list(WebdatasetTars(twice, PAIR).records("any"))
    with pytest.raises(ValueError, match=r"no sample has a \.flac; .*\.spk1\.wav \(1\)"):
        list(WebdatasetTars(str(path), {"s1": "flac"}).records("any"))
    with pytest.raises(DataError, match="its members are voice; give s1, s2"):
        write_shard(
            list(WebdatasetTars(str(path), {"voice": "spk1.wav"}).records("x")), tmp_path, "x.tar"
        )
    with pytest.raises(FileNotFoundError, match=r"absent-1\.tar: no such file"):
        list(WebdatasetTars(str(tmp_path / "absent-{1..2}.tar"), PAIR).records("any"))


def test_no_program_is_run_and_no_pickle_is_read(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    for url in (f"pipe:touch {marker}", f"pipe:touch {marker}.tar", "file:/a.tar"):
        with pytest.raises(ValueError, match="no program is run, no such url opened"):
            next(WebdatasetTars(url, PAIR).records("any"))
    with pytest.raises(ValueError, match="https:// is not supported"):
        find_tars(["https://example.org/a.tar"])
    evil = pickle.dumps(Evil())
    files = [
        *pair("u", 1),
        ("u.pyd", evil),
        ("u.pth", evil),
        ("u.json", evil),
        ("v.spk1.wav", evil),
    ]
    tar = write_tar(tmp_path / "a.tar", files)
    records = list(WebdatasetTars(tar, PAIR, speakers=["pyd", "json:x"]).records("any"))
    load(records[0])
    with pytest.raises(ValueError, match="v, s1: cannot be decoded"):
        load(records[1])
    assert not marker.exists()


def test_a_tar_that_changes_after_it_was_listed_is_refused(tmp_path: Path, bucket: str) -> None:
    places = [str(tmp_path / "a.tar"), f"s3://{bucket}/a.tar"]
    for place in places:
        storage.put_file(write_tar(tmp_path / "first.tar", pair("u", 1)), place)
        records = list(WebdatasetTars(place, PAIR).records("any"))
        storage.put_file(write_tar(tmp_path / "other.tar", pair("u", 2)), place)
        fresh = list(WebdatasetTars(place, PAIR).records("any"))  # forgets what was fetched
        with pytest.raises(DataError, match=r"a\.tar: was changed since it was listed"):
            load(records[0])
        assert load(fresh[0])["s1"][0] == pcm(21)[0] / 2**15


def test_values_that_are_no_names_are_not_known(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar",
        [
            one
            for number, value in enumerate((None, {"a": 1}, "Ann", 7))
            for one in (
                (f"u{number}.wav", encoded(pcm(number))),
                (f"u{number}.json", json.dumps({"speaker": value, "text": value}).encode()),
            )
        ],
    )
    fields: dict[str, Sequence[str]] = {"speakers": ["json:speaker"], "texts": ["json:text"]}
    records = list(WebdatasetTars(tar, {"s1": "wav"}, **fields).records("x"))
    assert [one.speaker for one in records] == ["u0-s1", "u1-s1", "Ann", "7"]
    assert [one.text for one in records] == ["", "", "Ann", "7"]


@pytest.mark.parametrize("size", [2**40, 2**62, -512])
def test_a_tar_whose_header_is_impossible_is_named(size: int, tmp_path: Path) -> None:
    info = tarfile.TarInfo("u0.flac")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % 2**96 | 2**95).to_bytes(12)  # base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(DataError, match=r"a\.tar: is "):
        list(WebdatasetTars(str(path), {"s1": "flac"}).records("x"))


def test_tars_in_capitals_are_found_and_compressed_ones_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(two_tars(tmp_path / "tars"))
    (folder / "train-b.tar").rename(folder / "train-b.TAR")
    for name in ("c.tar.gz", "d.tgz", "e.tar.zst", "readme.txt"):
        (folder / name).touch()
    assert len(list(WebdatasetTars(str(folder), PAIR).records("x"))) == 3
    assert "left out 3 files that may be compressed tars" in caplog.text


@pytest.mark.parametrize("kind", ["circle", "chain"])
def test_a_tar_that_leads_a_reader_in_a_circle_or_into_depth_is_named(
    kind: str, tmp_path: Path
) -> None:
    info = tarfile.TarInfo("README")  # no member of a sample, so none that occurs twice
    info.type = tarfile.REGTYPE if kind == "circle" else tarfile.XHDTYPE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if kind == "circle":
        header[124:136] = (-512 % 2**96).to_bytes(12)  # base 256: back to this header
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
    first = tarfile.TarInfo("a.flac").tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(first + bytes(header) * (1 if kind == "circle" else 3000) + bytes(10240))
    with pytest.raises(DataError, match=r"a\.tar: is no whole"):
        list(WebdatasetTars(str(path), {"s1": "flac"}).records("x"))


def test_speakers_that_fit_no_source_and_a_pattern_that_is_none_are_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pair("u", 1))
    with pytest.raises(ValueError, match="no pattern"):
        list(WebdatasetTars(tar, PAIR, speakers=["key:["]).records("x"))
    with pytest.raises(ValueError, match="speakers: 1 for 2 sources"):
        list(WebdatasetTars(tar, PAIR, speakers=["key:^[^-]+"]).records("x"))
