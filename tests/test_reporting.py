"""metrics.jsonl is the truth, TensorBoard agrees with it, and a resume repeats no row."""

import contextlib
import json
import resource
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sepdist import plotting, reporting, storage
from sepdist.plotting import decibel_spectrogram, to_png
from sepdist.reporting import Reporter, ReportingError, for_listening, read_metrics

RATE = 8000


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def board(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "audio": 0}
    accumulator = EventAccumulator(str(folder), size_guidance=everything)
    accumulator.Reload()
    return accumulator


def next_second() -> None:
    """Wait: TensorBoard orders event files by name, which begins with the second of creation."""
    time.sleep(1.001 - time.time() % 1)


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(folder).Scalars(name)]


def test_a_row_has_step_seconds_and_the_metrics_by_name(tmp_path: Path) -> None:
    reporter = Reporter(str(tmp_path), "run")
    reporter.log(20, {"loss/total": 1.5, "speed/steps_per_second": 4})
    reporter.log(40, {"loss/total": float("nan")})
    reporter.close()
    first, second = (
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert first.pop("seconds") <= second["seconds"]
    assert first == {"step": 20, "loss/total": 1.5, "speed/steps_per_second": 4.0}
    assert second["loss/total"] is None
    assert scalars(tmp_path / "tensorboard" / "run", "1 main/1 loss, train")[0] == (20, 1.5)


def test_a_row_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    reporter = Reporter(str(tmp_path), "run")
    reporter.log(1, {"loss/total": 2.0})
    assert read_metrics(str(tmp_path))[0]["loss/total"] == 2.0
    reporter.close()


def test_a_resumed_run_has_every_step_once_in_both_views(tmp_path: Path) -> None:
    reporter = Reporter(str(tmp_path), "run")
    for step in range(1, 9):
        reporter.log(step, {"loss/total": 100.0 + step})
    reporter.flush()  # then the run is killed; its newest checkpoint is of step 5
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "sec')
    seconds_before = read_metrics(str(tmp_path))[4]["seconds"]
    next_second()
    again = Reporter(str(tmp_path), "run", resume_step=5)
    for step in range(6, 11):
        again.log(step, {"loss/total": 200.0 + step})
    again.close()
    expected = [(step, (100.0 if step <= 5 else 200.0) + step) for step in range(1, 11)]
    rows = read_metrics(str(tmp_path))
    assert [(row["step"], row["loss/total"]) for row in rows] == expected
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert rows[5]["seconds"] >= seconds_before
    assert scalars(tmp_path / "tensorboard" / "run", "1 main/1 loss, train") == expected
    assert len(list((tmp_path / "tensorboard" / "run").iterdir())) == 2


def test_seconds_go_on_from_the_attempt_before(tmp_path: Path) -> None:
    rows = "".join(f'{{"step": {step}, "seconds": {step}00.0}}\n' for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows)
    reporter = Reporter(str(tmp_path), "run", resume_step=2)
    reporter.log(3, {"loss/total": 1.0})
    reporter.close()
    assert 200.0 <= read_metrics(str(tmp_path))[-1]["seconds"] < 210.0


def test_a_damaged_line_inside_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "seconds": 0.1}\n{"step": 2, "sec\n{"step": 3, "seconds": 0.3}\n'
    )
    with pytest.raises(ReportingError, match=r"metrics\.jsonl: line 2"):
        Reporter(str(tmp_path), "run", resume_step=3)


def test_sound_is_brought_to_a_listening_level_without_clipping(tmp_path: Path) -> None:
    for level in (1e-4, 0.3, 50.0):
        wave = for_listening(level * tone(440))
        assert np.abs(wave).max() == pytest.approx(0.9)
        assert np.corrcoef(wave, tone(440))[0, 1] == pytest.approx(1.0)
    assert not for_listening(np.zeros(100)).any()
    with pytest.raises(ReportingError, match=r"estimate 1: 1 of 3 samples"):
        for_listening(np.array([0.0, np.nan, 1.0]), "estimate 1")
    reporter = Reporter(str(tmp_path), "run")
    reporter.audio(7, "listen_0/mixture", 50 * tone(440), RATE)
    reporter.close()
    [event] = board(tmp_path / "tensorboard" / "run").Audio("listen_0/mixture")
    assert (event.step, event.sample_rate, event.length_frames) == (7, RATE, RATE)
    assert event.encoded_audio_string[:4] == b"RIFF"


