"""Send one request to S3 by s3fs, and say what its failure means; `storage` is what others call.

Every request is sent with the credentials that boto finds (variables, files, roles), and once more
with fresh ones if these are refused, because tokens expire and credentials files are rotated.
"""

import asyncio
import email.utils
import os
import re
import threading
import time
from functools import lru_cache
from typing import Any

MIN_UPLOAD_BYTES_PER_SECOND = 2**16  # a slower upload times out
MAX_CLOCK_MINUTES = 5  # that services tolerate at least; more explains a refused signature
# Codes of transient faults whose status is not 5xx, and codes of a bucket in another region.
_TRANSIENT: tuple[str, ...] = ("RequestTimeout", "OperationAborted", "ConditionalRequestConflict")
_TRANSIENT += ("SlowDown", "InternalError", "ServiceUnavailable")  # also of one key of a batch
_ELSEWHERE = ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
RIGHTS = "what this key may do in this bucket"
_TOKEN = {
    **dict.fromkeys(_EXPIRED, "the session token has expired, renew it where the key comes from"),
    "InvalidToken": "renew AWS_SESSION_TOKEN, or unset it if the key has none",
}
_PROXIES = "HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
_WITHOUT_ANSWER = {  # by a pattern of the error's name
    "NoCred|PartialCred": "needs a key; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "Prox": f"is behind a proxy that gives no way{{tried}}; check {_PROXIES}",
    "Credential|Token|SSO|Login|Profile|Config|FileNotFound": "needs a key, and there is none "
    "({kind}); check AWS_PROFILE, the files of ~/.aws and the programs that they name",
    "Timeout": "gave no answer within {timeout:g} s{tried}; check AWS_ENDPOINT_URL and the "
    "network, or raise SEPDIST_STORAGE_TIMEOUT_SECONDS",
    "SSL": "has no TLS that is trusted here{tried}; set http:// or https:// in AWS_ENDPOINT_URL as "
    "the server does, or AWS_CA_BUNDLE to the file of its authority",
    "EndpointConnection": "cannot be reached{tried} (refused, or no such host); check "
    "AWS_ENDPOINT_URL and that the service runs",
    "Parser|^HTTPClientError|Recursion": f"does not answer as S3 does{{tried}} ({{kind}}); check "
    f"AWS_ENDPOINT_URL and {_PROXIES}",
    "Connection|Client|Incomplete": "broke off the connection{tried} ({kind}); check the network",
    "": "failed ({kind}); check AWS_ENDPOINT_URL, AWS_REGION and the url",
}


class StorageError(OSError):
    """Storage failed; the message names the url, what was tried and what to do, never a key."""


def seconds_of(variable: str, default: float) -> float:
    """Return the number of seconds in an environment variable, `default` if it is not set."""
    given = os.environ.get(variable, "")
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)?", given):
        raise ValueError(f"{variable}={given}: give a number of seconds")
    return float(given or default)


def _timeout_seconds() -> float:
    return seconds_of("SEPDIST_STORAGE_TIMEOUT_SECONDS", 60)


def endpoint() -> str:
    """Return the endpoint as messages show it, without user:password@; StorageError if no url."""
    name = "AWS_ENDPOINT_URL_S3" if os.environ.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL"
    if not os.environ.get(name):
        return "AWS's own endpoint (AWS_ENDPOINT_URL is not set)"
    scheme, separator, rest = os.environ[name].rpartition("://")
    rest = rest.rpartition("@")[2].partition("?")[0]
    shown = f"{scheme}{separator}{rest}"
    if not separator:
        raise StorageError(f"{name}={shown} has no scheme; set http://{rest.lstrip('/')}")
    if not re.fullmatch(r"https?://[^/\s:]+(:\d+)?(/\S*)?|https?://\[\S+", shown):
        raise StorageError(f"{name}={shown} is no url; set http://host:port or https://host:port")
    return shown


# The connection.

_generation = 0  # of credentials
_lock = threading.Lock()
# A child must not inherit it while another thread connects.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)


@lru_cache(maxsize=4)
def _connect(pid: int, timeout_seconds: float, variables: int, generation: int) -> Any:
    import s3fs

    timeouts = {"connect_timeout": min(10.0, timeout_seconds), "read_timeout": timeout_seconds}
    filesystem = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,  # others write too
        client_kwargs={"region_name": os.environ.get("AWS_REGION") or None},  # not read by botocore
        # `storage` is the one place that tries again.
        config_kwargs={**timeouts, "retries": {"total_max_attempts": 1}},
    )
    filesystem.retries = 1
    filesystem.connect()  # takes a second, which must not count as a request's time
    return filesystem


def request(method: str, most: int = 2**62, **arguments: Any) -> Any:
    """Make one request; the `Body` of an answer is bytes, `most` of it if it is over twice that.

    The process, and each child that it forks, has one s3fs for its current AWS_* variables.
    """
    from fsspec.asyn import sync

    global _generation
    variables = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    refused = -1  # the generation of the credentials that were
    while True:
        with _lock:  # threads share a connection
            _generation = used = max(_generation, refused + 1)
            filesystem = _connect(os.getpid(), _timeout_seconds(), hash(variables), used)
        try:
            return sync(filesystem.loop, _send, filesystem, method, most, arguments)
        except Exception as error:
            if refused >= 0 or not is_refusal(error):
                raise
        refused = used


