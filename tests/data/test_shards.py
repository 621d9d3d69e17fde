"""The shard format: the same bytes every time, readable by webdataset, and no unnoticed damage."""

import dataclasses
import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from sepdist import storage
from sepdist.data import manifest as manifests
from sepdist.data import members as sample_files
from sepdist.data import shards
from sepdist.data.records import Mixture, Utterance
from sepdist.data.shards import DataError
from tests.support.s3server import S3Server
from tests.support.shard_sets import (
    RATE,
    contents,
    flip,
    holding,
    mixture,
    never,
    read,
    waves_of,
    write,
    write_shard,
)


def test_two_writes_give_the_same_bytes_on_disk_and_in_s3(tmp_path: Path, bucket: str) -> None:
    places = [str(tmp_path / "one"), str(tmp_path / "two"), f"s3://{bucket}/three"]
    manifests = [write(place) for place in places]
    found = [contents(place) for place in places]
    assert found[0] == found[1] == found[2]
    assert len({manifest.digest() for manifest in manifests}) == 1
    numbered = [f"toy-train-00000{i}" for i in (0, 1)]
    assert set(found[0]) == {
        "manifest.json",
        *(f"index/{n}{kind}.json" for n in numbered for kind in ("", ".inputs")),
        *(f"{n}.tar" for n in numbered),
    }
    for shard in manifests[0].shards:
        assert found[0][shard.name] == shard.sha256
        assert found[0][f"index/{shard.name[:-4]}.json"] == shard.index_sha256


