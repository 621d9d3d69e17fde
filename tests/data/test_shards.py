"""The shard format: the same bytes every time, readable by webdataset, and no unnoticed damage."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset

from sepdist import storage
from sepdist.data import manifest as manifests
from sepdist.data import members as sample_files
from sepdist.data import shards
from sepdist.data.records import Mixture, Utterance
from sepdist.data.shards import DataError, Manifest
from tests.support.s3server import S3Server

RATE = 8000


def waves_of(
    number: int, members: tuple[str, ...] = ("s1", "s2", "noise")
) -> dict[str, np.ndarray]:
    """16-bit audio as float32, with a length of its own and both ends of the scale."""
    random, waves = np.random.default_rng(number), {}
    for member in members:
        pcm = random.integers(-(2**15), 2**15, size=400 + 40 * number)
        pcm[:2] = (-(2**15), 2**15 - 1)
        waves[member] = (pcm / 2**15).astype(np.float32)
    return waves


def mixture(number: int, **changes: object) -> Mixture:
    speakers, texts = (f"anna{number}", "bertil"), ("hej då", "good bye")
    record = Mixture(f"utt-{number}", speakers, RATE, partial(waves_of, number), texts)
    return dataclasses.replace(record, **changes)


def never(*_: object) -> dict[str, np.ndarray]:
    raise AssertionError("loaded")


def holding(waves: Mapping[str, np.ndarray], speakers: tuple[str, ...] = ("a", "b")) -> Mixture:
    return Mixture(id="broken-7", speakers=speakers, sample_rate=RATE, load=lambda: waves)


def write(url: str | Path, num_shards: int = 2, per_shard: int = 3) -> Manifest:
    """Write a small data set of mixtures 0, 1, ..."""
    infos = []
    for i in range(num_shards):
        records = [mixture(i * per_shard + j) for j in range(per_shard)]
        infos.append(shards.write_shard(records, url, shards.shard_name("toy", "train", i)))
    return shards.write_manifest(url, "toy", "train", RATE, infos)


def contents(url: str | Path) -> dict[str, str]:
    """The sha256 of everything below a url."""
    found = {}
    for name in storage.list_names(url):
        below = contents(storage.join(url, name))
        if below:
            found |= {f"{name}/{key}": value for key, value in below.items()}
        else:
            found[name] = hashlib.sha256(storage.read_bytes(storage.join(url, name))).hexdigest()
    return found


def read(
    path: Path, sample: shards.Sample, members: list[str], *bounds: int | None
) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        return shards.read_sample(file, sample, members, *bounds)  # type: ignore[arg-type]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "set")
    return f"s3://{request.getfixturevalue('bucket')}/sets/train"


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
    info = shards.write_shard(records, tmp_path, "x.tar")
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
    info = shards.write_shard([utterance], tmp_path / "u", "u.tar")
    assert shards.write_manifest(tmp_path / "u", "toy", "all", RATE, [info]).members == ("s1",)
    bare = Mixture(id="m", speakers=(), sample_rate=RATE, load=lambda: {"mix": wave})
    info = shards.write_shard([bare], tmp_path / "m", "m.tar")
    manifest = shards.write_manifest(tmp_path / "m", "toy", "all", RATE, [info])
    assert manifest.members == ("mix",) and manifest.num_speakers == 0
    assert shards.verify(tmp_path / "u") == shards.verify(tmp_path / "m") == []


def test_members_are_sorted_by_their_numbers(tmp_path: Path) -> None:
    sources = tuple(f"s{i}" for i in range(1, 12))
    record = holding(waves_of(0, ("noise", *sources)), tuple("abcdefghijk"))
    info = shards.write_shard([record], tmp_path, "x.tar")
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
        (waves_of(1, ("s1", "mix")), "broken-7': its members are s1, mix"),
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
        shards.write_shard([mixture(0), holding(waves)], tmp_path, "x.tar")
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
        shards.write_shard(records, tmp_path, "x.tar")
    with pytest.raises(DataError, match="no records"):
        shards.write_shard([], tmp_path, "x.tar")


def test_full_scale_survives_and_rounding_is_to_the_nearest_step(tmp_path: Path) -> None:
    wave = np.array([1.0, -1.0, 0.6 / 2**15, -0.6 / 2**15, 0.4 / 2**15, 0.5], dtype=np.float64)
    shards.write_shard([holding({"s1": wave}, ("a",))], tmp_path, "x.tar")
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
    info = shards.write_shard([mixture(0)], tmp_path, "x.tar")
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
        assert shards.write_shard([mixture(0)], tmp_path, "x.tar") == info
        assert (tmp_path / "x.tar").stat().st_mtime_ns == before.st_mtime_ns
        for changed in changes:
            with pytest.raises(AssertionError, match="loaded"):
                shards.write_shard([mixture(0, **changed)], tmp_path, "x.tar")
    for damage in (
        lambda p: flip(p, 3000),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.unlink(),
    ):
        damage(tmp_path / "x.tar")
        assert shards.write_shard([mixture(0)], tmp_path, "x.tar") == info
        assert hashlib.sha256((tmp_path / "x.tar").read_bytes()).hexdigest() == info.sha256
    for name in ("x.json", "x.inputs.json"):
        for content in ("{", "[1]"):
            (tmp_path / "index" / name).write_text(content)
            assert shards.write_shard([mixture(0)], tmp_path, "x.tar") == info


def test_a_shard_whose_load_is_a_lambda_is_written_again(tmp_path: Path) -> None:
    for gain in (0.5, 0.25):  # nothing can tell these two apart
        loud = mixture(0, load=lambda gain=gain: {k: v * gain for k, v in waves_of(0).items()})
        info = shards.write_shard([loud], tmp_path, "x.tar")
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
        shards.write_shard([mixture(0)], tmp_path, "x.tar")
    assert not (tmp_path / "index").exists()


def test_an_equal_manifest_is_fine_and_another_is_refused(url: str) -> None:
    manifest = write(url)
    assert write(url) == manifest
    infos = list(manifest.shards)
    with pytest.raises(DataError, match=r"manifest.json: is of another data set .*remove it"):
        shards.write_manifest(url, "toy", "train", RATE, infos[:1])
    assert shards.read_manifest(url) == manifest


def test_shards_that_do_not_fit_together_make_no_data_set(tmp_path: Path) -> None:
    one = shards.write_shard([mixture(0)], tmp_path, "one.tar")
    same = shards.write_shard([mixture(0)], tmp_path, "same.tar")
    fewer = shards.write_shard([holding(waves_of(2, ("s1", "s2")))], tmp_path, "fewer.tar")
    other = shards.write_shard([mixture(5, sample_rate=16000)], tmp_path, "other.tar")
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


# Damage.


def with_shard(raw: dict, **changes: object) -> str:
    """A manifest whose first shard is changed, as a stranger's may be."""
    return json.dumps(raw | {"shards": [raw["shards"][0] | changes, *raw["shards"][1:]]})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: "{", "is not a readable manifest"),
        (lambda raw: "[]", "is not a readable manifest"),
        (lambda raw: json.dumps(raw | {"surprise": 1}), "is not a readable manifest .*surprise"),
        (
            lambda raw: json.dumps({k: v for k, v in raw.items() if k != "hours"}),
            "is not a readable manifest .*hours",
        ),
        (
            lambda raw: json.dumps(raw | {"format_version": 2}),
            "is of format 2, this version of sepdist reads format 1",
        ),
        (
            lambda raw: json.dumps(raw | {"num_samples": 5}),
            "was changed, it counts 5 samples and its shards 6",
        ),
        *[
            (partial(with_shard, name=name), "is no shard")
            for name in ("../../evil.tar", "/etc/evil.tar", "a/b.tar", "..tar", "a.sh", 7, "")
        ],
        *[(partial(with_shard, sha256=one), "is no shard") for one in ("/../x", "0" * 63, None)],
    ],
)
def test_a_changed_manifest_is_refused(
    change: Callable[[dict], str], problem: str, tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DataError, match=problem):
        shards.read_manifest(tmp_path)
    assert len(shards.verify(tmp_path)) == 1


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))]
)
@pytest.mark.parametrize("name", ["manifest.json", "index/toy-train-000000.json"])
def test_every_flipped_bit_of_the_manifest_and_of_an_index_is_found(
    name: str, first: int, tmp_path: Path
) -> None:
    write(tmp_path, num_shards=1, per_shard=1)
    path = tmp_path / name
    content = path.read_bytes()
    passed = []
    assert b"e-0" in content or name != "manifest.json"  # 1e-05 and 1E-05 are one number
    for at in range(0, len(content), 1 if name == "manifest.json" else 97):
        flipped = content[at] ^ 1 << (first + at) % 8
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        passed += [] if shards.verify(tmp_path) else [at]
    assert passed == []
    path.write_bytes(content)
    assert shards.verify(tmp_path) == []