async def _send(filesystem: Any, method: str, most: int, arguments: dict[str, Any]) -> Any:
    from botocore.exceptions import ClientError
    from botocore.parsers import ResponseParserError

    # s3fs bounds the wait for an answer, but not the time to send a body.
    seconds = _timeout_seconds() + len(arguments.get("Body", b"")) / MIN_UPLOAD_BYTES_PER_SECOND
    try:
        answer = await asyncio.wait_for(filesystem._call_s3(method, **arguments), seconds)
    except OSError as error:
        if method == "head_object" and _answer(error)[1] in (400, 401, 403):
            # The answer to a HEAD cannot say why.
            (await filesystem._call_s3("get_object", **arguments))["Body"].close()
        raise
    for one in answer.get("Errors", ()):
        raise ClientError({"Error": one, "ResponseMetadata": {"HTTPStatusCode": 400}}, method)
    headers = answer["ResponseMetadata"].get("HTTPHeaders", {})
    if "etag" not in headers and headers.get("content-type", "").startswith("text/html"):
        raise ResponseParserError("the web page of a proxy or of another server")
    if "Body" in answer:
        async with answer["Body"] as body:
            length, data = answer["ContentLength"], bytearray()
            wanted = most if length > 2 * most else length + 1  # 1 more: checks the length
            while len(data) < wanted and (block := await body.read(wanted - len(data))):
                data += block
        answer["Body"] = bytes(data)
    return answer


# What an error means.


def _answer(error: BaseException) -> tuple[str, int, dict[str, str]]:
    """Return the S3 error code, HTTP status and headers of an answer; ("", 0, {}) if none came."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return "", 0, {}
    about = response.get("ResponseMetadata", {})
    code = str(response.get("Error", {}).get("Code", ""))
    return code, int(about.get("HTTPStatusCode", 0)), about.get("HTTPHeaders", {})


def is_refusal(error: BaseException) -> bool:
    """Whether the server refused the key: one of today may be accepted."""
    code, status, _ = _answer(error)
    return status in (401, 403) or code in _TOKEN


def is_transient(error: BaseException) -> bool:
    """Whether the request may succeed later: no answer, a broken one, or one that says so."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    code, status, _ = _answer(error)
    if status:
        return (status >= 500 and status != 501) or status == 429 or code in _TRANSIENT
    no_answer = (boto.HTTPClientError, boto.ConnectionError, ConnectionError, TimeoutError)
    broken_answer = (boto.IncompleteReadError, aiohttp.ClientError, ResponseParserError)
    # An unknown certificate, or a port without TLS.
    lasting = re.search("(?i)certificate|wrong_version", str(error))
    wrong_tls = isinstance(error, boto.SSLError) and lasting
    return isinstance(error, no_answer + broken_answer) and not wrong_tls


def explain(url: str, action: str, error: BaseException, tried: str) -> Exception:
    """Build the exception to raise: FileNotFoundError, FileExistsError or StorageError."""
    code, status, headers = _answer(error)
    page = code in ("", str(status)) and "text/html" in headers.get("content-type", "")
    if page and not (status == 404 and action == "look at"):  # the answer to a HEAD says less
        todo = f"a proxy or another server is there; check {_PROXIES} and AWS_ENDPOINT_URL"
        what = f"answered {status} with a web page{tried}; {todo}"
    elif code == "NoSuchBucket":
        what = "has no such bucket; create it or correct the url"
    elif status == 404:
        return FileNotFoundError(f"{url}: no such object at {endpoint()} ({code or 404})")
    elif status == 412 and action == "read":
        what = "says that the object was replaced while it was read; read it again"
    elif status == 412:
        return FileExistsError(f"{url}: exists already")
    elif status in (301, 307) or code in _ELSEWHERE:
        what = f"says that the bucket is in another region ({code}); set AWS_REGION to it"
    elif status in (401, 403, 407) or code in _TOKEN:
        what = _refusal(code, status, headers)
    elif status:
        busy = "the service is busy or failing, try again later"
        todo = busy if is_transient(error) else f"check the url, and {RIGHTS}"
        what = f"answered {status} {code}{tried}; {todo}"
    else:
        text = next(v for k, v in _WITHOUT_ANSWER.items() if re.search(k, type(error).__name__))
        kind = type(getattr(error, "kwargs", {}).get("error") or error).__name__
        what = text.format(kind=kind, tried=tried, timeout=_timeout_seconds())
    return StorageError(f"cannot {action} {url}: {endpoint()} {what}")


def _refusal(code: str, status: int, headers: dict[str, str]) -> str:
    date = email.utils.parsedate_tz(headers.get("date", ""))
    minutes = abs(time.time() - email.utils.mktime_tz(date)) / 60 if date else 0
    if minutes > MAX_CLOCK_MINUTES or code == "RequestTimeTooSkewed":
        clocks = f"this machine's clock and the server's differ by about {minutes:.0f} minutes"
        return f"refused the signature ({code or status}); {clocks}, set this machine's"
    todo = f"check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and {RIGHTS}"
    return f"rejected the key ({code or status}); {_TOKEN.get(code, todo)}"
