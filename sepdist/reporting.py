"""Write a run's metrics, audio and spectrograms; read its metrics back; CSV files and versions.

    run_dir/metrics.jsonl       one JSON object per `log` call: step, seconds, metrics by name
    run_dir/tensorboard/NAME/   event files of the same numbers, with audio and spectrograms

metrics.jsonl is the truth, TensorBoard a view of it: `tensorboard --logdir run_dir/tensorboard`.
Names are group/name, with groups loss, train, speed, optim, validation. A run_dir on s3:// is
written in a local scratch folder and put there as whole files: objects cannot be appended to.
"""

import contextlib
import csv
import io
import json
import logging
import os
import platform
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sepdist import __version__, storage
from sepdist.patience import Patience

logger = logging.getLogger(__name__)

LISTENING_PEAK = 0.9
# TensorBoard sorts groups and cards by name and opens two groups: this one, and that to listen to.
SHOWN_AS = {
    "loss/total": "1 main/1 loss, train",
    "validation/loss": "1 main/2 loss, val",
    "train/si_snri": "1 main/3 SI-SNRi, train",
    "validation/si_snri": "1 main/4 SI-SNRi, val",
    "switching/rate": "1 main/5 label switches",
}
LISTEN = "2 listen"  # to an utterance, whose id follows
UPLOAD_SECONDS = 30.0  # between two uploads of metrics.jsonl without a flush
MAX_UNWRITTEN_BYTES = 64_000_000  # kept for a full disk, besides rows of metrics.jsonl
EVENT_FILE_BYTES = 16_000_000  # on s3:// a flush puts the last event file again, up to this size


class ReportingError(ValueError):
    """A metrics.jsonl that cannot be continued, or a wave that cannot be played."""


