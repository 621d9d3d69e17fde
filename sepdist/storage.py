"""Read and write files on local disk or in object storage; every put is atomic.

A url is a local path or "s3://bucket/prefix" on any S3 service; the standard AWS_* variables name
the endpoint and the key. Readers see the old content or the new one, also after a kill, a full disk
or a lost connection.

Transient faults (refused connections, timeouts, 5xx, SlowDown) are waited for, a minute in each
call: SEPDIST_STORAGE_PATIENCE_SECONDS or `patient` changes that, and `patient` lets puts wait for
full disks too. A request that has no answer for SEPDIST_STORAGE_TIMEOUT_SECONDS (60) has failed.
Any other fault raises a StorageError that names the url and what to do, and never a key.
"""

import contextlib
import errno
import fcntl
import itertools
import logging
import math
import os
import random
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, TypeVar

from sepdist import object_storage as s3
from sepdist.object_storage import StorageError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

PART_BYTES = 16 * 2**20  # of a multipart upload, used above twice this; S3 allows 5 MiB or more
NUM_PARTS_AT_ONCE = 4  # bounds the memory of one upload to NUM_PARTS_AT_ONCE * PART_BYTES
MAX_PARTS = 10_000  # of one S3 upload
FIRST_WAIT_SECONDS = 0.5  # before the second try; doubles from try to try
MAX_WAIT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0  # of a process that has not chosen another
FAILING_SECONDS = 5.0  # a shorter fault holds up a checkpoint rather than costing it
HANGING_SECONDS = 15.0  # the same of a request without an answer, besides
WARNING_SECONDS = 60.0  # between two warnings of one place that is waited for
REMOVAL_TRIES = 10  # of a folder that other processes change meanwhile
TEMP_SUFFIX = ".sepdist-tmp"  # of unfinished files, which are never listed
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
_HINTS = {
    **dict.fromkeys(DISK_FULL, "; free some space or choose another folder; old content is kept"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "; check the permissions of it and its folder"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "; one of its folders is a file"),
    errno.EROFS: "; choose a folder that can be written",
    errno.EISDIR: "; a file is wanted here",
}
_everywhere: float | None = None  # the patience of this process
_here: ContextVar[float | None] = ContextVar("patience", default=None)  # of this thread
_warned: dict[str, float] = {}  # place -> time of the last warning
_on_wait: Callable[[], object] | None = None
_waiting: dict[int, float] = {}  # threads in a call -> since when it has met a fault


@contextlib.contextmanager
def patient(
    seconds: float, *, whole_process: bool = False, waiting: Callable[[], object] | None = None
) -> Iterator[None]:
    """Wait up to `seconds` in each call for faults that pass, in a put for full disks too.

    Of this thread, or of all threads that have not chosen their own, as a run needs it: for those
    SEPDIST_STORAGE_PATIENCE_SECONDS, where set, replaces `seconds`, and a refused key is a fault
    that passes too. `waiting` is called again and again while a call waits.
    """
    global _everywhere, _on_wait
    before, token = (_everywhere, _on_wait), _here.set(_here.get() if whole_process else seconds)
    _everywhere = seconds if whole_process else _everywhere
    _on_wait = waiting or _on_wait
    try:
        yield
    finally:
        _here.reset(token)
        _everywhere, _on_wait = before


def failing() -> bool:
    """Whether a call of this process has waited for long for a fault to pass, or for an answer."""
    return any(time.monotonic() - since > FAILING_SECONDS for since in [*_waiting.values()])


def is_remote(url: str | Path) -> bool:
    """Whether `url` is in object storage; ValueError unless it is s3:// or a plain path."""
    scheme, separator, _ = str(url).partition("://")
    if lost := re.match(r"(s3|hf|pretrained):/(?!/)", str(url)):  # as in pathlib.Path("s3://b")
        raise ValueError(f"{url}: write {lost[1]}:// with two slashes, as text and not as a Path")
    if separator and scheme != "s3":
        given = f"{url}: {scheme}:// is not supported"
        raise ValueError(f"{given}; give a local path or s3://bucket/prefix")
    return bool(separator)


def join(url: str | Path, *names: str) -> str:
    """Append names to a url of either kind."""
    base = str(url)
    base = base if is_remote(url) and base.endswith("://") else base.rstrip("/")
    return "/".join([base, *(name.strip("/") for name in names)])


