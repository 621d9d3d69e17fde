"""The one door to local disk and to object storage: bytes and files in and out, whole or not at all.

In: a local path or "s3://bucket/prefix" (any S3 service; the standard AWS_* variables say where and with which key,
AWS_ENDPOINT_URL among them). Out: bytes, names, and puts that are atomic: a reader sees the old content or the new one,
also after a kill, a full disk or a lost connection.

Faults that pass (resets, timeouts, 5xx, SlowDown) get SEPDIST_STORAGE_ATTEMPTS tries (default 6, with waits that double
from half a second), each bounded by SEPDIST_STORAGE_TIMEOUT_SECONDS of silence (default 60). What remains is a
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

PART_BYTES = (
    16 * 2**20
)  # above twice this an upload goes in parts of this size; S3 allows no smaller ones than 5 MiB
FIRST_WAIT_SECONDS = 0.5  # before the second try; doubles from try to try, up to 10 s
MIN_UPLOAD_BYTES_PER_SECOND = 2**16  # an upload slower than this is given up
NUM_PARTS_AT_ONCE = 4  # bounds the memory of one upload to NUM_PARTS_AT_ONCE * PART_BYTES
MAX_PARTS = 10_000  # of one S3 upload
REMOVAL_TRIES = 10  # of a folder that others write to or remove from meanwhile
TEMP_SUFFIX = ".sepdist-tmp"  # of files that are not finished yet; never listed
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TRANSIENT_CODES = {
    "SlowDown",
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",
}  # those that are not 5xx
_REDIRECTS = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}


class StorageError(OSError):
    """Storage failed; the message names the url, what was tried and what to do, and never a key."""


def is_remote(url: str | Path) -> bool:
    """Whether `url` is in object storage; ValueError for a scheme that is neither s3:// nor a plain path."""
    scheme, separator, _ = str(url).partition("://")
    if separator and scheme != "s3":
        raise ValueError(
            f"{url}: {scheme}:// is not supported; give a local path or s3://bucket/prefix"
        )
    return bool(separator)


def join(url: str | Path, *parts: str) -> str:
    """`url` with `parts` below it, for both kinds."""
    base = str(url)
    is_remote(base)
    return "/".join(
        [base if base.endswith("://") else base.rstrip("/"), *(part.strip("/") for part in parts)]
    )


def absolute(url: str | Path) -> str:
    """`url` in a form that means the same in every working directory: `~` expanded, made absolute.

    Workers run elsewhere, so every path of a config goes through here before it is handed on.
    """
    return str(url) if is_remote(url) else str(_path(url).resolve())


def exists(url: str | Path) -> bool:
    """Whether a file, or a folder with something in it (locally any folder), is there."""
    if not is_remote(url):
        with _local(url, "look at"):
            return _path(url).exists()
    try:
        size(url)
        return True
    except FileNotFoundError:
        return bool(_list_page(url, MaxKeys=1)[0])


def size(url: str | Path) -> int:
    """Bytes of a file; FileNotFoundError names `url`."""
    if not is_remote(url):
        with _local(url, "look at"):
            return _path(url).stat().st_size
    bucket, key = _split(url)
    return int(_call(url, "look at", "head_object", Bucket=bucket, Key=key)["ContentLength"])


def list_names(url: str | Path) -> list[str]:
    """The names directly below a folder, sorted, folders without a slash; [] if there are none."""
    if not is_remote(url):
        with _local(url, "list"):
            try:
                return sorted(
                    name for name in os.listdir(_path(url)) if not name.endswith(TEMP_SUFFIX)
                )
            except (FileNotFoundError, NotADirectoryError):
                return []
    names, more = set[str](), dict[str, str]()
    while True:
        keys, token = _list_page(url, Delimiter="/", **more)
        names.update(key.rstrip("/").rpartition("/")[2] for key in keys)
        if token is None:
            return sorted(names)
        more = {"ContinuationToken": token}


