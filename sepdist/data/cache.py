"""Shards at hand: a shard number in, an open, verified local file out.

A local data set is read in place, each shard checked against the manifest once per process. A remote one is fetched
shard by shard to `cache_dir/<sha256>.tar`; several processes of a machine share the copies, and the least recently
used ones go when the cache is full. A file in use stays readable though it is removed, because it stays open.
"""

import fcntl
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

from sepdist import storage
from sepdist.data.members import DataError
from sepdist.data.shards import Manifest, ShardInfo

logger = logging.getLogger(__name__)

MAX_OPEN = 64  # files kept open per process


class ShardCache:
    """The shards of one data set as open files; thread-safe."""

    def __init__(self, url: str, manifest: Manifest, cache_dir: str, max_bytes: int) -> None:
        self.url = url
        self.manifest = manifest
        self.remote = storage.is_remote(url)
        self.folder = Path(cache_dir).expanduser()
        self.max_bytes = max_bytes
        self._open: OrderedDict[int, BufferedReader] = OrderedDict()
        self._pending: dict[int, Future[BufferedReader]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="shard")

    def open(self, number: int) -> BufferedReader:
        """The shard as an open file, checked in size and sha256; threads may `os.pread` from it."""
        return self._request(number).result()

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Fetch and check these shards in the background; what goes wrong is raised by `open`."""
        for number in numbers:
            self._request(number)

    def close(self) -> None:
        """End the background threads."""
        self._pool.shutdown(cancel_futures=True)

    def _request(self, number: int) -> "Future[BufferedReader]":
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                ready: Future[BufferedReader] = Future()
                ready.set_result(self._open[number])
                return ready
            if number not in self._pending:
                self._pending[number] = self._pool.submit(self._load, number)
            return self._pending[number]

    def _load(self, number: int) -> BufferedReader:
        try:
            shard = self.manifest.shards[number]
            file = self._fetched(shard) if self.remote else self._in_place(shard)
            with self._lock:
                self._open[number] = file
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)  # closed when its last reader drops it
            return file
        finally:
            with self._lock:
                self._pending.pop(number, None)

    def _in_place(self, shard: ShardInfo) -> BufferedReader:
        path = Path(storage.join(self.url, shard.name)).expanduser()
        try:
            file = open(path, "rb")  # noqa: SIM115 - stays open for the readers
        except FileNotFoundError:
            raise DataError(f"{path}: the shard is missing; write the data set again") from None
        _check(file, shard, str(path))
        return file

    def _fetched(self, shard: ShardInfo) -> BufferedReader:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{shard.sha256}.tar"
        with open(self.folder / f"{shard.sha256}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the machine fetches, the others find the copy
            if path.exists():
                file = open(path, "rb")  # noqa: SIM115
                try:
                    _check(file, shard, str(path))
                    os.utime(path)
                    return file
                except DataError as error:
                    logger.warning("%s; fetching the shard again", error)
                    path.unlink(missing_ok=True)
            place = storage.join(self.url, shard.name)
            self._make_room(shard.bytes)
            storage.fetch_file(place, path)
            file = open(path, "rb")  # noqa: SIM115
            try:
                _check(file, shard, place)
            except DataError:
                path.unlink(missing_ok=True)
                raise
            return file

    def _make_room(self, num_bytes: int) -> None:
        """Remove the copies used longest ago until `num_bytes` more fit; another process may remove them too."""
        copies = []
        for path in self.folder.glob("*.tar"):
            try:
                copies.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:
                continue
        total = sum(size for _, size, _ in copies) + num_bytes
        for _, size, path in sorted(copies):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _check(file: BufferedReader, shard: ShardInfo, place: str) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != shard.bytes:
        raise DataError(f"{place}: damaged, {size} bytes where the manifest says {shard.bytes}; write it again")
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise DataError(f"{place}: damaged, its sha256 is not the manifest's; write it again")