def test_a_spectrogram_shows_a_tone_at_its_frequency_and_silence_at_the_floor() -> None:
    decibels = decibel_spectrogram(tone(1000), RATE)
    assert decibels.max() == 0
    middle = decibels[:, decibels.shape[1] // 2]
    bin_hertz = RATE / 2 / (len(middle) - 1)
    assert np.argmax(middle) * bin_hertz == pytest.approx(1000, abs=bin_hertz)
    assert (decibel_spectrogram(np.zeros(RATE), RATE) == -70).all()
    assert (decibel_spectrogram(tone(100, 0.001), RATE) >= -70).all()


def test_a_picture_is_drawn_outside_the_main_thread(tmp_path: Path) -> None:
    waves = {"mixture": tone(300) + tone(1500), "source 1": tone(300), "source 2": tone(1500)}
    waves |= {"estimate 1": 9 * tone(300), "estimate 2": np.zeros(RATE, dtype=np.float32)}
    reporter = Reporter(str(tmp_path), "run")
    thread = threading.Thread(target=reporter.spectrogram, args=(3, "listen_0", waves, RATE))
    thread.start()
    thread.join()
    reporter.close()
    [event] = board(tmp_path / "tensorboard" / "run").Images("listen_0/spectrogram")
    assert event.step == 3 and event.width > 600 and event.height > 300


def texts(figure: plotting.Figure) -> list[float]:
    """The sizes in points of all texts that a figure shows."""
    return [one.get_fontsize() for one in figure.findobj(Text) if one.get_text().strip()]


def test_the_text_of_a_picture_can_be_read_in_a_card_340_pixels_wide() -> None:
    names = ["source 1", "source 2", "estimate 1: 7.9 dB", "estimate 2: -12.3 dB"]
    figure = plotting.spectrogram_figure({name: tone(500) for name in names}, RATE)
    to_png(figure)
    pixels_per_point = 340 / figure.get_size_inches()[0] / 72
    assert min(texts(figure)) * pixels_per_point >= 9.5


def test_loss_improvement_and_label_switches_are_the_first_group(tmp_path: Path) -> None:
    """TensorBoard sorts groups by name; metrics.jsonl keeps its own."""
    reporter = Reporter(str(tmp_path), "run/a")
    names = ["data/damaged_samples", "goodput/share", "loss/total", "optim/lr", "switching/rate"]
    names += ["train/si_snr", "train/si_snri", "validation/loss", "validation/si_snri"]
    reporter.log(1, {name: float(number) for number, name in enumerate(names)})
    reporter.describe({"optim.lr": 0.1, "model._target_": "m"}, "| command | x |")
    reporter.close()
    read = board(tmp_path / "tensorboard" / "run-a")
    assert sorted(read.Tags()["scalars"])[:5] == [
        "1 main/1 loss, train",
        "1 main/2 loss, val",
        "1 main/3 SI-SNRi, train",
        "1 main/4 SI-SNRi, val",
        "1 main/5 label switches",
    ]
    assert read.Scalars("1 main/5 label switches")[0].value == names.index("switching/rate")
    assert set(names) < read_metrics(str(tmp_path))[0].keys()
    assert read.Tags()["tensors"] == ["about/text_summary"]
    hparams = read.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert hparams.plugin_name == "hparams" and b"optim.lr" in hparams.content


def test_panels_stand_in_columns_by_kind_on_one_colour_scale() -> None:
    names = ["mixture", "source 1", "source 2", "estimate 1", "estimate 2"]
    figure = plotting.spectrogram_figure({name: tone(500) for name in names}, RATE)
    to_png(figure)
    shown = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(sorted(shown)) == sorted(names)
    assert {axis.images[0].get_clim() for axis in shown.values()} == {(-70.0, 0.0)}
    place = {name: axis.get_position() for name, axis in shown.items()}
    assert place["source 2"].y0 == pytest.approx(place["estimate 2"].y0)
    assert place["source 1"].x0 == pytest.approx(place["source 2"].x0)
    assert shown["mixture"].get_xlim() == (0.0, 1.0) and shown["mixture"].get_ylim() == (0.0, 4.0)


class Objects:
    """Objects in memory instead of s3://, and a list of all puts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.fail = False
        monkeypatch.setattr(storage, "put_bytes", self.put_bytes)
        monkeypatch.setattr(storage, "put_file", self.put_file)
        monkeypatch.setattr(storage, "read_bytes", self.objects.__getitem__)
        monkeypatch.setattr(storage, "exists", self.objects.__contains__)
        monkeypatch.setattr(storage, "list_names", lambda url: [])

    def put_bytes(self, url: str | Path, data: bytes) -> None:
        if self.fail:
            raise OSError("the store is gone")
        self.objects[url] = data
        self.puts.append(url)

    def put_file(self, local: Path, url: str) -> None:
        self.put_bytes(url, local.read_bytes())

    def download(self, prefix: str, folder: Path) -> Path:
        folder.mkdir()
        for url, data in self.objects.items():
            if url.startswith(prefix):
                (folder / url.removeprefix(prefix).lstrip("/")).write_bytes(data)
        return folder


def test_on_object_storage_whole_files_are_put_and_a_resume_goes_on_from_them(
    tmp_path: Path, bucket: str
) -> None:
    run_dir = f"s3://{bucket}/run"
    reporter = Reporter(run_dir, "run")
    scratch = Path(reporter._folder)
    for step in range(1, 7):
        reporter.log(step, {"loss/total": 100.0 + step})
        reporter.note("note.json", f"after {step}")
        if step == 4:
            reporter.flush()
    reporter.close()
    assert not scratch.exists()
    assert storage.list_names(run_dir) == ["metrics.jsonl", "note.json", "tensorboard"]
    assert storage.read_bytes(f"{run_dir}/note.json") == b"after 6"
    next_second()
    again = Reporter(run_dir, "run", resume_step=4)
    assert len(storage.read_bytes(f"{run_dir}/metrics.jsonl").splitlines()) == 4
    for step in range(5, 9):
        again.log(step, {"loss/total": 200.0 + step})
    again.close()
    expected = [(step, (100.0 if step <= 4 else 200.0) + step) for step in range(1, 9)]
    assert [(row["step"], row["loss/total"]) for row in read_metrics(run_dir)] == expected
    names = storage.list_names(f"{run_dir}/tensorboard/run")
    assert len(names) == 2
    for name in names:
        storage.fetch_file(f"{run_dir}/tensorboard/run/{name}", tmp_path / "board" / name)
    assert scalars(tmp_path / "board", "1 main/1 loss, train") == expected


def test_a_grown_event_file_on_object_storage_is_followed_by_another_and_not_put_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "EVENT_FILE_BYTES", 10_000)
    objects = Objects(monkeypatch)
    reporter = Reporter("s3://b/run", "run", resume_step=0)
    for step in range(1, 4):
        reporter.audio(step, "listen_0/mixture", tone(440), RATE)
        reporter.log(step, {"loss/total": float(step)})
        reporter.flush()
        next_second()
    reporter.close()
    events = [url for url in objects.puts if "tensorboard" in url]
    assert len(set(events)) == 3 and len(events) == 3
    folder = objects.download("s3://b/run/tensorboard/run", tmp_path / "board")
    assert scalars(folder, "1 main/1 loss, train") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [event.step for event in board(folder).Audio("listen_0/mixture")] == [1, 2, 3]


def settled(reporter: Reporter) -> None:
    """Wait for the upload that a flush starts."""
    if upload := reporter.flush():
        futures.wait([upload])


def test_a_store_that_is_away_holds_nothing_up_and_has_every_row_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = Objects(monkeypatch)
    reporter = Reporter("s3://b/run", "run")
    objects.fail = True
    for step in range(1, 5):
        reporter.log(step, {"loss/total": float(step)})
        settled(reporter)
    assert objects.puts == []
    objects.fail = False
    settled(reporter)
    assert [row["step"] for row in read_metrics("s3://b/run")] == [1, 2, 3, 4]
    assert sum("tensorboard" in url for url in objects.puts) == 1, "forgotten by a failed upload"
    reporter.close()


def test_a_store_that_is_away_for_too_long_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = Objects(monkeypatch)
    reporter = Reporter("s3://b/run", "run", patience_seconds=0.0)
    reporter.log(1, {"loss/total": 1.0})
    objects.fail = True
    settled(reporter)
    with pytest.raises(storage.StorageError, match=r"gone \(metrics not written .*run ends"):
        reporter.flush()
    objects.fail = False
    reporter.close()
    assert [row["step"] for row in read_metrics("s3://b/run")] == [1]


def test_rows_between_failed_uploads_do_not_reset_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = Objects(monkeypatch)
    reporter = Reporter("s3://b/run", "run")
    objects.fail = True
    reporter.log(1, {"loss/total": 1.0})
    settled(reporter)
    reporter.log(2, {"loss/total": 2.0})
    since = reporter._patience.since
    assert since is not None
    settled(reporter)
    reporter.log(3, {"loss/total": 3.0})
    assert reporter._patience.since == since
    objects.fail = False
    settled(reporter)
    reporter.log(4, {"loss/total": 4.0})
    assert reporter._patience.since is None
    reporter.close()


def test_uploads_that_wait_for_each_other_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(monkeypatch)
    reporter = Reporter("s3://b/run", "run")
    goes_on = threading.Event()
    monkeypatch.setattr(storage, "put_file", lambda *a: goes_on.wait(10) and objects.put_file(*a))
    uploads = []
    for step in range(1, 20):
        reporter.log(step, {"loss/total": float(step)})
        uploads.append(reporter.flush())
    assert len({id(one) for one in uploads}) <= 2
    goes_on.set()
    reporter.close()
    assert len(read_metrics("s3://b/run")) == 19


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Have the kernel refuse to let files grow, in the middle of a write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_holds_nothing_up_and_no_row_is_lost_torn_or_repeated(tmp_path: Path) -> None:
    reporter = Reporter(str(tmp_path), "run")
    reporter.log(1, {"loss/total": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with files_of_at_most(size + 20):
        for step in range(2, 6):
            reporter.log(step, {"loss/total": float(step)})
            reporter.note("note.json", f"a note of step {step}, longer than the disk has room for")
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        assert not (tmp_path / "note.json").exists()
    reporter.log(6, {"loss/total": 6.0})
    reporter.close()
    assert [row["step"] for row in read_metrics(str(tmp_path))] == [1, 2, 3, 4, 5, 6]
    expected = [(step, float(step)) for step in range(1, 7)]
    assert scalars(tmp_path / "tensorboard" / "run", "1 main/1 loss, train") == expected
    assert "step 5" in (tmp_path / "note.json").read_text()


def test_a_disk_that_stays_full_is_one_clear_error_and_pictures_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "MAX_UNWRITTEN_BYTES", 5000)
    reporter = Reporter(str(tmp_path), "run", patience_seconds=100.0)
    with files_of_at_most(10):
        for step in range(1, 9):
            reporter.audio(step, "listen_0/mixture", tone(440), RATE)
        assert sum(map(len, reporter._unwritten.values())) < 25_000
        reporter._patience.seconds = 0.0
        with pytest.raises(storage.StorageError, match=r"metrics not written"):
            reporter.log(9, {"loss/total": 1.0})
    reporter.close()
    assert [row["step"] for row in read_metrics(str(tmp_path))] == [9]


def test_metrics_without_a_group_are_a_mistake_of_ours(tmp_path: Path) -> None:
    reporter = Reporter(str(tmp_path), "run")
    with pytest.raises(AssertionError, match="group/name"):
        reporter.log(1, {"loss": 1.0})
    reporter.close()


@pytest.mark.parametrize("remote", [False, True])
def test_a_growing_file_is_read_from_where_it_was_read_to_by_whole_lines(
    remote: bool, tmp_path: Path, bucket: str
) -> None:
    url = f"s3://{bucket}/rows" if remote else str(tmp_path / "rows")
    storage.put_bytes(url, b'{"a": 1}\n{"b"')
    first = reporting.read_from(url, 0)
    assert first == b'{"a": 1}\n'
    storage.put_bytes(url, b'{"a": 1}\n{"b": 2}\n')
    assert reporting.read_from(url, len(first)) == b'{"b": 2}\n'
    assert reporting.read_from(url, 2 * len(first)) == b""
    storage.put_bytes(url, b'{"a": 1}\n')  # a restart has dropped the later rows
    with pytest.raises(ValueError, match="it had 18"):
        reporting.read_from(url, 18)
