"""Shards as open, verified local files.

A local data set is read in place, each shard checked against the manifest once per process. A
remote shard is fetched to `cache_dir/<shard>-<sha256>.tar`. The processes of a machine share these
copies: each is fetched once, and the least recently used are removed when the cache is full. An
open shard stays readable when its copy is removed.

A shard that is overwritten in place while it is open is noticed by its size or modification time
when it is next asked for, and checked again.

Damage of single samples does not stop the others: `OpenShard.damaged` lists them and the stream
decides. Damage that cannot be located is an error here.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import resource
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from sepdist import storage
from sepdist.data import shards
from sepdist.data.background import Background
from sepdist.data.members import DataError
from sepdist.data.shards import Manifest, Sample

logger = logging.getLogger(__name__)

SPARE_OPEN = 8  # shards kept open besides those that were announced
NUM_FETCHERS = 2


@dataclass(frozen=True)
class OpenShard:
    """An open shard; threads may `os.pread` from `file` concurrently."""

    file: BufferedReader
    samples: list[Sample]
    damaged: Mapping[int, str]  # sample number -> what is wrong with it


class ShardCache:
    """The shards of one data set as open files; thread-safe."""

    def __init__(self, url: str, manifest: Manifest, cache_dir: str, max_bytes: int) -> None:
        self.url = url
        self.manifest = manifest
        self.remote = storage.is_remote(url)
        self.folder = Path(cache_dir).expanduser()
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._pending: dict[int, Future[OpenShard]] = {}
        self._wanted: dict[int, None] = {}  # in order of first use
        # shard -> identity of the file that was checked last, and what was wrong with it
        self._checks: dict[int, tuple[tuple[int, ...], str]] = {}
        self._fetchers = Background(NUM_FETCHERS, "shard")

    def open(self, number: int) -> OpenShard:
        """Return the shard, verified by size and sha256; DataError if it is missing or unusable."""
        with self._lock:
            if number in self._open:
                if _identity(self._open[number].file) == self._checks[number][0]:
                    self._open.move_to_end(number)
                    return self._open[number]
                logger.warning("%s: changed while it was open", self._open.pop(number).file.name)
            future = self._request(number)
        return future.result()

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Get these shards in the background, in order, and keep them until the next call.

        Each is tried once. Errors are dropped: `open` tries again and raises its own.
        """
        with self._lock:
            before, self._wanted = self._wanted, dict.fromkeys(numbers)
            for number in [one for one in self._wanted if one not in before]:
                if number not in self._open:
                    self._request(number)
                elif self.remote:
                    _touch(self._copy_path(number))

    def close(self) -> None:
        """End the background threads."""
        self._fetchers.close()

    def _request(self, number: int) -> "Future[OpenShard]":
        if number not in self._pending:
            self._pending[number] = self._fetchers.submit(self._load, number)
        return self._pending[number]

    def _load(self, number: int) -> OpenShard:
        try:
            samples = shards.read_index(self.url, self.manifest.shards[number])
            if self.remote:
                file, problem = self._fetched(number)
            else:
                file, problem = self._checked(Path(self._place(number)).expanduser(), number)
            damaged = self._locate_damage(number, file, samples, problem) if problem else {}
            opened = OpenShard(file, samples, damaged)
            with self._lock:
                self._open[number] = opened
                # Close what is not wanted, least recently used first, then what is wanted last.
                files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**64  # -1: any number
                allowed = min(len(self._wanted) + SPARE_OPEN, files // 4)
                need = {one: -place for place, one in enumerate(self._wanted)}
                by_need = sorted(self._open, key=lambda one: need.get(one, -len(need)))
                for one in by_need[: max(0, len(self._open) - allowed)]:
                    del self._open[one]
            return opened
        except FileNotFoundError:
            todo = "the shard is missing; write the data set again"
            raise DataError(f"{self._place(number)}: {todo}") from None
        finally:
            with self._lock:
                self._pending.pop(number, None)

    def _fetched(self, number: int) -> tuple[BufferedReader, str]:
        """Open the copy, fetched at most twice, as damage may occur on the way; and its problem."""
        path, problem = self._copy_path(number), "absent"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):  # one process fetches, the others find its copy
            with contextlib.suppress(FileNotFoundError):
                file, problem = self._checked(path, number)
                if problem:
                    logger.warning("%s: %s; fetching the shard again", path, problem)
            for _ in range(2):
                if problem:
                    self._make_room(self.manifest.shards[number].bytes)
                    part = path.with_suffix(".part")  # where nobody evicts it before it is open
                    storage.fetch_file(self._place(number), part)
                    file, problem = self._checked(part, number)
                    os.replace(part, path)
            if problem:
                path.unlink(missing_ok=True)  # hide it from others; the open file stays readable
        _touch(path)
        return file, problem

    def _checked(self, path: Path, number: int) -> tuple[BufferedReader, str]:
        """Open a file; say what is wrong with it ("": nothing). It is hashed once if unchanged."""
        file = open(shards.require_regular(path), "rb")  # noqa: SIM115
        shard, identity = self.manifest.shards[number], _identity(file)
        before, problem = self._checks.get(number, ((), ""))
        if before != identity:
            problem, num_bytes = "", os.fstat(file.fileno()).st_size
            if num_bytes != shard.bytes:
                problem = f"{num_bytes} bytes where the manifest says {shard.bytes}"
            elif hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                problem = "its sha256 is not the manifest's"
            self._checks[number] = identity, problem
        return file, problem

    def _locate_damage(
        self, number: int, file: BufferedReader, samples: list[Sample], problem: str
    ) -> Mapping[int, str]:
        """Map the samples that cannot be decoded to the reason; DataError if all can."""
        damaged = {}
        for i, sample in enumerate(samples):
            try:
                shards.read_sample(file, sample, self.manifest.members)
                if shards.read_metadata(file, sample)["id"] != sample.key:
                    raise DataError(f"{file.name}: another sample is in the place of {sample.key}")
            except (ValueError, KeyError) as error:
                damaged[i] = str(error)
        what = f"{self._place(number)}: damaged, {problem}"
        if not damaged:
            raise DataError(f"{what}, yet every sample decodes; write the shard again")
        counts = f"{len(damaged)} of {len(samples)} samples damaged"
        logger.warning("%s; %s: %s", what, counts, next(iter(damaged.values())))
        return damaged

    def _place(self, number: int) -> str:
        return storage.join(self.url, self.manifest.shards[number].name)

    def _copy_path(self, number: int) -> Path:
        # The sha256 separates shards of the same name; the name is for people.
        shard = self.manifest.shards[number]
        return self.folder / f"{shard.name.removesuffix('.tar')}-{shard.sha256}.tar"

    def _make_room(self, num_bytes: int) -> None:
        """Remove least recently used copies until `num_bytes` more fit; others may do the same."""
        copies = []
        for path in self.folder.glob(f"*-{'[0-9a-f]' * 64}.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                copies.append((status.st_atime_ns, status.st_size, path))
        with self._lock:
            wanted = {self._copy_path(number) for number in {*self._wanted, *self._pending}}
        total, evicted = sum(size for _, size, _ in copies) + num_bytes, set[Path]()
        most = min(self.max_bytes, total - num_bytes + shutil.disk_usage(self.folder).free)
        for _, size, path in sorted(copies):
            if total > most and path not in wanted:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                evicted.add(path)
                total -= size
        with self._lock:  # open files would go on occupying the disk
            for number in [n for n in self._open if self._copy_path(n) in evicted]:
                del self._open[number]
        if total > most:
            needed = f"{total / 1e9:.2f} GB of shards are needed at once"
            allowed = f"the {most / 1e9:.2f} GB that cache_gigabytes allows or the disk has"
            logger.warning("%s: %s, more than %s", self.folder, needed, allowed)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a copy, whose file is removed with the copy."""
    while True:
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else removed meanwhile, and another's is new
                yield
                return


def _identity(file: BufferedReader) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _touch(path: Path) -> None:
    """Record the use of a copy in its access time; the modification time identifies the file."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
