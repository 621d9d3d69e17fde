"""Writing a corpus: corrected inputs are noticed, and bad records are listed or left out."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from sepdist.config import ConfigError, ShardConfig
from sepdist.data import inputs, shards
from sepdist.data.dataset import Dataset
from sepdist.data.members import DataError
from sepdist.data.sharding import Written, num_short, num_skipped, write_data_set

RATE = 8000


def voice(number: int, seconds: float = 0.5) -> np.ndarray:
    return np.random.default_rng(number).uniform(-0.5, 0.5, int(RATE * seconds))


def record(path: Path, wave: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE, subtype="PCM_16")
    return path


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Six utterances of 0.5 s, three in a shard, by two speakers."""
    for number in range(6):
        name = f"{number % 2}-1-{number}.wav"
        record(tmp_path / "speech" / "train" / str(number % 2) / "1" / name, voice(number))
    return tmp_path / "speech"


def wav(speech: Path, number: int) -> Path:
    return speech / "train" / str(number % 2) / "1" / f"{number % 2}-1-{number}.wav"


def write(speech: Path, output: Path, **changes: object) -> Written:
    target = "sepdist.corpora.librispeech.LibriSpeech"
    corpus = {"_target_": target, "root": str(speech), "sample_rate": RATE}
    settings = {"corpus": corpus, "split": "train", "samples_per_shard": 3} | changes
    return write_data_set(ShardConfig(output=str(output), **settings), Console(quiet=True))


def stored(output: Path) -> dict[str, np.ndarray]:
    """The first source of every sample by its id."""
    data = Dataset(str(output), num_sources=len(shards.read_manifest(output).members))
    items = [data.item(i, 99.0) for i in range(data.manifest.num_samples)]
    return {item.id: item.members["s1"] for item in items}


def require_equal(output: Path, number: int, wave: np.ndarray) -> None:
    np.testing.assert_allclose(stored(output)[f"{number % 2}-1-{number}"], wave, atol=1e-4)


# Corrected inputs.


def stop_in_the_second_shard(speech: Path, output: Path, **changes: object) -> None:
    """A write that finishes shard 0 (utterances 0, 2, 4) and not shard 1 (1, 3, 5)."""
    intact = wav(speech, 3).read_bytes()
    wav(speech, 3).write_bytes(b"no audio")
    with pytest.raises(DataError, match="1-1-3"):
        write(speech, output, **changes)
    assert [path.name for path in output.glob("*.tar")] == ["librispeech-train-000000.tar"]
    wav(speech, 3).write_bytes(intact)