class Reporter:
    """Writes the metrics, audio and spectrograms of one attempt of a run, on the main rank only.

    A resume at `resume_step` drops the rows of later steps, in TensorBoard too, because the run is
    about to repeat them; `kept` holds the other rows.

    Nothing here waits for storage but the start and `close`: what cannot be written yet, because
    the disk is full or s3:// is away, is kept and tried again, until that has failed for
    `patience_seconds`. Then the next call raises StorageError.
    """

    def __init__(
        self, run_dir: str, name: str, *, resume_step: int = 0, patience_seconds: float = 600.0
    ) -> None:
        self._run_dir = str(run_dir)
        remote = storage.is_remote(self._run_dir)
        self._scratch = tempfile.TemporaryDirectory(prefix="sepdist-report-") if remote else None
        self._pool = ThreadPoolExecutor(1, "report") if remote else None  # for uploads
        self._folder = Path(self._scratch.name if self._scratch else self._run_dir)
        rows = read_metrics(self._run_dir)
        self.kept = [row for row in rows if row["step"] <= resume_step]
        self._seconds_before = max((row["seconds"] for row in self.kept), default=0.0)
        text = "".join(to_json(row) + "\n" for row in self.kept).encode()
        self._metrics = self._folder / "metrics.jsonl"
        if rows != self.kept or not remote:
            storage.put_bytes(storage.join(self._run_dir, "metrics.jsonl"), text)
        if remote:
            self._metrics.write_bytes(text)
        self._board = self._folder / "tensorboard" / name.replace("/", "-").strip(".")
        self._board.mkdir(parents=True, exist_ok=True)
        self._events: Path | None = None  # the event file that grows
        self._purge_step = resume_step + 1
        self._unwritten: dict[Path, bytes] = {}  # what files lack because the disk is full
        self._notes: dict[str, str] = {}  # not yet written
        self._patience = Patience(patience_seconds, "metrics")
        self._uploaded: dict[Path, tuple[int, int]] = {}  # path -> time of change, size
        self._queued: Future[None] | None = None  # the last upload
        self._with_events = False  # whether the next one includes event files
        self._began = self._last_upload = self._upload_began = time.monotonic()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row: `metrics` by "group/name", and the seconds of all attempts of the run."""
        from torch.utils.tensorboard import summary  # late: only the main rank needs it

        values = {name: float(value) for name, value in metrics.items()}
        wrong = [name for name in values if "/" not in name]
        assert not wrong, f"metrics are named group/name, not {wrong}"
        seconds = round(self._seconds_before + time.monotonic() - self._began, 3)
        row = {"step": int(step), "seconds": seconds} | values
        self._add(self._metrics, (to_json(row) + "\n").encode())
        shown = {SHOWN_AS.get(name, name): value for name, value in values.items()}
        self._add_events(step, [summary.scalar(*one) for one in shown.items()])
        self._write()
        if self._pool and time.monotonic() - self._last_upload > UPLOAD_SECONDS:
            self._start_upload()

    def note(self, name: str, text: str) -> None:
        """Replace the small file `name` in run_dir as a whole; on s3:// with the next upload."""
        self._notes[name] = text
        self._write()

    def describe(self, settings: Mapping[str, Any], text: str) -> None:
        """Write the settings of the run (hparams) and a text about it, in Markdown."""
        from torch.utils.tensorboard import summary

        # Without the list of them all, which TensorBoard would take for that of every run.
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()}
        _, start, _ = summary.hparams(plain, {})
        self._add_events(1, [start, summary.text("about", text)])

    def audio(self, step: int, name: str, wave_T: np.ndarray, rate: int) -> None:
        """Write a wave at peak 0.9, because SI-SNR leaves the level of an estimate open."""
        import torch
        from torch.utils.tensorboard import summary

        wave = torch.from_numpy(for_listening(wave_T, name)[None])
        self._add_events(step, [summary.audio(name, wave, rate)])
        self._write()

    def spectrogram(self, step: int, name: str, waves: Mapping[str, np.ndarray], rate: int) -> None:
        """Write the picture of `spectrogram_figure`."""
        from torch.utils.tensorboard import summary
        from torch.utils.tensorboard._utils import figure_to_image

        from sepdist.plotting import spectrogram_figure

        image = figure_to_image(spectrogram_figure(waves, rate), close=False)
        self._add_events(step, [summary.image(f"{name}/spectrogram", image, dataformats="CHW")])
        self._write()

    def flush(self) -> Future[None] | None:
        """Have all that was logged put in storage; returns its upload, None on a local disk."""
        self._write()
        if self._pool is None:
            return None
        self._with_events = True
        self._start_upload()
        if self._events and self._events.stat().st_size > EVENT_FILE_BYTES:
            self._events = None  # the next event opens another file
        return self._queued

    def close(self) -> None:
        """Write what is left, for which it waits, and end; nothing can be logged afterwards."""
        try:
            self._write()
            while self._unwritten or self._notes:
                time.sleep(1.0)
                self._write()
            if upload := self.flush():
                upload.result()
        finally:
            if self._pool and self._scratch:
                self._pool.shutdown()
                self._scratch.cleanup()

    def _add_events(self, step: int, summaries: Sequence[Any]) -> None:
        """Append TensorBoard events: an optional file header, then one per summary."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        now, events = time.time(), [Event(step=step, summary=one) for one in summaries]
        if self._events is None:
            name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{uuid.uuid4().hex}"
            self._events = self._board / name
            first, self._purge_step = self._purge_step, 0
            if first:  # a start with a step has TensorBoard forget that step and later ones
                start = SessionLog(status=SessionLog.START)
                events.insert(0, Event(step=first, session_log=start))
            events.insert(0, Event(step=first, file_version="brain.Event:2"))
        stream = io.BytesIO()
        for event in events:
            event.wall_time = now
            RecordWriter(stream).write(event.SerializeToString())
        self._add(self._events, stream.getvalue())

    def _add(self, path: Path, data: bytes) -> None:
        held = sum(map(len, self._unwritten.values()))
        if path == self._metrics or held < MAX_UNWRITTEN_BYTES:
            self._unwritten[path] = self._unwritten.get(path, b"") + data
        else:  # a view of metrics.jsonl, and pictures
            logger.warning("%s: %d bytes are left out, the disk is full", path, len(data))

    def _write(self) -> None:
        """Append and replace what the files lack, and look after the last upload."""
        began = time.monotonic()
        try:
            for path in list(self._unwritten):
                _append(path, self._unwritten[path])
                del self._unwritten[path]
            for name in list(self._notes):
                with storage.patient(0):
                    storage.put_bytes(self._folder / name, self._notes[name].encode())
                del self._notes[name]
            written = self._pool is None
            if self._queued and self._queued.done():
                queued, self._queued, began = self._queued, None, self._upload_began
                queued.result()
                written = True
            if written:
                self._patience.succeeded()
        except OSError as error:
            self._patience.failed(error, began)

    def _start_upload(self) -> None:
        """Put changed files in the background, unless an upload that does so waits already."""
        assert self._pool is not None
        self._last_upload = time.monotonic()
        if self._queued is None or self._queued.running() or self._queued.done():
            self._queued = self._pool.submit(self._upload)

    def _upload(self) -> None:
        """Put changed files whole and as they are now: they go on growing."""
        self._upload_began = time.monotonic()
        with_events, self._with_events = self._with_events, False
        notes = [one for one in self._folder.iterdir() if one.is_file() and one != self._metrics]
        events = sorted(self._board.glob("*tfevents*")) if with_events else []
        for path in (self._metrics, *events, *notes):
            state = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._uploaded.get(path) != state:
                url = storage.join(self._run_dir, *path.relative_to(self._folder).parts)
                try:
                    storage.put_file(path, url)
                except OSError:
                    self._with_events |= with_events
                    raise
                self._uploaded[path] = state


def _append(path: Path, data: bytes) -> None:
    """Append to a file all of `data`, or nothing where that fails."""
    with path.open("ab", buffering=0) as file:
        size, left = os.fstat(file.fileno()).st_size, memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def read_metrics(run_dir: str) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, in the order they were written; [] where there is none.

    A last line that was cut short by a kill is left out; ReportingError if another is damaged.
    """
    url = storage.join(run_dir, "metrics.jsonl")
    if not storage.exists(url):
        return []
    *lines, _ = storage.read_bytes(url).split(b"\n")  # after the last newline: empty or torn
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"], row["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            wrong = f"{url}: line {number} is damaged"
            raise ReportingError(f"{wrong}; repair or move the file") from error
        rows.append(row)
    return rows


