"""Read and write files on local disk or in object storage; every put is atomic.

A url is a local path or "s3://bucket/prefix" on any S3 service; the standard AWS_* variables name
the endpoint and the key. Readers see the old content or the new one, also after a kill, a full disk
or a lost connection.

Transient faults (resets, timeouts, 5xx, SlowDown) are retried: SEPDIST_STORAGE_ATTEMPTS tries
(default 6) with waits that double from half a second, each bounded by
SEPDIST_STORAGE_TIMEOUT_SECONDS without an answer (default 60). Any other fault raises a
StorageError that names the url, what was tried and what to do, and never a key.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

PART_BYTES = 16 * 2**20  # of a multipart upload, used above twice this; S3 allows 5 MiB or more
NUM_PARTS_AT_ONCE = 4  # bounds the memory of one upload to NUM_PARTS_AT_ONCE * PART_BYTES
MAX_PARTS = 10_000  # of one S3 upload
FIRST_WAIT_SECONDS = 0.5  # before the second try; doubles from try to try
MAX_WAIT_SECONDS = 10.0
MIN_UPLOAD_BYTES_PER_SECOND = 2**16  # a slower upload times out
REMOVAL_TRIES = 10  # of a folder that other processes change meanwhile
TEMP_SUFFIX = ".sepdist-tmp"  # of unfinished files, which are never listed
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HINTS = {
    **dict.fromkeys(DISK_FULL, "; free some space or choose another folder; old content is kept"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "; check the permissions of it and its folder"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "; one of its folders is a file"),
    errno.EROFS: "; choose a folder that can be written",
    errno.EISDIR: "; a file is wanted here",
}
# Codes of transient faults whose status is not 5xx, and codes of a bucket in another region.
_TRANSIENT = ("SlowDown", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict")
_ELSEWHERE = ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_RIGHTS = "what this key may do in this bucket"


class StorageError(OSError):
    """Storage failed; the message names the url, what was tried and what to do, never a key."""


def is_remote(url: str | Path) -> bool:
    """Whether `url` is in object storage; ValueError unless it is s3:// or a plain path."""
    scheme, separator, _ = str(url).partition("://")
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
    """Make a local path absolute, `~` expanded, because workers run in another directory."""
    return str(url) if is_remote(url) else str(_path(url).resolve())


def exists(url: str | Path) -> bool:
    """Whether `url` is a file or a folder; in object storage a folder has something in it."""
    try:
        size(url)
        return True
    except FileNotFoundError:
        return is_remote(url) and bool(_list_page(url, MaxKeys=1)[0])


def size(url: str | Path) -> int:
    """Return the number of bytes of a file; FileNotFoundError names `url`."""
    if not is_remote(url):
        with _local(url, "look at"):
            return _path(url).stat().st_size
    return int(_call(url, "look at", "head_object", **_where(url))["ContentLength"])


def list_names(url: str | Path) -> list[str]:
    """List the names directly below a folder, sorted, folders without a slash; [] if none."""
    if not is_remote(url):
        with _local(url, "list"):
            try:
                names = os.listdir(_path(url))
            except (FileNotFoundError, NotADirectoryError):
                names = []
            return sorted(name for name in names if not name.endswith(TEMP_SUFFIX))
    found, more = set[str](), dict[str, str]()
    while True:
        keys, token = _list_page(url, Delimiter="/", **more)
        found.update(key.rstrip("/").rpartition("/")[2] for key in keys)
        if token is None:
            return sorted(found)
        more = {"ContinuationToken": token}


def read_bytes(url: str | Path) -> bytes:
    """Read a whole file; FileNotFoundError names `url`."""
    if not is_remote(url):
        with _local(url, "read"):
            path = _path(url)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise StorageError(f"cannot read {url}: a pipe or device, which may never end")
            return path.read_bytes()
    return _retry(url, "read", lambda: _filesystem().cat_file("/".join(_split(url))))


def put_bytes(url: str | Path, data: bytes, *, create_only: bool = False) -> None:
    """Write a whole file atomically; with `create_only` FileExistsError if it exists."""
    if is_remote(url):
        _put_object(url, len(data), lambda start, stop: data[start:stop], create_only)
    else:
        _put_local(url, [data], create_only)


def put_file(local: str | Path, url: str | Path) -> None:
    """Copy a local file to `url` atomically, a large one in parts."""
    with _local(local, "read"):
        source = open(_path(local), "rb")  # noqa: SIM115 (reading and writing name other files)
    with source:
        if is_remote(url):
            length, handle = os.fstat(source.fileno()).st_size, source.fileno()
            _put_object(url, length, lambda a, b: os.pread(handle, b - a, a))
        else:
            _put_local(url, iter(lambda: source.read(2**20), b""))


