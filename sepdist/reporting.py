"""Write a run's metrics, audio and spectrograms; read its metrics back; CSV files and versions.

    run_dir/metrics.jsonl   one JSON object per `log` call: step, seconds, and the metrics by name
    run_dir/tensorboard/    event files with the same numbers, and with audio and spectrograms

metrics.jsonl is the truth, TensorBoard a view of it: `tensorboard --logdir run_dir/tensorboard`.
Names are group/name, with groups loss, train, si_snri, speed, optim, validation. A run_dir on s3://
is written in a local scratch folder and put there as whole files: objects cannot be appended to.
"""

import contextlib
import csv
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sepdist import __version__, storage

LISTENING_PEAK = 0.9
UPLOAD_SECONDS = 30.0  # between two uploads of metrics.jsonl without a flush
EVENT_FILE_BYTES = 16_000_000  # on s3:// a flush puts the last event file again, up to this size


class ReportingError(ValueError):
    """A metrics.jsonl that cannot be continued, or a wave that cannot be played."""


class Reporter:
    """Writes the metrics, audio and spectrograms of one attempt of a run, on the main rank only.

    A resume at `resume_step` drops the rows of later steps, in TensorBoard too, because the run is
    about to repeat them; `kept` holds the other rows.
    """

    def __init__(self, run_dir: str, *, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: only the main rank needs it

        self._run_dir = str(run_dir)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._pool: ThreadPoolExecutor | None = None  # uploads, where run_dir is on s3://
        if storage.is_remote(self._run_dir):
            self._scratch = tempfile.TemporaryDirectory(prefix="sepdist-report-")
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._folder = Path(self._scratch.name if self._scratch else self._run_dir)
        rows = read_metrics(self._run_dir)
        self.kept = [row for row in rows if row["step"] <= resume_step]
        self._seconds_before = max((row["seconds"] for row in self.kept), default=0.0)
        text = "".join(to_json(row) + "\n" for row in self.kept)
        if rows != self.kept or not self._scratch:
            storage.put_bytes(storage.join(self._run_dir, "metrics.jsonl"), text.encode())
        self._metrics = self._folder / "metrics.jsonl"
        if self._scratch:
            self._metrics.write_text(text)
        self._file = self._metrics.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=resume_step + 1)
        self._uploaded: dict[Path, tuple[int, int]] = {}  # path -> time of change, size
        self._pending: Future[None] | None = None
        self._began = self._last_upload = time.monotonic()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row: `metrics` by "group/name", and the seconds of all attempts of the run."""
        values = {name: float(value) for name, value in metrics.items()}
        wrong = [name for name in values if "/" not in name]
        assert not wrong, f"metrics are named group/name, not {wrong}"
        seconds = round(self._seconds_before + time.monotonic() - self._began, 3)
        row = {"step": int(step), "seconds": seconds} | values
        self._file.write(to_json(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._pool and time.monotonic() - self._last_upload > UPLOAD_SECONDS:
            self._upload()

    def note(self, name: str, text: str) -> None:
        """Replace the small file `name` in run_dir as a whole; on s3:// with the next upload."""
        storage.put_bytes(self._folder / name, text.encode())

    def audio(self, step: int, name: str, wave_T: np.ndarray, rate: int) -> None:
        """Write a wave at peak 0.9, because SI-SNR leaves the level of an estimate open."""
        self._writer.add_audio(name, for_listening(wave_T, name)[None], step, sample_rate=rate)

    def spectrogram(self, step: int, name: str, waves: Mapping[str, np.ndarray], rate: int) -> None:
        """Write the picture of `spectrogram_figure`."""
        from sepdist.plotting import spectrogram_figure

        figure = spectrogram_figure(waves, rate)
        self._writer.add_figure(f"{name}/spectrogram", figure, step, close=False)

    def flush(self) -> None:
        """Put all on disk or on its way to s3://; OSError if an earlier upload failed."""
        self._writer.flush()
        if self._pool and self._upload_all() > EVENT_FILE_BYTES:
            self._writer.close()  # the next event opens another file

    def close(self) -> None:
        """Write what is left and end; nothing can be logged afterwards."""
        self._writer.close()
        self._file.close()
        if self._pool and self._scratch:
            try:
                self._upload_all()
                self._wait()
            finally:
                self._pool.shutdown()
                self._scratch.cleanup()

    def _upload_all(self) -> int:
        """Upload the event files too; returns the size of the newest."""
        events = (self._folder / "tensorboard").iterdir()
        files = sorted(events, key=lambda path: path.stat().st_mtime_ns)
        self._upload(files)
        return files[-1].stat().st_size

    def _upload(self, events: Sequence[Path] = ()) -> None:
        """Put changed files in the background, whole and as they are now: they go on growing."""
        assert self._pool is not None
        self._wait()
        contents = {}
        notes = [one for one in self._folder.iterdir() if one.is_file() and one != self._metrics]
        for path in (self._metrics, *events, *notes):
            state = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._uploaded.get(path) != state:
                self._uploaded[path] = state
                url = storage.join(self._run_dir, *path.relative_to(self._folder).parts)
                contents[url] = path.read_bytes()
        self._last_upload = time.monotonic()
        self._pending = self._pool.submit(_put_all, contents)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _put_all(contents: Mapping[str, bytes]) -> None:
    for url, data in contents.items():
        storage.put_bytes(url, data)


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
            raise ReportingError(
                f"{url}: line {number} is damaged; repair or move the file"
            ) from error
        rows.append(row)
    return rows


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
