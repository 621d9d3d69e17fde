"""What a run says about itself. In: numbers, sound and pictures by step; out: run_dir/metrics.jsonl and TensorBoard.

    run_dir/metrics.jsonl      one JSON object per `log` call: step, seconds, and the metrics by "group/name"; the truth
    run_dir/tensorboard/       event files: a view of the same numbers, with audio and spectrograms

Groups: loss/*, train/*, si_snri/*, speed/*, optim/*, validation/*. A run_dir on s3:// is written in a local scratch
folder and put there as whole files, because an object cannot be appended to. Look at it with
`tensorboard --logdir run_dir/tensorboard`.
"""

import csv
import io
import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch.utils.tensorboard import SummaryWriter

from sepdist import storage
from sepdist.plotting import spectrogram_figure

LISTENING_PEAK = 0.9
UPLOAD_SECONDS = 30.0  # between two uploads of metrics.jsonl that nobody asked for: how old a progress bar may be
EVENT_FILE_BYTES = 16_000_000  # on s3://, where a flush puts whole files: what one flush may repeat of the one before


class ReportingError(ValueError):
    """A metrics.jsonl that cannot be continued, or sound that cannot be played."""


class Reporter:
    """Writes the metrics, sound and pictures of one attempt of a run; only the main rank makes one.

    On a resume at `resume_step` the rows of later steps are dropped, since the run is about to make them again, and
    TensorBoard is told to forget them; `kept` are the others.
    """

    def __init__(self, run_dir: str, *, resume_step: int = 0) -> None:
        self._run_dir = str(run_dir)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if storage.is_remote(self._run_dir):
            self._scratch = tempfile.TemporaryDirectory(prefix="sepdist-report-")
        self._folder = Path(self._scratch.name) if self._scratch else Path(self._run_dir)
        rows = read_metrics(self._run_dir)
        kept = [row for row in rows if row["step"] <= resume_step]
        self._seconds_before = max((row["seconds"] for row in kept), default=0.0)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if rows != kept or not self._scratch:
            storage.put_bytes(storage.join(self._run_dir, "metrics.jsonl"), text.encode())
        path = self._folder / "metrics.jsonl"
        if self._scratch:
            path.write_text(text)
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=resume_step + 1)
        self.kept = kept
        self._notes: dict[str, bytes] = {}  # small files that go to s3:// with the next upload
        self._uploaded: dict[str, int] = {}  # name below run_dir -> bytes there
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="report") if self._scratch else None
        self._pending: Future[None] | None = None
        self._began = self._last_upload = time.monotonic()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row: `metrics` by "group/name", with the seconds the run has taken over all its attempts.

        A value that is not finite is null in metrics.jsonl, because JSON has no NaN, and NaN in TensorBoard.
        """
        values = {name: float(value) for name, value in metrics.items()}
        assert all("/" in name for name in values), (
            f"metrics are named group/name, not {sorted(values)}"
        )
        seconds = round(self._seconds_before + time.monotonic() - self._began, 3)
        row: dict[str, float | None] = {"step": int(step), "seconds": seconds}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._pool and time.monotonic() - self._last_upload > UPLOAD_SECONDS:
            self._upload(["metrics.jsonl"])

    def note(self, name: str, text: str) -> None:
        """A small file `name` in run_dir, replaced whole; on s3:// with the next upload."""
        if self._pool:
            self._notes[name] = text.encode()
        else:
            storage.put_bytes(storage.join(self._run_dir, name), text.encode())

    def audio(self, step: int, name: str, wave: np.ndarray, rate: int) -> None:
        """Sound [T] at `rate`, its peak brought to 0.9: SI-SNR leaves the level of an estimate open."""
        self._writer.add_audio(
            name, torch.from_numpy(for_listening(wave, name))[None], step, sample_rate=rate
        )

    def spectrogram(self, step: int, name: str, waves: Mapping[str, np.ndarray], rate: int) -> None:
        """A picture of `spectrogram_figure`."""
        canvas = FigureCanvasAgg(spectrogram_figure(waves, rate))
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
        self._writer.add_image(f"{name}/spectrogram", picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Everything so far is on disk, or on its way to s3://, which `close` waits for.

        Raises:
            OSError: an upload before this one failed.
        """
        self._writer.flush()
        if not self._pool:
            return
        self._upload(
            ["metrics.jsonl"] + [f"tensorboard/{path.name}" for path in self._event_files()]
        )
        if self._event_files()[-1].stat().st_size > EVENT_FILE_BYTES:
            self._writer.close()  # the next event opens another file

    def close(self) -> None:
        """Write what is left and end; nothing can be logged afterwards."""
        self._writer.close()
        self._file.close()
        if self._pool and self._scratch:
            try:
                self._upload(
                    ["metrics.jsonl"] + [f"tensorboard/{path.name}" for path in self._event_files()]
                )
                self._wait()
            finally:
                self._pool.shutdown()
                self._scratch.cleanup()

    def _event_files(self) -> list[Path]:
        return sorted(
            (self._folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns
        )

    def _upload(self, names: list[str]) -> None:
        """Put whole files in the background; the bytes are taken now, because the files go on growing."""
        assert self._pool is not None
        self._wait()
        sizes = {name: (self._folder / name).stat().st_size for name in names}
        changed = [name for name in names if self._uploaded.get(name) != sizes[name]]
        contents = {name: (self._folder / name).read_bytes() for name in changed}
        self._uploaded |= {name: len(data) for name, data in contents.items()}
        contents |= self._notes
        self._notes = {}
        self._last_upload = time.monotonic()
        self._pending = self._pool.submit(_put_all, self._run_dir, contents)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _put_all(run_dir: str, contents: Mapping[str, bytes]) -> None:
    for name, data in contents.items():
        storage.put_bytes(storage.join(run_dir, *name.split("/")), data)


def read_metrics(run_dir: str) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, in the order they were written; [] where there is none.

    A last line that a kill cut short is left out; damage anywhere else is a ReportingError naming the line.
    """
    url = storage.join(run_dir, "metrics.jsonl")
    if not storage.exists(url):
        return []
    lines = storage.read_bytes(url).split(b"\n")
    rows = []
    for number, line in enumerate(
        lines[:-1], start=1
    ):  # what follows the last newline is empty or torn
        try:
            row = json.loads(line)
            row["step"], row["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise ReportingError(
                f"{url}: line {number} is damaged; mend or move the file"
            ) from error
        rows.append(row)
    return rows


def for_listening(wave: np.ndarray, name: str = "wave") -> np.ndarray:
    """float32 [T] with its peak at 0.9; silence stays silence.

    Raises:
        ReportingError: `wave` holds NaN or infinity, which no loudspeaker plays.
    """
    wave = np.asarray(wave, dtype=np.float32)
    assert wave.ndim == 1, f"{name}: a wave is [T], not {wave.shape}"
    if not np.isfinite(wave).all():
        raise ReportingError(
            f"{name}: {np.count_nonzero(~np.isfinite(wave))} of {wave.size} samples are not finite"
        )
    peak = float(np.abs(wave).max(initial=0.0))
    return wave * np.float32(LISTENING_PEAK / peak) if peak > 0 else wave


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