def test_a_manifest_without_a_digest_is_read_and_has_the_same_digest(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    path = tmp_path / "manifest.json"
    raw = json.loads(path.read_text())
    assert raw.pop("digest") == manifest.digest()
    path.write_text(json.dumps(raw, indent=1, ensure_ascii=False))
    assert shards.read_manifest(tmp_path).digest() == manifest.digest()
    assert shards.verify(tmp_path) == []
    path.write_text(json.dumps(raw | {"digest": "0" * 64}))
    with pytest.raises(DataError, match="was changed or damaged, its digest is not 000"):
        shards.read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["manifest.json", "index/toy-train-000000.json", "toy-train-000000.tar"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_an_error_where_one_is_wanted(
    kind: str, name: str, tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    try:
        problems = shards.verify(tmp_path)
    except OSError as error:
        problems = [str(error)]
    assert problems and all(name.removesuffix(".json") in problem for problem in problems)


def test_any_change_of_the_data_set_changes_the_digest(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    first = manifest.shards[0]
    changed = [
        dataclasses.replace(manifest, split="dev"),
        dataclasses.replace(manifest, shards=manifest.shards[::-1]),
        dataclasses.replace(
            manifest, shards=(dataclasses.replace(first, sha256="0" * 64), *manifest.shards[1:])
        ),
    ]
    assert len({manifest.digest(), *(one.digest() for one in changed)}) == 4


def test_a_flipped_bit_of_the_audio_is_found_and_placed(tmp_path: Path) -> None:
    manifest = write(tmp_path, num_shards=1)
    shard = manifest.shards[0]
    path = tmp_path / shard.name
    intact, sample = path.read_bytes(), shards.read_index(tmp_path, shard)[1]
    offset, size = sample.members["s2"]
    places = np.random.default_rng(0).integers(offset + size // 4, offset + size, 8).tolist()
    for at in [offset, *places, offset + size - 1]:
        flip(path, at)
        with pytest.raises(DataError, match=rf"{shard.name}, utt-1.s2 at byte {offset}: damaged"):
            read(path, sample, ["s1", "s2"])
        whole, placed = shards.verify(tmp_path)  # and nothing else
        assert whole == f"{shard.name}: its sha256 is not the manifest's; it was damaged or changed"
        assert placed.startswith(f"{shard.name}, utt-1.s2 at byte {offset}: damaged")
        path.write_bytes(intact)
    assert shards.verify(tmp_path) == []


def test_a_truncated_shard_names_the_first_sample_that_is_cut(tmp_path: Path) -> None:
    manifest = write(tmp_path, num_shards=1)
    shard = manifest.shards[0]
    path, samples = tmp_path / shard.name, shards.read_index(tmp_path, shard)
    offset, size = samples[2].members["s1"]
    path.write_bytes(path.read_bytes()[: offset + size - 5])
    assert read(path, samples[1], ["s1"])["s1"].size == 440
    message = rf"utt-2.s1 at byte {offset}: truncated, .* {size - 5} of {size} bytes"
    with pytest.raises(DataError, match=message):
        read(path, samples[2], ["s1"])
    problems, cut = shards.verify(tmp_path), offset + size - 5
    assert problems[0] == f"{shard.name}: has {cut} bytes, the manifest says {shard.bytes}"
    assert any(f"utt-2.s1 at byte {offset}: truncated" in problem for problem in problems)


def test_missing_and_changed_files_of_a_data_set_are_named(url: str) -> None:
    manifest = write(url)
    index = storage.join(url, "index", "toy-train-000000.json")
    changed = storage.read_bytes(index).replace(b"anna0", b"bodil")
    storage.put_bytes(index, changed)
    storage.remove(storage.join(url, "toy-train-000001.tar"))
    with pytest.raises(DataError, match=r"toy-train-000000.tar: its index .* was changed"):
        shards.read_index(url, manifest.shards[0])
    assert len(shards.verify(url)) == 2
    assert "toy-train-000001.tar: the shard is missing" in shards.verify(url)
    storage.remove(index)
    with pytest.raises(DataError, match=r"toy-train-000000.tar: its index .* is missing"):
        shards.read_index(url, manifest.shards[0])


@pytest.mark.parametrize(
    "change",
    [
        b"null",
        b"[" * 100_000,
        {"samples": []},
        {"samples": [None]},
        {"num_samples": 4000.0},
        {"num_samples": 2**40},
        {"members": None},
        {"members": {"s1": [-1, 5]}},
        {"members": {"s1": [0, 2**40]}},
        {"members": {"s1": "ab"}},
        {"members": {"s1": [1]}},
        {"speakers": None},
        {"more": 1},
    ],
)
def test_an_index_of_other_values_is_damage(change: Any, tmp_path: Path) -> None:
    shard = write(tmp_path).shards[0]
    path = tmp_path / "index" / "toy-train-000000.json"
    index = json.loads(path.read_text())
    if isinstance(change, dict):
        (index if "samples" in change else index["samples"][0]).update(change)
    data = change if isinstance(change, bytes) else json.dumps(index).encode()
    path.write_bytes(data)
    shard = dataclasses.replace(shard, index_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(DataError, match=r"toy-train-000000\.tar: its index"):
        shards.read_index(tmp_path, shard)


def test_verify_finds_audio_that_should_never_have_been_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepdist.audio.SILENCE", 0.0)  # a writer that lets silence pass
    quiet = damaged("s1", lambda wave: wave * 2.0**-20)
    info = shards.write_shard([holding(quiet)], tmp_path, "x.tar")
    shards.write_manifest(tmp_path, "toy", "train", RATE, [info])
    monkeypatch.undo()
    offset = shards.read_index(tmp_path, info)[0].members["s1"][0]
    [problem] = shards.verify(tmp_path)
    assert problem.startswith(f"x.tar, broken-7.s1 at byte {offset}: silent")


def test_a_sample_is_asked_for_what_it_has(tmp_path: Path) -> None:
    info = shards.write_shard([mixture(0)], tmp_path, "x.tar")
    sample = shards.read_index(tmp_path, info)[0]
    with pytest.raises(DataError, match="utt-0: has no s3; it has json, noise, s1, s2"):
        read(tmp_path / "x.tar", sample, ["s1", "s3"])
    for start, stop in [(0, 401), (5, 5), (-1, 3), (400, None)]:
        with pytest.raises(ValueError, match=r"utt-0: cannot read"):
            read(tmp_path / "x.tar", sample, ["s1"], start, stop)


# Full disks.


def test_a_disk_that_fills_up_while_writing_keeps_the_finished_shards(small_disk: Path) -> None:
    info = shards.write_shard([mixture(0)], small_disk, "a.tar")
    before = contents(small_disk)
    message = r"b.tar: No space left on device; free some space"
    with pytest.raises(storage.StorageError, match=message):
        shards.write_shard([mixture(i) for i in range(1, 60)], small_disk, "b.tar")
    assert contents(small_disk) == before and sorted(os.listdir(small_disk)) == ["a.tar", "index"]
    assert shards.write_shard([mixture(0)], small_disk, "a.tar") == info


def test_a_full_folder_for_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    message = r"x.tar \(TMPDIR chooses the folder\): No space left on device"
    with pytest.raises(storage.StorageError, match=message):
        shards.write_shard([mixture(0)], tmp_path, "x.tar")
    assert not list(tmp_path.iterdir())