def absolute(url: str | Path) -> str:
    """Return the one spelling of a place; a local path absolute, as workers run elsewhere."""
    if str(url).startswith(("hf://", "pretrained://")):  # a model's name, the same everywhere
        return str(url)
    if not is_remote(url):
        return str(_path(url).resolve())
    return "s3://" + "/".join(_split(url, whole_bucket=True)).rstrip("/")


def exists(url: str | Path) -> bool:
    """Whether `url` is a file or a folder; in object storage a folder has something in it."""
    try:
        size(url)
        return True
    except FileNotFoundError:
        return is_remote(url) and bool(_list_page(url, MaxKeys=2)[0])  # 2: a marker and one


def size(url: str | Path) -> int:
    """Return the number of bytes of a file; FileNotFoundError names `url`."""
    if not is_remote(url):
        with _local(url, "look at"):
            return _path(url).stat().st_size
    return int(_call(url, "look at", "head_object", **_where(url))["ContentLength"])


def list_names(url: str | Path) -> list[str]:
    """List the names directly below a folder, sorted, folders without a slash; [] if none."""
    if not is_remote(url):
        with _local(url, "list"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(one for one in os.listdir(_path(url)) if not one.endswith(TEMP_SUFFIX))
        return []
    found, more = set[str](), dict[str, str]()
    while True:
        keys, token = _list_page(url, Delimiter="/", **more)
        found.update(key.rstrip("/").rpartition("/")[2] for key in keys)
        if token is None:
            return sorted(found)
        more = {"ContinuationToken": token}


def read_bytes(url: str | Path) -> bytes:
    """Read a whole file; FileNotFoundError names `url`."""
    if is_remote(url):
        return b"".join(_blocks(url))
    with _local(url, "read"):
        return _no_pipe(url, "read").read_bytes()


def put_bytes(url: str | Path, data: bytes, *, create_only: bool = False) -> None:
    """Write a whole file atomically; with `create_only` FileExistsError if it exists."""
    _put(url, len(data), lambda start, stop: data[start:stop], create_only)


def put_file(local: str | Path, url: str | Path) -> None:
    """Copy a local file to `url` atomically, a large one in parts."""
    with _local(local, "read"):
        source = open(_no_pipe(local, "read"), "rb")  # noqa: SIM115 (writing names another file)
    with source:
        handle, length = source.fileno(), os.fstat(source.fileno()).st_size
        _put(url, length, lambda start, stop: os.pread(handle, stop - start, start))


def fetch_file(url: str | Path, local: str | Path) -> None:
    """Copy `url` to the path `local`, which appears only when it is complete."""
    if is_remote(url):
        _put_local(local, lambda: _blocks(url))
    else:
        put_file(url, local)


def _put(
    url: str | Path, length: int, block: Callable[[int, int], bytes], create_only: bool = False
) -> None:
    """Write `length` bytes from `block(start, stop)` atomically."""
    if is_remote(url):
        return _put_object(url, length, block, create_only)
    starts = range(0, length, 2**20)
    return _put_local(url, lambda: (block(at, at + 2**20) for at in starts), create_only)


def remove(url: str | Path) -> None:
    """Remove a file or a whole folder, which may be absent or removed by others meanwhile."""
    if not is_remote(url):
        with _local(url, "remove"):
            _remove_path(_path(url))
        return
    bucket, key = _split(url)
    keys, folders = [key], {key + "/"}
    while keys:
        _delete_objects(url, bucket, keys)
        keys = _list_page(url, MaxKeys=1000)[0]
        for name in keys:
            slashes = [at for at in range(len(key) + 1, len(name)) if name[at] == "/"]
            folders.update(name[: at + 1] for at in slashes)
    # Consoles create markers of folders, and some services list an empty folder that has one.
    markers = sorted(folders, key=len, reverse=True)
    for start in range(0, len(markers), 1000):
        _delete_objects(url, bucket, markers[start : start + 1000])


# Local disk.


def _path(url: str | Path) -> Path:
    return Path(os.path.expanduser(url))


@contextlib.contextmanager
def _local(url: str | Path, action: str) -> Iterator[None]:
    """Turn errors of the operating system into messages that name the file and say what to do."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        missing = error.args[0] if error.errno is None else f"{url}: no such file"
        raise FileNotFoundError(missing) from None
    except FileExistsError:
        raise FileExistsError(f"{url}: exists already") from None
    except OSError as error:
        if error.errno == errno.ENOTDIR and action in ("read", "look at"):
            raise FileNotFoundError(f"{url}: no such file") from None
        raise disk_error(url, action, error) from error


def disk_error(url: str | Path, action: str, error: OSError) -> StorageError:
    """Build the error of an `action` on a local file that the operating system refused."""
    hint = _HINTS.get(error.errno or 0, "")
    return StorageError(f"cannot {action} {url}: {error.strerror or type(error).__name__}{hint}")


def _no_pipe(url: str | Path, action: str) -> Path:
    path = _path(url)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise StorageError(f"cannot {action} {url}: a pipe or device, which may never end")
    return path


def _put_local(
    url: str | Path, blocks: Callable[[], Iterable[bytes]], create_only: bool = False
) -> None:
    def put() -> None:
        with _local(url, "write"), _temp_beside(_no_pipe(url, "write")) as temp:
            temp.writelines(blocks())
            temp.flush()
            _publish(Path(temp.name), _path(url), create_only)

    def judge(error: Exception, tried: str) -> tuple[Exception, bool]:
        chosen = _everywhere is not None or _here.get() is not None
        return error, chosen and getattr(error.__cause__, "errno", 0) in _MAY_PASS

    _persist(str(url), put, judge)


@contextlib.contextmanager
def _temp_beside(target: Path) -> Iterator[IO[bytes]]:
    """Yield a new file in the folder of `target`, locked while in use, removed afterwards."""
    try:
        missing = [one for one in (target.parent, *target.parent.parents) if not one.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # would read as if the target existed
        raise disk_error(target, "write", error) from None
    for folder in missing:
        _flush(folder.parent)
    for left in target.parent.iterdir():  # of killed writers, whose locks ended with them
        if left.name.endswith(TEMP_SUFFIX):
            gone_or_locked = (FileNotFoundError, BlockingIOError, PermissionError)
            with contextlib.suppress(*gone_or_locked), open(left, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
    while True:
        temp = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{TEMP_SUFFIX}")
        with open(temp, "xb") as new:
            fcntl.flock(new, fcntl.LOCK_EX)
            if os.fstat(new.fileno()).st_nlink:  # else another swept it before it was locked
                try:
                    yield new
                    return
                finally:
                    temp.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_path(path: Path) -> None:
    for tries_left in reversed(range(REMOVAL_TRIES)):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            _flush(path.parent)
            return
        except OSError as error:  # others removed or added something meanwhile
            if error.errno == errno.ENOENT and not os.path.lexists(path):
                return
            if not tries_left or error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise


def _publish(temp: Path, target: Path, create_only: bool) -> None:
    """Give the finished `temp` its name; after this it survives a crash of the machine."""
    _flush(temp)
    if create_only:
        os.link(temp, target)  # atomic, and unlike a rename refuses to replace
    else:
        os.replace(temp, target)
    try:
        _flush(target.parent)
    except OSError:
        if create_only:
            target.unlink()  # else the next attempt would take it for another's
        raise


# Object storage.


def _split(url: str | Path, *, whole_bucket: bool = False) -> tuple[str, str]:
    bucket, _, key = str(url).removeprefix("s3://").partition("/")
    if not bucket or not (key.strip("/") or whole_bucket):
        raise ValueError(f"{url}: give s3://bucket/prefix, a bucket and a name in it")
    return bucket, key.strip("/")


def _where(url: str | Path) -> dict[str, str]:
    return dict(zip(("Bucket", "Key"), _split(url), strict=True))


def _call(url: str | Path, action: str, method: str, **arguments: Any) -> Any:
    def judge(error: Exception, tried: str) -> tuple[Exception, bool]:
        # A run has a key renewed in time; a program says at once that it is wrong.
        may_pass = s3.is_transient(error) or (_everywhere is not None and s3.is_refusal(error))
        return s3.explain(str(url), action, error, tried), may_pass

    return _persist(s3.endpoint(), lambda: s3.request(method, **arguments), judge)


def _list_page(url: str | Path, **arguments: Any) -> tuple[list[str], str | None]:
    """Return one page of keys and common prefixes below `url`, and the token of the next page."""
    bucket, key = _split(url, whole_bucket=True)
    prefix = key and key + "/"
    page = _call(url, "list", "list_objects_v2", Bucket=bucket, Prefix=prefix, **arguments)
    keys = [one["Key"] for one in page.get("Contents", [])]
    keys += [one["Prefix"] for one in page.get("CommonPrefixes", [])]
    return [key for key in keys if key != prefix], page.get("NextContinuationToken")


def _delete_objects(url: str | Path, bucket: str, keys: list[str]) -> None:
    batch = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    _call(url, "remove", "delete_objects", Bucket=bucket, Delete=batch)


def _blocks(url: str | Path) -> Iterator[bytes]:
    """Yield the content of an object, a large one in parts that are fetched at the same time."""
    where = _where(url)
    first = _call(url, "read", "get_object", **where, most=PART_BYTES)
    yield first["Body"]
    length = first["ContentLength"]

    def part(start: int) -> bytes:
        only = {"Range": f"bytes={start}-{min(start + PART_BYTES, length) - 1}"}
        only["IfMatch"] = first["ETag"]  # no part of a newer object
        return bytes(_call(url, "read", "get_object", **where, **only)["Body"])

    starts = iter(range(len(first["Body"]), length, PART_BYTES))
    with _pool("download") as pool:
        while some := list(itertools.islice(starts, NUM_PARTS_AT_ONCE)):
            yield from pool.map(part, some)


def _pool(name: str) -> ThreadPoolExecutor:
    """Return threads as patient as this one."""
    return ThreadPoolExecutor(NUM_PARTS_AT_ONCE, name, _here.set, (_here.get(),))


def _put_object(
    url: str | Path, length: int, block: Callable[[int, int], bytes], create_only: bool = False
) -> None:
    """Upload `length` bytes from `block(start, stop)`; the object appears whole or not at all.

    Not by `open(url, "wb")`, which on an exception publishes what was written so far.
    """
    where = _where(url)
    condition = {"IfNoneMatch": "*"} if create_only else {}
    mark = {"sepdist-put": uuid.uuid4().hex}

    def finish(method: str, **arguments: Any) -> None:
        try:
            _call(url, "write", method, **where, **condition, **arguments)
        except (FileExistsError, FileNotFoundError):  # the second: the upload is no longer there
            # The request was sent again, by us or by aiohttp, after its first answer was lost.
            if _call(url, "look at", "head_object", **where)["Metadata"] != mark:
                raise

    if length <= 2 * PART_BYTES:
        finish("put_object", Body=block(0, length), Metadata=mark)
        return
    part_bytes = max(PART_BYTES, -(-length // MAX_PARTS))
    upload = _call(url, "write", "create_multipart_upload", **where, Metadata=mark)["UploadId"]
    ours = {**where, "UploadId": upload}

    def put_part(number: int) -> dict[str, Any]:
        body = block((number - 1) * part_bytes, min(number * part_bytes, length))
        answer = _call(url, "write", "upload_part", **ours, PartNumber=number, Body=body)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        with _pool("upload") as pool:
            parts = list(pool.map(put_part, range(1, -(-length // part_bytes) + 1)))
        finish("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
    except BaseException:
        # The error under way says more than one of the clean-up; a lifecycle rule does the rest.
        with contextlib.suppress(OSError), patient(0):
            _call(url, "abort the upload of", "abort_multipart_upload", **ours)
        raise


# Patience.


def _persist(
    place: str,
    function: Callable[[], _T],
    judge: Callable[[Exception, str], tuple[Exception, bool]],
) -> _T:
    """Call `function` until it succeeds, fails for good or has failed for too long.

    `judge(error, tried)` returns the error to raise, and whether the fault may pass.
    """
    seconds, wait, first, me = _here.get(), FIRST_WAIT_SECONDS, 0.0, threading.get_ident()
    if seconds is None:
        default = PATIENCE_SECONDS if _everywhere is None else _everywhere
        seconds = s3.seconds_of("SEPDIST_STORAGE_PATIENCE_SECONDS", default)
    _waiting[me], attempt = time.monotonic() + HANGING_SECONDS, 0
    try:
        while True:
            try:
                result = function()
                break
            except Exception as error:
                now, attempt = time.monotonic(), attempt + 1
                first = first or now
                tried = f" after {attempt} attempts in {now - first:.0f} s" if attempt > 1 else ""
                explained, may_pass = judge(error, tried)
                left = first + seconds - now
                if not may_pass or left <= 0:
                    # Not from `error`: botocore's do not survive pickling and may carry headers.
                    raise explained from explained.__cause__
                if now - _warned.get(place, -math.inf) >= WARNING_SECONDS:
                    _warned[place] = now
                    logger.warning("%s; trying again for %.0f s", explained, left)
            _waiting[me] = first
            if _on_wait:
                _on_wait()
            time.sleep(min(left, wait * random.SystemRandom().uniform(0.5, 1.0)))
            wait = min(2 * wait, MAX_WAIT_SECONDS)
    finally:
        _waiting.pop(me, None)
    if first and time.monotonic() - first > WARNING_SECONDS and _warned.pop(place, 0):
        logger.warning("%s: goes on after %.0f s", place, time.monotonic() - first)
    return result