def test_the_tar_carries_no_time_no_owner_and_sorted_members(tmp_path: Path) -> None:
    manifest = write(tmp_path, num_shards=1)
    with tarfile.open(tmp_path / manifest.shards[0].name) as tar:
        entries = tar.getmembers()
    suffixes = ("json", "noise.flac", "s1.flac", "s2.flac")
    assert [entry.name for entry in entries] == [
        f"utt-{i}.{suffix}" for i in range(3) for suffix in suffixes
    ]
    assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_the_tar_has_the_bytes_that_tarfile_writes_alone(tmp_path: Path) -> None:
    """USTAR in records of 10 KiB, also for an id that is not ASCII; every version wrote this."""
    records = [mixture(0), mixture(1, id="år-1")]
    info = write_shard(records, tmp_path, "x.tar")
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            files = sample_files.encode(record, sample_files.load_members(record))
            assert list(files) == ["json", "noise.flac", "s1.flac", "s2.flac"]
            for suffix, data in files.items():
                entry = tarfile.TarInfo(f"{record.id}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    assert (tmp_path / "x.tar").read_bytes() == expected.getvalue()
    assert hashlib.sha256(expected.getvalue()).hexdigest() == info.sha256
    assert info.bytes % tarfile.RECORDSIZE == 0
    sample = shards.read_index(tmp_path, info)[1]
    np.testing.assert_array_equal(read(tmp_path / "x.tar", sample, ["s2"])["s2"], waves_of(1)["s2"])


def test_the_manifest_counts_what_there_is(url: str) -> None:
    manifest = write(url)
    assert shards.read_manifest(url) == manifest
    assert shards.read_manifest(url).digest() == manifest.digest()
    assert manifest.members == ("s1", "s2", "noise") and manifest.num_samples == 6
    assert manifest.speakers == ("anna0", "anna1", "anna2", "anna3", "anna4", "anna5", "bertil")
    assert manifest.num_speakers == 7
    seconds = sum(400 + 40 * i for i in range(6)) / RATE
    assert manifest.hours == pytest.approx(seconds / 3600, rel=1e-12)
    assert shards.verify(url) == []


def check_webdataset_reads(path: str | list[str], numbers: range) -> None:
    samples = list(webdataset.WebDataset(path, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"utt-{i}" for i in numbers]
    for number, sample in zip(numbers, samples, strict=True):
        for member, wave in waves_of(number).items():
            found, rate = soundfile.read(io.BytesIO(sample[f"{member}.flac"]), dtype="float32")
            assert rate == RATE
            np.testing.assert_array_equal(found, wave)
        assert json.loads(sample["json"]) == {
            "id": f"utt-{number}",
            "speakers": [f"anna{number}", "bertil"],
            "texts": ["hej då", "good bye"],
            "num_samples": 400 + 40 * number,
            "sample_rate": RATE,
        }


def test_plain_webdataset_reads_the_shards_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path)
    check_webdataset_reads(f"{tmp_path}/toy-train-{{000000..000001}}.tar", range(6))


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches urls with curl")
def test_plain_webdataset_reads_the_shards_of_a_bucket(bucket: str, s3_env: S3Server) -> None:
    manifest = write(f"s3://{bucket}/train")
    signed = [
        s3_env.client().generate_presigned_url(
            "get_object", {"Bucket": bucket, "Key": f"train/{shard.name}"}
        )
        for shard in manifest.shards
    ]
    check_webdataset_reads([f"pipe:curl -sf '{one}'" for one in signed], range(6))


def test_the_reader_gives_the_same_audio_whole_and_in_crops(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    number = 0
    for shard in manifest.shards:
        with open(tmp_path / shard.name, "rb") as file:
            for sample in shards.read_index(tmp_path, shard):
                expected = waves_of(number)
                assert sample.key == f"utt-{number}" and sample.num_samples == 400 + 40 * number
                assert sample.speakers == (f"anna{number}", "bertil")
                whole = shards.read_sample(file, sample, ["s1", "noise"])
                assert list(whole) == ["s1", "noise"] and whole["s1"].dtype == np.float32
                np.testing.assert_array_equal(whole["s1"], expected["s1"])
                np.testing.assert_array_equal(whole["noise"], expected["noise"])
                crop = shards.read_sample(file, sample, ["s2"], 17, 333)["s2"]
                np.testing.assert_array_equal(crop, expected["s2"][17:333])
                number += 1


def test_the_index_points_at_the_members_as_tarfile_sees_them(tmp_path: Path) -> None:
    manifest = write(tmp_path, num_shards=1)
    samples = shards.read_index(tmp_path, manifest.shards[0])
    with tarfile.open(tmp_path / manifest.shards[0].name) as tar:
        expected = {entry.name: (entry.offset_data, entry.size) for entry in tar}
    ours = {
        f"{sample.key}.{name}{'' if name == 'json' else '.flac'}": tuple(place)
        for sample in samples
        for name, place in sample.members.items()
    }
    assert ours == expected


def test_threads_share_one_open_shard(tmp_path: Path) -> None:
    manifest = write(tmp_path, num_shards=1)
    samples = shards.read_index(tmp_path, manifest.shards[0])
    with open(tmp_path / manifest.shards[0].name, "rb") as file, ThreadPoolExecutor(8) as pool:
        for number, read in enumerate(
            pool.map(lambda i: shards.read_sample(file, samples[i % 3], ["s1"]), range(60))
        ):
            np.testing.assert_array_equal(read["s1"], waves_of(number % 3)["s1"])


def test_an_utterance_becomes_s1_and_a_mixture_without_sources_mix(tmp_path: Path) -> None:
    wave = waves_of(1)["s1"]
    utterance = Utterance(id="u", speaker="anna", sample_rate=RATE, load=lambda: wave, text="hej")
    info = write_shard([utterance], tmp_path / "u", "u.tar")
    assert shards.write_manifest(tmp_path / "u", "toy", "all", RATE, [info]).members == ("s1",)
    bare = Mixture(id="m", speakers=(), sample_rate=RATE, load=lambda: {"mix": wave})
    info = write_shard([bare], tmp_path / "m", "m.tar")
    manifest = shards.write_manifest(tmp_path / "m", "toy", "all", RATE, [info])
    assert manifest.members == ("mix",) and manifest.num_speakers == 0
    assert shards.verify(tmp_path / "u") == shards.verify(tmp_path / "m") == []


def test_members_are_sorted_by_their_numbers(tmp_path: Path) -> None:
    sources = tuple(f"s{i}" for i in range(1, 12))
    record = holding(waves_of(0, ("noise", *sources)), tuple("abcdefghijk"))
    info = write_shard([record], tmp_path, "x.tar")
    manifest = shards.write_manifest(tmp_path, "toy", "all", RATE, [info])
    assert manifest.members == (*sources, "noise")


# Records that cannot be stored.


def damaged(member: str, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    waves = waves_of(1)
    return waves | {member: change(waves[member].copy())}


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(wave: np.ndarray) -> np.ndarray:
        wave[100] = value
        return wave

    return change


@pytest.mark.parametrize(
    ("waves", "problem"),
    [
        (damaged("s2", lambda wave: wave[:0]), "broken-7', s2: empty"),
        (damaged("s1", lambda wave: wave * 0), "broken-7', s1: silent"),
        (damaged("s1", lambda wave: wave * 2.0**-17), "broken-7', s1: silent"),
        (
            damaged("noise", with_value(np.nan)),
            "broken-7', noise: NaN or infinite, first at sample 100",
        ),
        (damaged("s1", with_value(-np.inf)), "broken-7', s1: NaN or infinite, first at sample 100"),
        (damaged("s2", with_value(1.001)), r"broken-7', s2: outside \[-1, 1\], its peak is 1.001"),
        (damaged("s2", lambda wave: wave[:-1]), "broken-7': its members have different lengths"),
        (
            damaged("s2", lambda wave: np.stack([wave, wave])),
            "broken-7', s2: is float32 .*one-dimensional",
        ),
        (damaged("s2", lambda wave: (wave * 99).astype(np.int16)), "broken-7', s2: is int16"),
        ({}, "broken-7': its members are nothing"),
        (waves_of(1, ("s1", "s3")), "broken-7': its members are s1, s3; give s1, s2"),
        (waves_of(1, ("mix", "noise")), "broken-7': its members are noise, mix"),
        (waves_of(1, ("noise",)), "broken-7': its members are noise"),
        (waves_of(1, ("s1",)), "broken-7': names 2 speakers and has 1 sources"),
        (
            waves_of(1, ("s1", "s2")),
            "broken-7': has s1, s2 where the samples before it have s1, s2, noise",
        ),
    ],
)
def test_audio_that_cannot_be_stored_is_refused_by_the_name_of_its_record(
    waves: dict[str, np.ndarray], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=problem):
        write_shard([mixture(0), holding(waves)], tmp_path, "x.tar")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"id": "a.b"},
            "record 'a.b': an id is not empty and has no '.', '/' or control character",
        ),
        ({"id": "a/b"}, "record 'a/b': an id "),
        ({"id": "a\nb"}, r"record 'a\\nb': an id "),
        ({"id": ""}, "record '': "),
        ({"id": "ä" * 45}, "too long"),
        ({"id": "utt-0"}, "record 'utt-0': occurs twice"),
        ({"sample_rate": 16000}, "record 'utt-1': 16000 Hz after records of 8000 Hz"),
    ],
)
def test_ids_and_rates_that_do_not_fit_are_refused_before_any_audio_is_loaded(
    changes: dict[str, object], problem: str, tmp_path: Path
) -> None:
    records = [mixture(0, load=never), mixture(1, load=never, **changes)]
    with pytest.raises(DataError, match=problem):
        write_shard(records, tmp_path, "x.tar")
    with pytest.raises(DataError, match="no records"):
        write_shard([], tmp_path, "x.tar")