def read_from(url: str, place: int) -> bytes:
    """The whole lines of a growing file from byte `place` on; ValueError if it is shorter."""
    if storage.is_remote(url):
        data = storage.read_bytes(url)
        size, data = len(data), data[place:]
    else:
        with open(url, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(place)
            data = file.read()
    if size < place:
        raise ValueError(f"{url}: {size} bytes, it had {place}")
    return data[: data.rfind(b"\n") + 1]


def for_listening(wave_T: np.ndarray, name: str = "wave") -> np.ndarray:
    """float32 [T] with its peak at 0.9, or silence; ReportingError for NaN or infinity."""
    wave_T = np.asarray(wave_T, dtype=np.float32)
    assert wave_T.ndim == 1, f"{name}: a wave is [T], not {wave_T.shape}"
    if num_wrong := np.count_nonzero(~np.isfinite(wave_T)):
        raise ReportingError(f"{name}: {num_wrong} of {wave_T.size} samples are not finite")
    peak = float(np.abs(wave_T).max(initial=0.0))
    return wave_T * np.float32(LISTENING_PEAK / peak) if peak > 0 else wave_T


def to_json(value: Any, mark: Callable[[float], Any] = lambda number: None, **options: Any) -> str:
    """JSON text of plain values; numbers that are not finite, which JSON lacks, become `mark`'s."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        plain = json.loads(json.dumps(value), parse_constant=lambda name: mark(float(name)))
        return json.dumps(plain, allow_nan=False, **options)


def versions(*packages: str) -> dict[str, str]:
    """The versions of those of `packages` that are installed, of sepdist and of Python."""
    found = {"sepdist": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file: floats with four decimals, the values of a tuple separated by blanks."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue().encode()


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_cell, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)
