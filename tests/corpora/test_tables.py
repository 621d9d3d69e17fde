"""Mixtures and utterances from folders, CSV tables and lists, against the files that they name."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sepdist.audio import AudioError
from sepdist.corpora.tables import Table
from sepdist.data.records import Mixture, Utterance
from tests.corpora.conftest import signal, write

STEP = 1 / 32768


def steps(wave: np.ndarray) -> np.ndarray:
    return np.round(wave * 32768).astype(np.int16)


def mixtures(
    root: Path, names: list[str], num_sources: int = 2, noise: bool = True, rate: int = 8000
) -> dict[str, np.ndarray]:
    """Write mix, s1, s2, ..., noise of each name; return the 16-bit steps by <member>/<name>."""
    members = [*(f"s{i}" for i in range(1, num_sources + 1)), *["noise"] * noise]
    written = {}
    for number, name in enumerate(names):
        parts = {m: steps(signal(10 * number + i, 900)) for i, m in enumerate(members)}
        for member, wave in {**parts, "mix": sum(parts.values())}.items():
            write(root / member / f"{name}.wav", np.asarray(wave), rate)
            written[f"{member}/{name}"] = np.asarray(wave)
    return written


def read(corpus: Table, split: str = "all") -> list[Any]:
    return [pickle.loads(pickle.dumps(record)) for record in corpus.records(split)]


def folder(root: Path, **options: Any) -> Table:
    return Table(layout="folder", root=str(root), **options)


@pytest.mark.parametrize(("num_sources", "rate"), [(2, 8000), (3, 16000)])
def test_folders_of_equal_names_are_mixtures_whose_mix_is_left_out_as_it_is_the_sum(
    tmp_path: Path, num_sources: int, rate: int
) -> None:
    written = mixtures(tmp_path / "train", ["a", "sub/a", "b.1"], num_sources, rate=rate)
    records = read(folder(tmp_path), "train")
    assert [record.id for record in records] == ["a", "bp1", "sub-a"]
    for record, name in zip(records, ["a", "b.1", "sub/a"], strict=True):
        assert isinstance(record, Mixture) and record.sample_rate == rate
        assert len(set(record.speakers)) == num_sources
        loaded = record.load()
        assert list(loaded) == [*(f"s{i}" for i in range(1, num_sources + 1)), "noise"]
        for member, wave in loaded.items():
            np.testing.assert_array_equal(wave * 32768, written[f"{member}/{name}"])


def test_a_mix_that_is_not_the_sum_is_kept_in_all_mixtures(tmp_path: Path) -> None:
    written = mixtures(tmp_path, [f"{i}" for i in range(7)], noise=False)
    write(tmp_path / "mix" / "3.wav", np.roll(written["mix/3"], 5), 8000)
    for record in read(folder(tmp_path)):
        loaded = record.load()
        assert list(loaded) == ["s1", "s2", "mix"]
        expected = np.roll(written["mix/3"], 5) if record.id == "3" else written[f"mix/{record.id}"]
        np.testing.assert_array_equal(loaded["mix"] * 32768, expected)


def test_the_first_mixtures_decide_and_a_later_one_that_differs_is_named(tmp_path: Path) -> None:
    written = mixtures(tmp_path, [f"{i}" for i in range(7)])
    write(tmp_path / "mix" / "6.wav", np.roll(written["mix/6"], 5), 8000)
    *fine, bad = read(folder(tmp_path))
    assert [list(record.load()) for record in fine] == 6 * [["s1", "s2", "noise"]]
    with pytest.raises(AudioError, match=r"mix/6\.wav: is not the sum of s1, .*mixture=own"):
        bad.load()
    assert [list(r.load()) for r in read(folder(tmp_path, mixture="own"))] == 7 * [
        ["s1", "s2", "noise", "mix"]
    ]
    with pytest.raises(AudioError, match="is not the sum"):
        read(folder(tmp_path, mixture="sum"))[6].load()


def test_a_mix_that_is_named_and_nowhere_there_is_missed_unless_it_is_their_sum(
    tmp_path: Path,
) -> None:
    mixtures(tmp_path, ["a", "b"], 2, False)
    named = {"mix": "no-mix", "s1": "s1", "s2": "s2"}
    for options in ({}, {"sample_rate": 8000}):
        with pytest.raises(AudioError, match=r"no-mix/a\.wav: no such file \(2 of 6 are missing"):
            read(folder(tmp_path, members=named, **options))
    first, _ = read(folder(tmp_path, members=named, mixture="sum"))
    assert first.sample_rate == 8000 and list(first.load()) == ["s1", "s2"]


def test_noise_that_is_not_in_the_mix_is_left_out_with_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = mixtures(tmp_path, ["a", "b"])
    for name in "ab":
        write(tmp_path / "mix" / f"{name}.wav", written[f"s1/{name}"] + written[f"s2/{name}"], 8000)
    assert [list(record.load()) for record in read(folder(tmp_path))] == 2 * [["s1", "s2"]]
    assert "left out 2 noises" in caplog.text


def test_sources_alone_recordings_alone_and_pairs_for_enhancement_are_read(tmp_path: Path) -> None:
    written = mixtures(tmp_path / "all3", ["a"])
    for name, members, expected in (
        ("sources", {"s1": "s1", "s2": "s2"}, ["s1", "s2"]),
        ("recordings", {"mix": "mix"}, ["mix"]),
        ("pairs", {"mix": "mix", "s1": "s2"}, ["s1", "mix"]),
    ):
        for member in members.values():
            write(tmp_path / name / member / "a.wav", written[f"{member}/a"], 8000)
        (record,) = read(folder(tmp_path / name, members=members))
        assert list(record.load()) == expected
    assert record.speakers == ("a-s1",)
    np.testing.assert_array_equal(record.load()["s1"] * 32768, written["s2/a"])


def test_a_tree_of_speakers_gives_utterances_of_the_folders_names(tmp_path: Path) -> None:
    for name in ("p225/001.wav", "p226/001.flac", "p226/deep/er/002.wav", "s5/001.wav"):
        write(tmp_path / "wav48" / name, signal(1, 800), 48000)
    records = read(folder(tmp_path, sample_rate=16000), "wav48")
    assert [r.id for r in records] == ["p225-001", "p226-001", "p226-deep-er-002", "s5-001"]
    assert [r.speaker for r in records] == ["p225", "p226", "er", "s5"]
    assert all(isinstance(r, Utterance) and r.load().size == 267 for r in records)  # 800 / 3
    records = read(folder(tmp_path, speaker="^wav48/([^/]+)"), "wav48")
    assert [r.speaker for r in records] == ["p225", "p226", "p226", "s5"]
    assert {r.sample_rate for r in records} == {48000} and records[0].load().size == 800


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("mixture", "source1", "source2"), ["s1", "s2"]),
        (("Noisy", "source_1", "noise"), ["s1", "mix"]),
        (("mixture", "noise"), ["mix"]),
    ],
)
def test_every_known_name_of_a_folder_makes_it_a_member_and_no_speaker(
    folders: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    waves = {name: steps(signal(i, 900)) for i, name in enumerate(folders)}
    if folders[1:] == ("source1", "source2"):
        waves["mixture"] = waves["source1"] + waves["source2"]
    for name, wave in waves.items():
        write(tmp_path / name / "a.wav", wave, 8000)
    (record,) = read(folder(tmp_path))
    assert isinstance(record, Mixture) and {*record.load()} >= {*expected}


def test_a_float_mixture_beyond_full_scale_is_the_sum_of_its_sources(tmp_path: Path) -> None:
    waves = {"s1": 0.9 * np.sin(np.arange(900)), "s2": 0.8 * np.sin(np.arange(900))}
    for name, wave in (*waves.items(), ("mix", sum(waves.values()))):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", wave, 8000, subtype="FLOAT")
    (record,) = read(folder(tmp_path))
    assert list(record.load()) == ["s1", "s2"]


def test_speakers_who_are_called_s1_and_s2_are_no_sources_where_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("s1/bbaf2n.wav", "s2/lgaz.wav", "s3/swwp.wav"):
        write(tmp_path / name, signal(1, 800), 8000)
    with pytest.raises(AudioError, match=r"s1/lgaz\.wav: no such file"):
        read(folder(tmp_path))
    caplog.clear()
    records = read(folder(tmp_path, members={"s1": "."}))
    assert [r.speaker for r in records] == ["s1", "s2", "s3"] and caplog.messages == []


def test_ids_that_a_tar_cannot_hold_are_cut_and_stay_apart(tmp_path: Path) -> None:
    deep = "/".join(["é" * 40] * 3)
    for name in (f"{deep}/1.wav", f"{deep}/2.wav", "a\tb/c.d/1.wav"):
        write(tmp_path / name, signal(1, 500), 8000)
    bad = tmp_path / "Jos\udce9" / "1.wav"  # a name in Latin-1
    write(tmp_path / "plain.wav", signal(1, 500), 8000)
    bad.parent.mkdir()
    (tmp_path / "plain.wav").rename(bad)
    from sepdist.data.members import misfits

    records = read(folder(tmp_path))
    assert misfits(records) == {}
    ids = {record.id for record in records}
    assert len(ids) == 4 and {"a_b-cpd-1", "Jos\\xe9-1"} < ids
    assert {len(one.encode()) <= 89 for one in ids} == {True}
    assert {record.speaker for record in records} >= {"cpd".replace("p", "."), "Jos\\xe9"}


def test_faults_of_folders_name_the_file(tmp_path: Path) -> None:
    mixtures(tmp_path / "tr", ["a", "b"])
    with pytest.raises(AudioError, match=r"tt: no such folder .*tr"):
        read(folder(tmp_path), "tt")
    (tmp_path / "tr" / "s2" / "b.wav").unlink()
    with pytest.raises(AudioError, match=r"s2/b\.wav: no such file \(1 of 6"):
        read(folder(tmp_path), "tr")
    write(tmp_path / "tr" / "s2" / "b.wav", signal(1, 900), 16000)
    with pytest.raises(AudioError, match="16000 Hz where 8000"):
        read(folder(tmp_path), "tr")[1].load()
    write(tmp_path / "tr" / "s2" / "b.wav", signal(1, 899), 8000)
    with pytest.raises(AudioError, match=r"s2/b\.wav: 899 samples where .*s1/b\.wav has 900"):
        read(folder(tmp_path), "tr")[1].load()
    write(tmp_path / "tr" / "s2" / "b.flac", signal(1, 900), 8000)
    with pytest.raises(ValueError, match=r"tr/s2: two items have the id 'b'"):
        read(folder(tmp_path), "tr")
    with pytest.raises(ValueError, match="mixture=mine"):
        folder(tmp_path, mixture="mine")
    with pytest.raises(ValueError, match=r"s1, s2, \.\.\. without a gap"):
        read(folder(tmp_path, members={"s1": "s1", "s3": "s2"}), "tr")
    for wrong in ("(", "x(", "no speaker", "([ab])([12])([34])"):
        with pytest.raises(ValueError, match=r"corpus\.speaker"):
            read(folder(tmp_path / "tr", speaker=wrong, members={"s1": "s1", "noise": "noise"}))


def table(path: Path, rows: list[dict[str, Any]]) -> Table:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(rows)
    return Table(layout="csv", table=str(path))


def speechbrain(root: str, names: list[str]) -> list[dict[str, Any]]:
    """The columns that its recipes for LibriMix, WHAM! and WSJ0-mix write."""
    kinds = ("mix", "s1", "s2", "noise")
    return [
        {"ID": number, "duration": 1.0}
        | {
            f"{k}_wav{x}": y
            for k in kinds
            for x, y in (("", f"{root}/{k}/{name}.wav"), ("_format", "wav"), ("_opts", None))
        }
        for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("start", ["$data_root", "{folder}", ""])
def test_speechbrains_tables_are_known_wherever_their_paths_start(
    tmp_path: Path, start: str
) -> None:
    written = mixtures(tmp_path / "data", ["a_1", "b_1"])
    begin = start.format(folder=tmp_path / "data") or "."
    corpus = table(tmp_path / "tables" / "train.csv", speechbrain(begin, ["a_1", "b_1"]))
    corpus = Table(layout="csv", table=corpus.table, root=str(tmp_path / "data"), speaker="(.)_(.)")
    first, second = read(corpus, "train")
    assert (first.id, second.id, second.speakers) == ("0", "1", ("b", "1"))
    for member, wave in second.load().items():
        np.testing.assert_array_equal(wave * 32768, written[f"{member}/b_1"])
    assert list(second.load()) == ["s1", "s2", "noise"]


def test_librimixs_generated_tables_are_known_and_those_with_gains_are_sent_elsewhere(
    tmp_path: Path,
) -> None:
    mixtures(tmp_path, ["a"], 3, noise=False)
    row = {"mixture_ID": "x.y", "mixture_path": "mix/a.wav"}
    row |= {f"source_{i}_path": f"s{i}/a.wav" for i in (1, 2, 3)} | {"length": "900"}
    (record,) = read(table(tmp_path / "mixture_dev_mix_clean.csv", [row]))
    assert record.id == "xpy" and list(record.load()) == ["s1", "s2", "s3"]
    gains = {"mixture_ID": "x", "source_1_path": "s1/a.wav", "source_1_gain": "0.5"}
    with pytest.raises(ValueError, match="corpus=librimix"):
        read(table(tmp_path / "libri2mix_dev.csv", [gains]))


def test_columns_name_speakers_or_are_chosen(tmp_path: Path) -> None:
    mixtures(tmp_path, ["a"])
    row = {"voice a": "s1/a.wav", "voice b": "s2/a.wav", "x": "19", "y": "26"}
    corpus = table(tmp_path / "t.csv", [row])
    corpus.members, corpus.speaker = {"s1": "voice a", "s2": "voice b"}, ["x", "y"]
    (record,) = read(corpus)
    assert (record.id, record.speakers) == ("s1-a", ("19", "26"))
    row = {"s1": "s1/a.wav", "s2": "s2/a.wav", "s2_speaker": "q", "s1_speaker": "p"}
    assert read(table(tmp_path / "u.csv", [row]))[0].speakers == ("p", "q")
    corpus = table(tmp_path / "v.tsv", [{"client_id": "c", "path": "s1/a.wav", "sentence": "A, b"}])
    (utterance,) = read(corpus)
    assert isinstance(utterance, Utterance)
    assert (utterance.speaker, utterance.id) == ("c", "s1-a")


def test_transcripts_come_from_columns_and_lists(tmp_path: Path) -> None:
    mixtures(tmp_path, ["a", "b"], noise=False)
    pair = "id,s1,s2,s1_text,s2_text\na,s1/a.wav,s2/a.wav,ONE TWO,THREE\nb,s1/b.wav,s2/b.wav,,X\n"
    alone = 'path\ttext\ts2_text\ns1/a.wav\tsaid "so\ts2/a.wav\n'
    (tmp_path / "pair.csv").write_text(pair)
    (tmp_path / "alone.tsv").write_text(alone)
    records = read(Table(layout="csv", table=str(tmp_path / "pair.csv")))
    assert [record.texts for record in records] == [("ONE TWO", "THREE"), ("", "X")]
    (record,) = read(Table(layout="csv", table=str(tmp_path / "alone.tsv")))
    assert record.text == 'said "so'
    lists = tmp_path / "data"
    lists.mkdir()
    for number in (1, 2):
        (lists / f"spk{number}.scp").write_text(f"a s{number}/a.wav\nb s{number}/b.wav\n")
        (lists / f"text_spk{number}").write_text(f"b WORDS OF {number}\nc NO AUDIO\n")
    records = read(Table(layout="scp", table=str(lists)))
    assert [record.texts for record in records] == [("", ""), ("WORDS OF 1", "WORDS OF 2")]


def test_a_quote_that_is_not_closed_loses_no_row(tmp_path: Path) -> None:
    """As in Common Voice's tables of tabs; a CSV file must quote it."""
    sentences = ["plain", '"opened', "plain", "plain", 'clo"sed', "plain"]
    for number in range(6):
        write(tmp_path / f"c{number}.wav", signal(number, 500), 8000)
    for by, suffix in (("\t", "tsv"), (",", "csv")):
        rows = [f"spk{i}{by}c{i}.wav{by}{text}" for i, text in enumerate(sentences)]
        text = "\n".join([f"client_id{by}path{by}sentence", *rows])
        (tmp_path / f"all.{suffix}").write_text(text)
    records = read(Table(layout="csv", table=str(tmp_path / "all.tsv")))
    assert [(r.id, r.speaker) for r in records] == [(f"c{i}", f"spk{i}") for i in range(6)]
    with pytest.raises(ValueError, match=r"all\.csv, line \d: is not a CSV file"):
        read(Table(layout="csv", table=str(tmp_path / "all.csv")))
    (tmp_path / "all.csv").write_text("path,speaker\nc0.wav,a\nc1.wav,b,c\n")
    with pytest.raises(ValueError, match=r"all\.csv, line 3: has more cells than columns"):
        read(Table(layout="csv", table=str(tmp_path / "all.csv")))