def test_full_scale_survives_and_rounding_is_to_the_nearest_step(tmp_path: Path) -> None:
    wave = np.array([1.0, -1.0, 0.6 / 2**15, -0.6 / 2**15, 0.4 / 2**15, 0.5], dtype=np.float64)
    write_shard([holding({"s1": wave}, ("a",))], tmp_path, "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        data = tar.extractfile("broken-7.s1.flac")
        assert data is not None
        pcm, _ = soundfile.read(io.BytesIO(data.read()), dtype="int16")
    assert pcm.tolist() == [32767, -32768, 1, -1, 0, 16384]


# Interrupted and repeated writes.


def test_an_interrupted_write_goes_on_and_gives_the_same_bytes(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "undisturbed")
    put = storage.put_bytes

    def interrupted(target: str, data: bytes, **options: bool) -> None:
        if "index/toy-train-000001" in str(target):
            raise KeyboardInterrupt
        put(target, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(url)
    message = r"no manifest.json in .*: not a finished data set; run sepdist shard write"
    with pytest.raises(DataError, match=message):
        shards.read_manifest(url)
    assert len(shards.verify(url)) == 1

    puts, put_file = [], storage.put_file

    def noting(path: Path, to: str) -> None:
        puts.append(to)
        put_file(path, to)

    monkeypatch.setattr(storage, "put_file", noting)
    write(url)
    assert puts == [storage.join(url, "toy-train-000001.tar")]  # the finished shard is kept
    assert contents(url) == contents(tmp_path / "undisturbed")


def test_a_finished_shard_is_kept_without_loading_audio_unless_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = write_shard([mixture(0)], tmp_path, "x.tar")
    before = (tmp_path / "x.tar").stat()
    changes = (
        {"id": "other"},
        {"speakers": ("x", "y")},
        {"texts": ()},
        {"sample_rate": 16000},
        {"load": partial(waves_of, 1)},
        {"load": partial(waves_of, 0, ("s2", "s1", "noise"))},
        {"load": lambda: waves_of(0)},
        {"metadata": len},
    )
    with monkeypatch.context() as patch:
        patch.setattr(sample_files, "load_members", never)
        assert write_shard([mixture(0)], tmp_path, "x.tar") == info
        assert (tmp_path / "x.tar").stat().st_mtime_ns == before.st_mtime_ns
        for changed in changes:
            with pytest.raises(AssertionError, match="loaded"):
                write_shard([mixture(0, **changed)], tmp_path, "x.tar")
    for damage in (
        lambda p: flip(p, 3000),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.unlink(),
    ):
        damage(tmp_path / "x.tar")
        assert write_shard([mixture(0)], tmp_path, "x.tar") == info
        assert hashlib.sha256((tmp_path / "x.tar").read_bytes()).hexdigest() == info.sha256
    for name in ("x.json", "x.inputs.json"):
        for content in ("{", "[1]"):
            (tmp_path / "index" / name).write_text(content)
            assert write_shard([mixture(0)], tmp_path, "x.tar") == info


def test_a_shard_whose_load_is_a_lambda_is_written_again(tmp_path: Path) -> None:
    for gain in (0.5, 0.25):  # nothing can tell these two apart
        loud = mixture(0, load=lambda gain=gain: {k: v * gain for k, v in waves_of(0).items()})
        info = write_shard([loud], tmp_path, "x.tar")
        [sample] = shards.read_index(tmp_path, info)
        assert read(tmp_path / "x.tar", sample, ["s1"])["s1"][0] == -gain
    assert not (tmp_path / "index" / "x.inputs.json").exists()


def test_storage_that_returns_other_bytes_is_noticed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = storage.put_file
    monkeypatch.setattr(
        storage, "put_file", lambda path, to: (put_file(path, to), flip(Path(to), 2000))
    )
    with pytest.raises(DataError, match=r"x.tar: reads back other bytes than were written"):
        write_shard([mixture(0)], tmp_path, "x.tar")
    assert not (tmp_path / "index").exists()


def test_an_equal_manifest_is_fine_and_another_is_refused(url: str) -> None:
    manifest = write(url)
    assert write(url) == manifest
    infos = list(manifest.shards)
    with pytest.raises(DataError, match=r"manifest.json: is of another data set .*remove it"):
        shards.write_manifest(url, "toy", "train", RATE, infos[:1])
    assert shards.read_manifest(url) == manifest


def test_shards_that_do_not_fit_together_make_no_data_set(tmp_path: Path) -> None:
    one = write_shard([mixture(0)], tmp_path, "one.tar")
    same = write_shard([mixture(0)], tmp_path, "same.tar")
    fewer = write_shard([holding(waves_of(2, ("s1", "s2")))], tmp_path, "fewer.tar")
    other = write_shard([mixture(5, sample_rate=16000)], tmp_path, "other.tar")
    for infos, problem in [
        ([one, same], "same.tar, utt-0: is in one.tar too"),
        (
            [one, fewer],
            "fewer.tar, broken-7: has s1, s2 where the samples before it have s1, s2, noise",
        ),
        ([one, other], "other.tar: 16000 Hz in a data set of 8000 Hz"),
        ([dataclasses.replace(one, index_sha256="0")], "one.tar: its index .* was changed"),
        ([dataclasses.replace(one, name="absent.tar")], "absent.tar: its index .* is missing"),
        ([], "no shards"),
    ]:
        with pytest.raises(DataError, match=problem):
            shards.write_manifest(tmp_path, "toy", "train", RATE, infos)
    (tmp_path / "one.tar").unlink()
    with pytest.raises(DataError, match=r"one.tar: the shard is missing or truncated"):
        shards.write_manifest(tmp_path, "toy", "train", RATE, [one])
    assert not (tmp_path / "manifest.json").exists()


def test_indices_are_read_at_the_same_time_and_the_first_wrong_shard_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = list(write(tmp_path, num_shards=40, per_shard=1).shards)
    together, read_bytes = threading.Barrier(8), storage.read_bytes

    def waiting(url: str) -> bytes:
        if "/index/" in url:
            together.wait(timeout=60)  # 8 readers, or BrokenBarrierError
        return read_bytes(url)

    monkeypatch.setattr(storage, "read_bytes", waiting)
    found = shards.write_manifest(tmp_path, "toy", "train", RATE, infos)
    assert found.shards == tuple(infos)
    monkeypatch.undo()  # after an error, readings are given up
    for number in (39, 5, 3):
        (tmp_path / infos[number].name).unlink()
        with pytest.raises(DataError, match=rf"{infos[number].name}: the shard is missing"):
            shards.write_manifest(tmp_path, "toy", "train", RATE, infos)


def test_the_digest_is_worked_out_once_for_a_manifest(tmp_path: Path, monkeypatch) -> None:
    digest = write(tmp_path).digest()
    read = shards.read_manifest(tmp_path)
    monkeypatch.setattr(manifests, "canonical", never)
    assert read.digest() == digest