def read_bytes(url: str | Path, start: int | None = None, end: int | None = None) -> bytes:
    """The file's bytes from `start` up to `end`, cut at its end as a slice is; FileNotFoundError names `url`."""
    assert (start or 0) >= 0 and (end is None or end >= (start or 0)), (start, end)
    if not is_remote(url):
        with _local(url, "read"), open(_path(url), "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))
    if end is not None and end == (start or 0):
        return b""
    bucket, key = _split(url)
    limits = {} if start is None and end is None else {"start": start or 0, "end": end}
    try:
        return _retry(url, "read", lambda: _filesystem().cat_file(f"{bucket}/{key}", **limits))
    except _BeyondEndError:
        return b""


def put_bytes(url: str | Path, data: bytes, *, create_only: bool = False) -> None:
    """Write `data` as the whole file, atomically; with `create_only` FileExistsError where there is one already."""
    if not is_remote(url):
        with _local(url, "write"), _temp_beside(_path(url)) as temp:
            _write_through(temp, [data])
            _publish(temp, _path(url), create_only)
        return
    view = memoryview(data)
    _put_object(url, len(data), lambda start, stop: bytes(view[start:stop]), create_only)


def put_file(local: str | Path, url: str | Path, *, create_only: bool = False) -> None:
    """Copy the file at `local` to `url`, atomically, large ones in parts; `create_only` as in `put_bytes`."""
    with _local(local, "read"):
        source = open(_path(local), "rb")  # noqa: SIM115 (opening and writing name different files)
    with source:
        if is_remote(url):
            length = os.fstat(source.fileno()).st_size
            _put_object(url, length, lambda a, b: os.pread(source.fileno(), b - a, a), create_only)
            return
        with _local(url, "write"), _temp_beside(_path(url)) as temp:
            _write_through(temp, iter(lambda: source.read(2**20), b""))
            _publish(temp, _path(url), create_only)


def fetch_file(url: str | Path, local: str | Path) -> None:
    """Copy the file at `url` to the path `local`, which appears only when it is complete."""
    if not is_remote(url):
        put_file(_path(url), local)
        return
    bucket, key = _split(url)
    target = _path(local)
    with _local(target, "write"), _temp_beside(target) as temp:
        _retry(url, "read", lambda: _filesystem().get_file(f"{bucket}/{key}", str(temp)))
        _publish(temp, target, create_only=False)


def remove(url: str | Path) -> None:
    """Remove a file or a whole folder; what is not there is fine, and so is another process that removes it too."""
    if not is_remote(url):
        with _local(url, "remove"):
            _remove_path(_path(url))
        return
    bucket, key = _split(url)
    names, folders = [key], {key + "/"}
    while names:
        _delete_objects(url, bucket, names)
        names = _list_page(url, MaxKeys=1000)[0]
        folders.update(
            name[: at + 1]
            for name in names
            for at in range(len(key) + 1, len(name))
            if name[at] == "/"
        )
    # The markers that consoles make of folders; some services go on listing an empty folder while it has one.
    markers = sorted(folders, key=len, reverse=True)
    for start in range(0, len(markers), 1000):
        _delete_objects(url, bucket, markers[start : start + 1000])


# Local disk.


def _path(url: str | Path) -> Path:
    return Path(url).expanduser()


@contextlib.contextmanager
def _local(url: str | Path, action: str) -> Iterator[None]:
    """Turn what the operating system says about a local file into messages that name it and say what to do."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.args[0] if error.errno is None else f"{url}: no such file"
        ) from None
    except FileExistsError:
        raise FileExistsError(f"{url}: exists already") from None
    except OSError as error:
        if error.errno == errno.ENOTDIR and action in ("read", "look at"):
            raise FileNotFoundError(f"{url}: no such file") from None
        raise disk_error(url, action, error) from error


def disk_error(url: str | Path, action: str, error: OSError) -> StorageError:
    """What to tell a user when the operating system refuses `action` on a local file."""
    reason = error.strerror or type(error).__name__
    if error.errno in DISK_FULL:
        what = "what was there before is unchanged"
        return StorageError(
            f"cannot {action} {url}: {reason}; free some space or choose another folder, {what}"
        )
    hints = {
        errno.EACCES: "; check the permissions of the file and of its folder",
        errno.EPERM: "; check the permissions of the file and of its folder",
        errno.EROFS: "; choose a folder that can be written",
        errno.EISDIR: "; a file is wanted here",
        errno.ENOTDIR: "; one of its folders is a file",
        errno.EEXIST: "; one of its folders is a file",
    }
    return StorageError(f"cannot {action} {url}: {reason}{hints.get(error.errno or 0, '')}")


@contextlib.contextmanager
def _temp_beside(target: Path) -> Iterator[Path]:
    """A new empty file in the folder of `target`, locked while in use and gone afterwards."""
    try:
        _make_folder(target.parent)
    except FileExistsError as error:  # would read as if the target existed
        raise disk_error(target, "write", error) from None
    _sweep(target)
    temp, handle = _create_locked(target)
    try:
        yield temp
    finally:
        os.close(handle)
        temp.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make it and its parents; after this they survive a crash of the machine."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        _flush_folder(one.parent)


def _flush_folder(folder: Path) -> None:
    """Names made in and removed from `folder` so far survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
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
            _flush_folder(path.parent)
            return
        except OSError as error:  # something in it was gone already, or was added meanwhile
            if error.errno == errno.ENOENT and not os.path.lexists(path):
                return
            if not tries_left or error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise


def _create_locked(target: Path) -> tuple[Path, int]:
    while True:
        temp = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{TEMP_SUFFIX}")
        handle = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else another process swept it between our open and our lock
            return temp, handle
        os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what killed writers of `target` left: their locks ended with them."""
    for name in os.listdir(target.parent):
        if name.startswith(f".{target.name}.") and name.endswith(TEMP_SUFFIX):
            with contextlib.suppress(FileNotFoundError, BlockingIOError, PermissionError):
                handle = os.open(target.with_name(name), os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    target.with_name(name).unlink()
                finally:
                    os.close(handle)


def _write_through(temp: Path, blocks: Iterable[bytes]) -> None:
    with open(temp, "r+b") as file:
        for block in blocks:
            file.write(block)


def _publish(temp: Path, target: Path, create_only: bool) -> None:
    """Give the finished `temp` its name; after this it survives a crash of the machine."""
    with open(temp, "rb") as file:
        os.fsync(file.fileno())
    if create_only:
        os.link(temp, target)  # atomic, and unlike a rename refuses to replace
    else:
        os.replace(temp, target)
    _flush_folder(target.parent)


# Object storage.


class _BeyondEndError(Exception):
    """A range starts behind the end of the object (HTTP 416)."""


def _attempts() -> int:
    return max(1, int(os.environ.get("SEPDIST_STORAGE_ATTEMPTS", "6")))


def _timeout_seconds() -> float:
    return float(os.environ.get("SEPDIST_STORAGE_TIMEOUT_SECONDS", "60"))


def _filesystem() -> Any:
    """The s3fs instance of this process for the present AWS_* variables; a forked child gets one of its own."""
    variables = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    return _connect(os.getpid(), _timeout_seconds(), hash(variables))


@lru_cache(maxsize=4)
def _connect(pid: int, timeout_seconds: float, variables: int) -> Any:
    import s3fs

    filesystem = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,  # others write too
        config_kwargs={
            "connect_timeout": min(10.0, timeout_seconds),
            "read_timeout": timeout_seconds,
            "retries": {"total_max_attempts": 1},  # `_retry` is the one place that tries again
        },
    )
    filesystem.retries = 1
    filesystem.connect()  # here, as it takes a second and is no part of a request's time
    return filesystem


def _split(url: str | Path, *, whole_bucket: bool = False) -> tuple[str, str]:
    bucket, _, key = str(url).removeprefix("s3://").partition("/")
    if not bucket or not (key.strip("/") or whole_bucket):
        raise ValueError(f"{url}: give s3://bucket/prefix, a bucket and a name in it")
    return bucket, key.strip("/")


def _endpoint() -> str:
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not given:
        return "AWS's own endpoint (AWS_ENDPOINT_URL is not set)"
    parts = urlsplit(given)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # an endpoint may carry user:password@


def _call(url: str | Path, action: str, method: str, **arguments: Any) -> Any:
    return _retry(url, action, lambda: _request(method, **arguments))


def _request(method: str, **arguments: Any) -> Any:
    """One S3 request. What s3fs uses bounds only the wait for an answer, not that for a server to take the body."""
    from fsspec.asyn import sync

    filesystem = _filesystem()
    seconds = _timeout_seconds() + len(arguments.get("Body", b"")) / MIN_UPLOAD_BYTES_PER_SECOND

    async def bounded() -> Any:
        return await asyncio.wait_for(filesystem._call_s3(method, **arguments), seconds)

    return sync(filesystem.loop, bounded)


def _list_page(url: str | Path, **arguments: Any) -> tuple[list[str], str | None]:
    """One page of keys and common prefixes below `url`, and the token of the next page."""
    bucket, key = _split(url, whole_bucket=True)
    prefix = key and key + "/"
    page = _call(url, "list", "list_objects_v2", Bucket=bucket, Prefix=prefix, **arguments)
    keys = [one["Key"] for one in page.get("Contents", [])] + [
        one["Prefix"] for one in page.get("CommonPrefixes", [])
    ]
    return [key for key in keys if key != prefix], page.get("NextContinuationToken")


def _delete_objects(url: str | Path, bucket: str, keys: list[str]) -> None:
    batch = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    refused = _call(url, "remove", "delete_objects", Bucket=bucket, Delete=batch).get("Errors", [])
    if refused:
        codes = ", ".join(sorted({str(one.get("Code")) for one in refused}))
        todo = "check what this key may do in this bucket"
        raise StorageError(
            f"cannot remove {url}: {len(refused)} objects were refused ({codes}) by {_endpoint()}; {todo}"
        )


def _put_object(
    url: str | Path, length: int, block: Callable[[int, int], bytes], create_only: bool
) -> None:
    """Upload `length` bytes, which `block(start, stop)` supplies; the object appears whole or not at all.

    Not by `open(url, "wb")`: leaving that by an exception publishes what was written so far.
    """
    bucket, key = _split(url)
    where = {"Bucket": bucket, "Key": key}
    condition = {"IfNoneMatch": "*"} if create_only else {}
    mark = {"sepdist-put": uuid.uuid4().hex}

    def finish(method: str, **arguments: Any) -> None:
        try:
            _call(url, "write", method, **where, **condition, **arguments)
        except (FileExistsError, FileNotFoundError):  # the second: the upload is not there any more
            # A request is also sent again, by us or by aiohttp, when it had arrived and only the answer was lost.
            if _call(url, "look at", "head_object", **where)["Metadata"] != mark:
                raise

    if length <= 2 * PART_BYTES:
        finish("put_object", Body=block(0, length), Metadata=mark)
        return
    part_bytes = max(PART_BYTES, -(-length // MAX_PARTS))
    upload = _call(url, "write", "create_multipart_upload", **where, Metadata=mark)["UploadId"]

    def put_part(number: int) -> dict[str, Any]:
        body = block(number * part_bytes, min((number + 1) * part_bytes, length))
        done = _call(
            url, "write", "upload_part", **where, UploadId=upload, PartNumber=number + 1, Body=body
        )
        return {"PartNumber": number + 1, "ETag": done["ETag"]}

    try:
        with ThreadPoolExecutor(NUM_PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
            parts = list(pool.map(put_part, range(-(-length // part_bytes))))
        finish("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
    except BaseException:
        with contextlib.suppress(
            OSError
        ):  # the error under way says more; a lifecycle rule collects leftovers
            _call(url, "abort the upload of", "abort_multipart_upload", **where, UploadId=upload)
        raise


def _retry(url: str | Path, action: str, function: Callable[[], _T]) -> _T:
    """Call `function` until it succeeds, fails for good or the attempts are used up; raises what `_explain` says."""
    attempts = _attempts()
    for attempt in range(1, attempts + 1):
        try:
            return function()
        except Exception as error:
            explained = _explain(url, action, error, attempt)
            if attempt == attempts or not _is_transient(error):
                # Without the cause: botocore's exceptions do not survive pickling, and may carry request headers.
                raise explained from None
            seconds = min(
                FIRST_WAIT_SECONDS * 2 ** (attempt - 1), 10.0
            ) * random.SystemRandom().uniform(0.5, 1.0)
            logger.warning(
                "%s (attempt %d of %d); again in %.1f s", explained, attempt, attempts, seconds
            )
            time.sleep(seconds)
    raise AssertionError("unreachable")


def _code(error: BaseException) -> tuple[str, int]:
    """The S3 error code and the HTTP status of an answer; ("", 0) where there was none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return "", 0
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment: no answer at all, a broken one, or a server that says so."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    code, status = _code(error)
    if status:
        return status >= 500 or status == 429 or code in _TRANSIENT_CODES
    no_answer = (boto.HTTPClientError, boto.ConnectionError, ConnectionError, TimeoutError)
    broken_answer = (boto.IncompleteReadError, aiohttp.ClientError, ResponseParserError)
    return isinstance(error, no_answer + broken_answer)


def _explain(url: str | Path, action: str, error: BaseException, attempt: int) -> Exception:
    """What to raise for `error`: FileNotFoundError, FileExistsError or a StorageError that says what to do."""
    from botocore import exceptions as boto

    code, status = _code(error)
    what, tried = (
        f"cannot {action} {url}: {_endpoint()}",
        f" after {attempt} attempt{'s' * (attempt > 1)}",
    )
    if code == "NoSuchBucket":
        return StorageError(f"{what} has no such bucket; create it or correct the url")
    if status == 404 or (not status and isinstance(error, FileNotFoundError)):
        return FileNotFoundError(f"{url}: no such object at {_endpoint()} ({code or 404})")
    if status == 412:
        return FileExistsError(f"{url}: exists already")
    if status == 416:
        return _BeyondEndError()
    if status in (301, 307) or code in _REDIRECTS:
        return StorageError(
            f"{what} says that the bucket is in another region ({code}); set AWS_REGION to it"
        )
    if status in (401, 403):
        todo = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what this key may do in this bucket"
        return StorageError(f"{what} rejected the key ({code or status}); {todo}")
    if status:
        hint = (
            "the service is busy or failing, try again later"
            if _is_transient(error)
            else "check the url"
        )
        return StorageError(f"{what} answered {status} {code}{tried}; {hint}")
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return StorageError(f"{what} needs a key; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto.ReadTimeoutError | boto.ConnectTimeoutError | TimeoutError):
        todo = "check AWS_ENDPOINT_URL and the network, or raise SEPDIST_STORAGE_TIMEOUT_SECONDS"
        return StorageError(f"{what} gave no answer within {_timeout_seconds():g} s{tried}; {todo}")
    if isinstance(error, boto.EndpointConnectionError):
        todo = "check AWS_ENDPOINT_URL and that the service runs"
        return StorageError(f"{what} cannot be reached{tried} (refused, or no such host); {todo}")
    if _is_transient(error):
        return StorageError(
            f"{what} broke off the connection{tried} ({type(error).__name__}); check the network"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return error  # of the local file, which `_local` names
    return StorageError(
        f"{what} failed ({type(error).__name__}); check AWS_ENDPOINT_URL, AWS_REGION and the url"
    )