def test_faults_of_a_table_name_the_row_and_column(tmp_path: Path) -> None:
    mixtures(tmp_path, ["a"])
    rows = [{"s1": "s1/a.wav", "s2": "s2/a.wav"}, {"s1": "s1/a.wav", "s2": ""}]
    with pytest.raises(ValueError, match=r"t\.csv, line 3: has no s2"):
        read(table(tmp_path / "t.csv", rows))
    with pytest.raises(AudioError, match=r"s2/b\.wav: no such file .*check root"):
        read(table(tmp_path / "t.csv", [{"s1": "s1/a.wav", "s2": "s2/b.wav"}]))
    with pytest.raises(ValueError, match=r"t\.csv: members .* of one, two: corpus\.members names"):
        read(table(tmp_path / "t.csv", [{"one": "1", "two": "2"}]))
    with pytest.raises(ValueError, match=r"mix_wav and mixture are both mix by their names"):
        read(table(tmp_path / "t.csv", [{"mix_wav": "1", "mixture": "2"}]))


def lists(folder: Path, root: Path, names: list[str], members: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for list_name, member in members.items():
        lines = [f"40n_01x_{name} {root}/{member}/{name}.wav\n" for name in names]
        (folder / list_name).write_text("".join(lines))


def test_lists_of_espnet_and_kaldi_are_read(tmp_path: Path) -> None:
    written = mixtures(tmp_path / "wav", ["a", "b"], 2)
    data = tmp_path / "data" / "tr"
    espnet = {"wav.scp": "mix", "spk1.scp": "s1", "spk2.scp": "s2", "noise1.scp": "noise"}
    lists(data, tmp_path / "wav", ["a", "b"], {**espnet, "dereverb1.scp": "mix"})
    (data / "utt2spk").write_text("40n_01x_a 40n_01x\n40n_01x_b 40n_01x\n")
    records = read(Table(layout="scp", table=str(tmp_path / "data")), "tr")
    assert [(r.id, r.speakers) for r in records] == [
        ("40n_01x_a", ("40n", "01x")),
        ("40n_01x_b", ("40n", "01x")),
    ]
    for member, wave in records[1].load().items():
        np.testing.assert_array_equal(wave * 32768, written[f"{member}/b"])
    for name in espnet.keys() - {"wav.scp"} | {"dereverb1.scp"}:
        (data / name).unlink()
    records = read(Table(layout="scp", table=str(data)))
    assert [type(record) for record in records] == 2 * [Utterance]
    assert [record.speaker for record in records] == 2 * ["40n_01x"]
    np.testing.assert_array_equal(records[0].load() * 32768, written["mix/a"])


def test_lists_of_features_and_speakers_beside_those_of_audio_are_not_read_as_audio(
    tmp_path: Path,
) -> None:
    mixtures(tmp_path / "wav", ["a", "b"], 2)
    data = tmp_path / "data" / "tr"
    lists(data, tmp_path / "wav", ["a", "b"], {"wav.scp": "s1"})
    (data / "feats.scp").write_text("40n_01x_a mfcc.ark:5\n40n_01x_b mfcc.ark:9\n")
    (data / "cmvn.scp").write_text("40n cmvn.ark:4\n")  # by speaker, as Kaldi writes it
    (data / "data.json").write_text('{"utts": {"40n_01x_a": {}}}')  # of ESPnet 1
    corpus = Table(layout="scp", table=str(tmp_path / "data"))
    assert [record.id for record in read(corpus, "tr")] == ["40n_01x_a", "40n_01x_b"]
    with pytest.raises(ValueError, match=r"tr_mni: no such folder"):
        read(corpus, "tr_mni")
    (data / "data.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"data\.json: is no list"):
        read(corpus, "tr")


def test_lists_of_asteroid_are_read(tmp_path: Path) -> None:
    written = mixtures(tmp_path / "wav", ["a.1", "b"])
    for kind, member in (("mix_both", "mix"), ("s1", "s1"), ("s2", "s2"), ("noise", "noise")):
        paths = [[f"{tmp_path}/wav/{member}/{name}.wav", 900] for name in ("a.1", "b")]
        (tmp_path / f"{kind}.json").write_text(json.dumps(paths))
    corpus = Table(layout="scp", table=str(tmp_path))
    assert [(r.id, list(r.load())) for r in read(corpus)] == [
        (name, ["s1", "s2", "noise"]) for name in ("ap1", "b")
    ]
    corpus.members = {"mix": "mix_both.json", "s1": "s2.json"}
    first, _ = read(corpus)
    np.testing.assert_array_equal(first.load()["mix"] * 32768, written["mix/a.1"])
    (tmp_path / "s2.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"s2\.json|has no s2"):
        read(corpus)


@pytest.mark.parametrize(
    "entry",
    ["sph2pipe -f wav {marker} |", "| cat {marker}", "touch {marker} |", "-", "raw.ark:1234", ""],
)
def test_commands_and_archives_in_lists_are_refused_by_name_and_never_run(
    tmp_path: Path, entry: str
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "wav.scp").write_text(f"utt1 {entry.format(marker=marker)}\n")
    with pytest.raises(ValueError, match=r"utt1: (.* is no file, but a command|has no wav\.scp)"):
        read(Table(layout="scp", table=str(tmp_path)))
    assert not marker.exists()


def test_lists_that_disagree_and_segments_are_named(tmp_path: Path) -> None:
    mixtures(tmp_path, ["a", "b"])
    lists(tmp_path, tmp_path, ["a", "b"], {"spk1.scp": "s1", "wav.scp": "mix"})
    lists(tmp_path, tmp_path, ["a"], {"spk2.scp": "s2"})
    corpus = Table(layout="scp", table=str(tmp_path))
    with pytest.raises(ValueError, match=r"40n_01x_b: has no spk2\.scp"):
        read(corpus)
    (tmp_path / "spk2.scp").write_text("x y\nx z\n")
    with pytest.raises(ValueError, match=r"spk2\.scp: two items have the id 'x'"):
        read(corpus)
    (tmp_path / "segments").write_text("u1 rec1 0.0 1.0\n")
    with pytest.raises(ValueError, match=r"segments: .* cut"):
        read(corpus)