def fetch_file(url: str | Path, local: str | Path) -> None:
    """Copy `url` to the path `local`, which appears only when it is complete."""
    if not is_remote(url):
        put_file(url, local)
        return
    with _local(local, "write"), _temp_beside(_path(local)) as temp:
        _retry(url, "read", lambda: _filesystem().get_file("/".join(_split(url)), str(temp)))
        _publish(temp, _path(local), create_only=False)


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
    return Path(url).expanduser()


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


def _put_local(url: str | Path, blocks: Iterable[bytes], create_only: bool = False) -> None:
    with _local(url, "write"), _temp_beside(_path(url)) as temp:
        with open(temp, "r+b") as file:
            file.writelines(blocks)
        _publish(temp, _path(url), create_only)


@contextlib.contextmanager
def _temp_beside(target: Path) -> Iterator[Path]:
    """Yield a new empty file in the folder of `target`, locked while in use, removed afterwards."""
    try:
        missing = [one for one in (target.parent, *target.parent.parents) if not one.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # would read as if the target existed
        raise disk_error(target, "write", error) from None
    for folder in missing:
        _flush(folder.parent)
    _sweep(target)
    temp, handle = _create_locked(target)
    try:
        yield temp
    finally:
        os.close(handle)
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


def _create_locked(target: Path) -> tuple[Path, int]:
    while True:
        temp = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{TEMP_SUFFIX}")
        handle = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else another process swept it before it was locked
            return temp, handle
        os.close(handle)


def _sweep(target: Path) -> None:
    """Remove the files of killed writers of `target`, whose locks ended with them."""
    for temp in target.parent.iterdir():
        if temp.name.startswith(f".{target.name}.") and temp.name.endswith(TEMP_SUFFIX):
            gone_or_locked = (FileNotFoundError, BlockingIOError, PermissionError)
            with contextlib.suppress(*gone_or_locked), open(temp, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temp.unlink()


def _publish(temp: Path, target: Path, create_only: bool) -> None:
    """Give the finished `temp` its name; after this it survives a crash of the machine."""
    _flush(temp)
    if create_only:
        os.link(temp, target)  # atomic, and unlike a rename refuses to replace
    else:
        os.replace(temp, target)
    _flush(target.parent)


# Object storage.


def _timeout_seconds() -> float:
    return float(os.environ.get("SEPDIST_STORAGE_TIMEOUT_SECONDS", "60"))


def _filesystem() -> Any:
    """Return this process's s3fs for the current AWS_* variables; a forked child gets its own."""
    variables = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    return _connect(os.getpid(), _timeout_seconds(), hash(variables))


@lru_cache(maxsize=4)
def _connect(pid: int, timeout_seconds: float, variables: int) -> Any:
    import s3fs

    timeouts = {"connect_timeout": min(10.0, timeout_seconds), "read_timeout": timeout_seconds}
    filesystem = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,  # others write too
        # `_retry` is the one place that tries again.
        config_kwargs={**timeouts, "retries": {"total_max_attempts": 1}},
    )
    filesystem.retries = 1
    filesystem.connect()  # takes a second, which must not count as a request's time
    return filesystem


def _split(url: str | Path, *, whole_bucket: bool = False) -> tuple[str, str]:
    bucket, _, key = str(url).removeprefix("s3://").partition("/")
    if not bucket or not (key.strip("/") or whole_bucket):
        raise ValueError(f"{url}: give s3://bucket/prefix, a bucket and a name in it")
    return bucket, key.strip("/")


def _where(url: str | Path) -> dict[str, str]:
    bucket, key = _split(url)
    return {"Bucket": bucket, "Key": key}


def _endpoint() -> str:
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not given:
        return "AWS's own endpoint (AWS_ENDPOINT_URL is not set)"
    parts = urlsplit(given)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without user:password@


def _call(url: str | Path, action: str, method: str, **arguments: Any) -> Any:
    return _retry(url, action, lambda: _request(method, **arguments))


def _request(method: str, **arguments: Any) -> Any:
    """Make one S3 request; s3fs bounds the wait for an answer, but not that to send the body."""
    from fsspec.asyn import sync

    filesystem = _filesystem()
    seconds = _timeout_seconds() + len(arguments.get("Body", b"")) / MIN_UPLOAD_BYTES_PER_SECOND

    async def bounded() -> Any:
        return await asyncio.wait_for(filesystem._call_s3(method, **arguments), seconds)

    return sync(filesystem.loop, bounded)


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
    refused = _call(url, "remove", "delete_objects", Bucket=bucket, Delete=batch).get("Errors", [])
    if refused:
        codes = ", ".join(sorted({str(one.get("Code")) for one in refused}))
        what = f"{_endpoint()} refused {len(refused)} objects ({codes})"
        raise StorageError(f"cannot remove {url}: {what}; check {_RIGHTS}")


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
        with ThreadPoolExecutor(NUM_PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
            parts = list(pool.map(put_part, range(1, -(-length // part_bytes) + 1)))
        finish("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
    except BaseException:
        # The error under way says more than one of the clean-up; a lifecycle rule does the rest.
        with contextlib.suppress(OSError):
            _call(url, "abort the upload of", "abort_multipart_upload", **ours)
        raise


def _retry(url: str | Path, action: str, function: Callable[[], _T]) -> _T:
    """Call `function` until it succeeds, fails for good or uses up its attempts."""
    attempts = max(1, int(os.environ.get("SEPDIST_STORAGE_ATTEMPTS", "6")))
    for attempt in range(1, attempts + 1):
        try:
            return function()
        except Exception as error:
            explained = _explain(url, action, error, attempt)
            if attempt == attempts or not _is_transient(error):
                # Without the cause: botocore's do not survive pickling and may carry headers.
                raise explained from None
            longest = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), MAX_WAIT_SECONDS)
            seconds = longest * random.SystemRandom().uniform(0.5, 1.0)
            tried = f"attempt {attempt} of {attempts}"
            logger.warning("%s (%s); again in %.1f s", explained, tried, seconds)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def _code(error: BaseException) -> tuple[str, int]:
    """Return the S3 error code and the HTTP status of an answer; ("", 0) if there was none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return "", 0
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _is_transient(error: BaseException) -> bool:
    """Whether the request may succeed later: no answer, a broken one, or one that says so."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    code, status = _code(error)
    if status:
        return status >= 500 or status == 429 or code in _TRANSIENT
    no_answer = (boto.HTTPClientError, boto.ConnectionError, ConnectionError, TimeoutError)
    broken_answer = (boto.IncompleteReadError, aiohttp.ClientError, ResponseParserError)
    return isinstance(error, no_answer + broken_answer)


def _explain(url: str | Path, action: str, error: BaseException, attempt: int) -> Exception:
    """Build the exception to raise: for a user FileNotFoundError, FileExistsError, StorageError."""
    from botocore import exceptions as boto

    code, status = _code(error)
    tried, kind = f" after {attempt} attempt{'s' * (attempt > 1)}", type(error).__name__
    if code == "NoSuchBucket":
        what = "has no such bucket; create it or correct the url"
    elif status == 404 or (not status and isinstance(error, FileNotFoundError)):
        return FileNotFoundError(f"{url}: no such object at {_endpoint()} ({code or 404})")
    elif status == 412:
        return FileExistsError(f"{url}: exists already")
    elif status in (301, 307) or code in _ELSEWHERE:
        what = f"says that the bucket is in another region ({code}); set AWS_REGION to it"
    elif status in (401, 403):
        todo = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        what = f"rejected the key ({code or status}); {todo}, and {_RIGHTS}"
    elif status:
        busy = "the service is busy or failing, try again later"
        todo = busy if _is_transient(error) else "check the url"
        what = f"answered {status} {code}{tried}; {todo}"
    elif isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        what = "needs a key; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif isinstance(error, boto.ReadTimeoutError | boto.ConnectTimeoutError | TimeoutError):
        todo = "check AWS_ENDPOINT_URL and the network, or raise SEPDIST_STORAGE_TIMEOUT_SECONDS"
        what = f"gave no answer within {_timeout_seconds():g} s{tried}; {todo}"
    elif isinstance(error, boto.EndpointConnectionError):
        todo = "check AWS_ENDPOINT_URL and that the service runs"
        what = f"cannot be reached{tried} (refused, or no such host); {todo}"
    elif _is_transient(error):
        what = f"broke off the connection{tried} ({kind}); check the network"
    elif isinstance(error, OSError) and error.errno is not None:
        return error  # of the local file, which `_local` names
    else:
        what = f"failed ({kind}); check AWS_ENDPOINT_URL, AWS_REGION and the url"
    return StorageError(f"cannot {action} {url}: {_endpoint()} {what}")