def replaced(path: Path) -> None:
    """Another recording of the same size."""
    before = path.stat()
    record(path, voice(99))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_a_source_file_replaced_between_two_starts_is_read_again(
    speech: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stop_in_the_second_shard(speech, output)
    replaced(wav(speech, 2))
    written = write(speech, output)
    assert written.num_kept == 0
    require_equal(output, 2, voice(99))
    require_equal(output, 3, voice(3))


def test_what_did_not_change_is_kept_and_equal_audio_has_an_equal_digest(
    speech: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stop_in_the_second_shard(speech, output)
    assert write(speech, output).num_kept == 1
    for number in range(6):
        os.utime(wav(speech, number))
    again = write(speech, tmp_path / "again").manifest
    assert again == shards.read_manifest(output)
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (
        output / "manifest.json"
    ).read_bytes()


def test_other_versions_of_what_changes_samples_write_an_unfinished_shard_again(
    speech: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    stop_in_the_second_shard(speech, output)
    versions = inputs._versions() | {"soxr": "99.0"}
    monkeypatch.setattr(inputs, "_versions", lambda: versions)
    assert write(speech, output).num_kept == 0
    monkeypatch.undo()
    write(speech, output)  # finished with one version throughout, so it is only said
    assert "soxr was 99.0, is " in caplog.text


def mixtures(speech: Path, gains: list[float]) -> dict[str, object]:
    """A corpus of mixtures of utterances 2i and 2i + 1, with LibriMix's metadata."""
    folder = speech.parent / "metadata"
    folder.mkdir(exist_ok=True)
    with open(folder / "libri2mix_train.csv", "w", newline="") as file:
        rows = csv.writer(file)
        names = [f"source_{i}_{what}" for i in (1, 2) for what in ("path", "gain")]
        rows.writerow(["mixture_ID", *names])
        for i, gain in enumerate(gains):
            paths = [wav(speech, n).relative_to(speech) for n in (2 * i, 2 * i + 1)]
            rows.writerow([f"mix-{i}", paths[0], gain, paths[1], 0.5])
    target = "sepdist.corpora.librimix.LibriMix"
    return {
        "_target_": target,
        "metadata": str(folder),
        "speech_root": str(speech),
        "noise": False,
    }


def test_gains_corrected_after_a_failure_in_the_third_mixture_hold_for_the_first_two(
    speech: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    settings = {"samples_per_shard": 1}
    with pytest.raises(DataError, match="mix-2"):
        write(speech, output, corpus=mixtures(speech, [1.0, 1.0, float("nan")]), **settings)
    corrected = mixtures(speech, [0.1, 1.0, 0.1])
    assert write(speech, output, corpus=corrected, **settings).num_kept == 1  # that of mixture 1
    found = stored(output)
    for i, gain in enumerate([0.1, 1.0, 0.1]):
        np.testing.assert_allclose(found[f"mix-{i}"], voice(2 * i) * gain, atol=1e-4)


def test_a_file_that_a_load_names_below_a_root_is_looked_at(speech: Path, tmp_path: Path) -> None:
    """LibriMix's recipes hold paths below speech_root."""
    corpus = mixtures(speech, [1.0, 1.0])
    write(speech, tmp_path / "out", corpus=corpus)
    replaced(wav(speech, 3))
    with pytest.raises(DataError, match=r"mix-1\..*1-1-3\.wav was \["):
        write(speech, tmp_path / "out", corpus=corpus)


def added(speech: Path) -> None:
    record(speech / "train" / "0" / "1" / "0-1-6.wav", voice(6))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda speech: replaced(wav(speech, 1)), r"1-1-1\..*1-1-1\.wav was \["),
        (lambda speech: record(wav(speech, 1), voice(1, 0.75)), r"1-1-1\..*1-1-1\.wav was \["),
        (added, r"0-1-6 was None"),
        (lambda speech: wav(speech, 5).unlink(), r"1-1-5 was .*, is None"),
        (
            lambda speech: [wav(speech, n).unlink() for n in (1, 3, 5)],
            r"librispeech-train-000001\.tar has no records any more",
        ),
    ],
)
def test_a_finished_data_set_of_a_changed_corpus_is_an_error_that_says_what_changed(
    change: Callable[[Path], object], expected: str, speech: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    write(speech, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert write(speech, output).num_kept == 2
    change(speech)
    message = rf"was made of other inputs: .*{expected}.*Choose another output"
    with pytest.raises(DataError, match=message):
        write(speech, output)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_subset_of_a_data_set_that_was_made_again_is_written_again(
    speech: Path, tmp_path: Path
) -> None:
    write(speech, tmp_path / "whole")
    corpus = {"_target_": "sepdist.corpora.stored.Stored", "data": str(tmp_path / "whole")}
    write(speech, tmp_path / "part", corpus=corpus)
    (tmp_path / "whole").rename(tmp_path / "old")
    replaced(wav(speech, 4))
    write(speech, tmp_path / "whole")
    with pytest.raises(DataError, match=r"corpus\.identity was"):
        write(speech, tmp_path / "part", corpus=corpus)
    (tmp_path / "part" / "manifest.json").unlink()
    assert write(speech, tmp_path / "part", corpus=corpus).num_kept == 0
    require_equal(tmp_path / "part", 4, voice(99))


def test_data_sets_of_older_versions_are_read_and_what_is_not_known_is_said(
    speech: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    manifest = write(speech, output).manifest
    for path in (output / "index").glob("*.inputs.json"):
        path.unlink()
    assert write(speech, output).manifest == manifest
    assert "whether its audio would be the same now is not known" in caplog.text
    assert shards.verify(output) == []
    (output / "manifest.json").unlink()
    assert write(speech, output).num_kept == 0


def test_a_finished_data_set_whose_corpus_is_gone_stays_finished(
    speech: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write(speech, tmp_path / "out").manifest
    speech.rename(tmp_path / "elsewhere")
    assert write(speech, tmp_path / "out").manifest == manifest
    assert "would be the same now is not known" in caplog.text and "no such folder" in caplog.text


# Bad records.


def spoil(speech: Path) -> None:
    """Five of six recordings that cannot be stored, each for a reason of its own."""
    wav(speech, 0).write_text("no audio")
    soundfile.write(wav(speech, 1), np.zeros(RATE), RATE)
    soundfile.write(wav(speech, 2), np.full(RATE, np.nan), RATE, subtype="FLOAT")
    soundfile.write(wav(speech, 4), np.zeros(0), RATE)
    soundfile.write(wav(speech, 5), voice(5), RATE // 2)


BAD = (0, 1, 2, 4, 5)
REASONS = ("cannot be", "silent", "NaN", "empty", "rate is 4000 Hz")


def test_all_bad_files_are_listed_with_their_reasons_at_one_start(
    speech: Path, tmp_path: Path
) -> None:
    spoil(speech)
    with pytest.raises(DataError) as caught:
        write(speech, tmp_path / "out")
    title, *lines = str(caught.value).splitlines()
    assert title == "5 records cannot be stored (on_error=skip leaves such records out):"
    for number, reason in zip(BAD, REASONS, strict=True):
        [line] = [line for line in lines if str(wav(speech, number)) in line]
        assert line.startswith(f"record '{number % 2}-1-{number}': ") and reason in line
    assert len(lines) == 5 and not (tmp_path / "out" / "manifest.json").exists()


def test_at_most_fifty_bad_records_are_shown_and_the_rest_counted(
    speech: Path, tmp_path: Path
) -> None:
    for number in range(1000, 1048):
        path = speech / "train" / "0" / "1" / f"0-1-{number}.wav"
        path.write_bytes(b"")
    spoil(speech)
    with pytest.raises(DataError) as caught:
        write(speech, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 50 + 1 and lines[0].startswith("53 ") and lines[-1] == "and 3 more"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("begun", ["never", "with fail", "with skip"])
def test_skip_leaves_bad_records_out_and_changes_no_other_shard(
    begun: str, speech: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    write(speech, whole)
    for number in (1, 5):  # both of shard 1, whose third record stays
        wav(speech, number).write_text("no audio")
    if begun == "with fail":
        with pytest.raises(DataError, match="2 records cannot be stored"):
            write(speech, output)
    if begun == "with skip":
        write(speech, output, on_error="skip")
        (output / "manifest.json").unlink()
    written = write(speech, output, on_error="skip")
    assert written.num_kept == {"never": 0, "with fail": 1, "with skip": 2}[begun]
    assert sorted(stored(output)) == ["0-1-0", "0-1-2", "0-1-4", "1-1-3"]
    assert num_skipped(str(output)) == 2 and shards.verify(output) == []
    lines = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [str(wav(speech, n)) in line for n, line in zip((1, 5), lines, strict=True)] == [
        True
    ] * 2
    first = "librispeech-train-000000.tar"
    assert contents(output)[first] == contents(whole)[first]
    assert "on_error: skip" in (output / "source.yaml").read_text()
    fresh = tmp_path / "fresh"
    write(speech, fresh, on_error="skip")
    assert contents(fresh) == contents(output)
    with pytest.raises(ConfigError, match="on_error was skip, is None"):
        write(speech, output)


def test_a_shard_of_bad_records_alone_is_left_out_and_a_corpus_of_them_is_an_error(
    speech: Path, tmp_path: Path
) -> None:
    for number in (1, 3, 5):
        wav(speech, number).write_text("no audio")
    manifest = write(speech, tmp_path / "out", on_error="skip").manifest
    assert [shard.name for shard in manifest.shards] == ["librispeech-train-000000.tar"]
    assert write(speech, tmp_path / "out", on_error="skip").manifest == manifest
    for number in (0, 2, 4):
        wav(speech, number).write_text("no audio")
    with pytest.raises(DataError, match="6 records cannot be stored"):
        write(speech, tmp_path / "none", on_error="skip")


def test_a_repaired_file_is_taken_in_by_the_same_command_while_the_set_is_not_finished(
    speech: Path, tmp_path: Path
) -> None:
    wav(speech, 1).write_text("no audio")
    output = tmp_path / "out"
    write(speech, output, on_error="skip")
    (output / "manifest.json").unlink()
    record(wav(speech, 1), voice(1))
    assert write(speech, output, on_error="skip").num_kept == 1
    assert len(stored(output)) == 6 and num_skipped(str(output)) == 0


def test_ids_that_cannot_be_stored_are_listed_before_any_audio_is_read(
    speech: Path, tmp_path: Path
) -> None:
    for number, name in ((1, "1.1"), (3, "x" * 99)):
        wav(speech, number).rename(wav(speech, number).with_name(f"{name}.wav"))
    wav(speech, 5).write_text("no audio")
    with pytest.raises(DataError, match=r"(?s)2 records .*'1\.1'.*too long"):
        write(speech, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write(speech, tmp_path / "out", on_error="skip")
    assert sorted(stored(tmp_path / "out")) == ["0-1-0", "0-1-2", "0-1-4"]
    assert num_skipped(str(tmp_path / "out")) == 3


def test_storage_that_fails_ends_the_write_and_leaves_nothing_out(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise OSError("the network is gone")

    monkeypatch.setattr("sepdist.audio.load_channel", away)
    with pytest.raises(OSError, match="the network is gone"):
        write(speech, tmp_path / "out", on_error="skip")


def test_mixtures_alone_with_a_bad_source_are_left_out_too(speech: Path, tmp_path: Path) -> None:
    wav(speech, 3).write_text("no audio")
    corpus = mixtures(speech, [1.0, 1.0, 1.0])
    settings = {"corpus": corpus, "mixtures_only": True, "on_error": "skip"}
    manifest = write(speech, tmp_path / "out", **settings).manifest
    assert manifest.num_samples == 2 and num_skipped(str(tmp_path / "out")) == 1


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_tasks_leave_out_what_one_process_leaves_out(speech: Path, tmp_path: Path) -> None:
    spoil(speech)
    write(speech, tmp_path / "one", on_error="skip")
    write(speech, tmp_path / "ray", on_error="skip", num_workers=2)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def test_utterances_too_short_for_a_loudness_are_counted(speech: Path, tmp_path: Path) -> None:
    for number, seconds in ((0, 0.3), (1, 0.4), (2, 0.399)):
        record(wav(speech, number), voice(number, seconds))
    manifest = write(speech, tmp_path / "out").manifest
    assert num_short(str(tmp_path / "out"), manifest) == 2
    pairs = write(speech, tmp_path / "pairs", corpus=mixtures(speech, [1.0])).manifest
    assert num_short(str(tmp_path / "pairs"), pairs) == 0  # no data set of utterances


def test_another_value_of_on_error_is_refused(speech: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_error=ignore: give fail or skip"):
        write(speech, tmp_path / "out", on_error="ignore")


def test_files_whose_names_are_not_utf_8_are_stored_or_listed(tmp_path: Path) -> None:
    good, bad = (tmp_path / "all" / os.fsdecode(one) for one in (b"good-\xff.wav", b"bad-\xff.wav"))
    record(tmp_path / "all" / "x.wav", voice(1)).rename(good)
    bad.write_bytes(b"RIFFjunk")
    table = {"_target_": "sepdist.corpora.tables.Table", "layout": "folder", "root": str(tmp_path)}
    output, settings = tmp_path / "out", {"corpus": table, "split": "all", "on_error": "skip"}
    for num_kept in (0, 1):
        assert write(tmp_path, output, **settings).num_kept == num_kept
        assert shards.verify(output) == [] and num_skipped(str(output)) == 1
        (output / "manifest.json").unlink()


@pytest.mark.parametrize("name", ["../up", ".hidden", "back\\slash", "a/b"])
def test_a_corpus_whose_name_cannot_be_that_of_a_shard_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    record(tmp_path / "all" / "a.wav", voice(1))
    table = {"_target_": "sepdist.corpora.tables.Table", "layout": "folder", "root": str(tmp_path)}
    with pytest.raises(ConfigError, match="cannot name a shard"):
        write(tmp_path, tmp_path / "out", corpus=table | {"name": name}, split="all")
    assert sorted(os.listdir(tmp_path)) == ["all"]
