"""Shards at hand: a shard number in, an open, verified local file and its index out.

A local data set is read in place, each shard checked against the manifest once per process. A remote one is fetched
shard by shard to `cache_dir/<shard>-<sha256>.tar`; several processes of a machine share the copies, each is fetched
once, and the least recently used ones go when the cache is full. A shard in use stays readable though its copy is
removed, because the file stays open.

Damage that belongs to samples does not stop the others: `OpenShard.damaged` says which they are, and the stream's
policy decides. Damage that belongs to no sample is an error here.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from sepdist import storage
from sepdist.data.background import Background
from sepdist.data.members import DataError
from sepdist.data.shards import Manifest, Sample, ShardInfo, read_index, read_sample

logger = logging.getLogger(__name__)

MAX_OPEN = 64  # files kept open per process
NUM_FETCHERS = 2


@dataclass(frozen=True)
class OpenShard:
    """A shard at hand; threads may `os.pread` from `file` at once."""

    file: BufferedReader
    samples: list[Sample]
    damaged: Mapping[
        int, str
    ]  # sample number -> what is wrong; empty where size and sha256 are the manifest's


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
        self._wanted: frozenset[int] = frozenset()
        self._verified: dict[
            int, tuple[int, ...]
        ] = {}  # shard -> the identity of the file that was sound
        self._fetchers = Background(NUM_FETCHERS, "shard")

    def open(self, number: int) -> OpenShard:
        """The shard, checked in size and sha256; DataError if it is missing or beyond use."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            future = self._request(number)
        return future.result()

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Get these shards in the background, in this order, and evict none of them until the next call.

        Each is tried once; what goes wrong is raised by `open`, which tries again.
        """
        with self._lock:
            fresh = [number for number in dict.fromkeys(numbers) if number not in self._wanted]
            self._wanted = frozenset(numbers)
            for number in fresh:
                if number not in self._open:
                    self._request(number)
                elif self.remote:
                    _touch(self._copy_path(self.manifest.shards[number]))

    def close(self) -> None:
        """End the background threads."""
        self._fetchers.close()

    def _request(self, number: int) -> "Future[OpenShard]":
        if number not in self._pending:
            self._pending[number] = self._fetchers.submit(self._load, number)
        return self._pending[number]

    def _load(self, number: int) -> OpenShard:
        try:
            shard = self.manifest.shards[number]
            samples = read_index(self.url, shard)
            file, complaint = self._fetched(number) if self.remote else self._in_place(number)
            damaged = self._locate_damage(file, shard, samples, complaint) if complaint else {}
            opened = OpenShard(file, samples, damaged)
            with self._lock:
                self._open[number] = opened
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(
                        last=False
                    )  # the file is closed when its last reader drops it
            return opened
        finally:
            with self._lock:
                self._pending.pop(number, None)

    def _in_place(self, number: int) -> tuple[BufferedReader, str]:
        shard = self.manifest.shards[number]
        path = Path(storage.join(self.url, shard.name)).expanduser()
        try:
            file = open(path, "rb")  # noqa: SIM115 - stays open for the readers
        except FileNotFoundError:
            raise DataError(f"{path}: the shard is missing; write the data set again") from None
        return file, self._complaint(file, number)

    def _fetched(self, number: int) -> tuple[BufferedReader, str]:
        shard = self.manifest.shards[number]
        path = self._copy_path(shard)
        file = self._sound_copy(number, path)
        if file is None:
            with _locked(
                path.with_suffix(".lock")
            ):  # one process of the machine fetches, the others find the copy
                file = self._sound_copy(number, path)
                if file is None:
                    return self._fetch(number, path)
        _touch(path)
        return file, ""

    def _sound_copy(self, number: int, path: Path) -> BufferedReader | None:
        try:
            file = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        complaint = self._complaint(file, number)
        if not complaint:
            return file
        logger.warning("%s: %s; fetching the shard again", path, complaint)
        return None

    def _fetch(self, number: int, path: Path) -> tuple[BufferedReader, str]:
        shard = self.manifest.shards[number]
        place = storage.join(self.url, shard.name)
        complaint = ""
        for _ in range(2):  # what arrives damaged may have been damaged on the way
            self._make_room(shard.bytes)
            try:
                storage.fetch_file(place, path)
            except FileNotFoundError:
                raise DataError(
                    f"{place}: the shard is missing; write the data set again"
                ) from None
            file = open(path, "rb")  # noqa: SIM115
            complaint = self._complaint(file, number)
            if not complaint:
                return file, ""
            path.unlink(missing_ok=True)  # nobody else is to find it; what is open stays readable
        return file, complaint

    def _complaint(self, file: BufferedReader, number: int) -> str:
        """What is wrong with the whole file, "" if nothing; a file that was sound is not read through again."""
        shard = self.manifest.shards[number]
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._verified.get(number) == identity:
            return ""
        if status.st_size != shard.bytes:
            return f"{status.st_size} bytes where the manifest says {shard.bytes}"
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return "its sha256 is not the manifest's"
        self._verified[number] = identity
        return ""

    def _locate_damage(
        self, file: BufferedReader, shard: ShardInfo, samples: list[Sample], complaint: str
    ) -> Mapping[int, str]:
        """Which samples of a damaged shard cannot be decoded, and why; DataError if all can."""
        damaged = {}
        for number, sample in enumerate(samples):
            try:
                read_sample(file, sample, self.manifest.members)
            except DataError as error:
                damaged[number] = str(error)
        place = storage.join(self.url, shard.name)
        if not damaged:
            raise DataError(
                f"{place}: damaged, {complaint}, yet every sample decodes; write the shard again"
            )
        first = next(iter(damaged.values()))
        logger.warning(
            "%s: %s; %d of %d samples damaged: %s",
            place,
            complaint,
            len(damaged),
            len(samples),
            first,
        )
        return damaged

    def _copy_path(self, shard: ShardInfo) -> Path:
        # The sha256 keeps equal shard names of different data sets apart; the name is for messages and people.
        return self.folder / f"{shard.name.removesuffix('.tar')}-{shard.sha256}.tar"

    def _make_room(self, num_bytes: int) -> None:
        """Remove the copies used longest ago until `num_bytes` more fit; another process may remove them too."""
        copies = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                copies.append((status.st_atime_ns, status.st_size, path))
        with self._lock:
            wanted = {
                self._copy_path(self.manifest.shards[number])
                for number in self._wanted | set(self._pending)
            }
        total = sum(size for _, size, _ in copies) + num_bytes
        for _, size, path in sorted(copies):
            if total <= self.max_bytes:
                return
            if path not in wanted:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                self._forget(path)
                total -= size
        if total > self.max_bytes:
            logger.warning(
                "%s: %.2f GB of shards are needed at once, more than the %.2f GB that cache_gigabytes allows",
                *(self.folder, total / 1e9, self.max_bytes / 1e9),
            )

    def _forget(self, path: Path) -> None:
        """Close an evicted shard here, else its disk space would not be free."""
        with self._lock:
            for number in [
                n for n in self._open if self._copy_path(self.manifest.shards[n]) == path
            ]:
                del self._open[number]


def _touch(path: Path) -> None:
    """Note that a copy was used: in its access time, because the time of change tells whether it is still the same."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which other threads and other processes of the machine wait for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
