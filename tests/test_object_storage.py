"""The connection to S3: refused credentials, wrong endpoints, proxies, TLS, and how many requests.

The server is a few lines here, because a real one cannot be told to refuse, or what time it is.
"""

import email.utils
import functools
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from sepdist import object_storage, storage
from sepdist.storage import StorageError
from tests.support.s3server import ADMIN, READ_ONLY, S3Server

URL = "s3://bucket/x"
LOADER = functools.cache(botocore.session.create_loader)  # parses its files once: 0.1 s each time


class Store(ThreadingHTTPServer):
    """A bucket with one object that answers `key`, and tells all others `status` and `code`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.status, self.code = "new", 403, "InvalidAccessKeyId"
        self.seconds_ahead = 0.0
        self.page: bytes | None = None  # sent in place of every answer
        self.data, self.etag = b"content", '"1"'
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response_only(status)
        ahead = time.time() + self.server.seconds_ahead
        lengths = {"Content-Length": str(len(body)), "Date": email.utils.formatdate(ahead)}
        for name, value in (lengths | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        store, sent = self.server, int(self.headers.get("Content-Length", "0"))
        self.rfile.read(sent)
        store.requests.append(f"{self.command} {self.path}")
        html = {"Content_Type": "text/html; charset=utf-8"}
        if store.page is not None:
            self.answer(store.status, store.page, **html)
        elif f"Credential={store.key}/" not in self.headers.get("Authorization", ""):
            text = f"<Error><Code>{store.code}</Code><Message>no</Message></Error>"
            self.answer(store.status, text.encode(), Content_Type="application/xml")
        elif self.command == "GET" and "list-type" in self.path:
            self.answer(200, b"<ListBucketResult></ListBucketResult>")
        elif self.command == "GET" and self.headers.get("If-Match", store.etag) != store.etag:
            self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        elif part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            self.answer(206, store.data[int(part[1]) : int(part[2]) + 1], ETag=store.etag)
        else:
            self.answer(200, b"" if self.command == "PUT" else store.data, ETag=store.etag)

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store, whose key this process takes from `tmp_path/credentials`, which says "old"."""
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(botocore.session, "create_loader", LOADER)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    store = Store()
    for name, value in {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": store.endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    write_key(tmp_path, "old")
    yield store
    store.shutdown()
    store.server_close()


def write_key(folder: Path, key: str, secret: str = "hidden-secret", token: str = "") -> None:
    lines = ["[default]", f"aws_access_key_id = {key}", f"aws_secret_access_key = {secret}"]
    lines += [f"aws_session_token = {token}"] * bool(token)
    (folder / "credentials").write_text("\n".join(lines) + "\n")


def num_connections() -> int:
    return object_storage._connect.cache_info().misses


def error_of(function: Callable[[str], object] = storage.read_bytes) -> str:
    with storage.patient(0), pytest.raises(StorageError) as caught:
        function(URL)
    assert "hidden" not in str(caught.value)
    return str(caught.value)


# Credentials.


REFUSALS = [
    (400, "ExpiredToken", storage.read_bytes),
    (400, "InvalidToken", storage.size),
    (403, "InvalidAccessKeyId", storage.list_names),
    (403, "SignatureDoesNotMatch", lambda url: storage.put_bytes(url, b"more")),
    (401, "Unauthorized", storage.exists),
]


def check_rotation(
    store: Store, folder: Path, status: int, code: str, function: Callable[[str], object]
) -> None:
    store.status, store.code, before = status, code, store.key
    write_key(folder, before)
    storage.read_bytes(URL)
    store.key = before + "-rotated"
    write_key(folder, store.key, token="given")
    connected = num_connections()
    function(URL)
    assert num_connections() == connected + 1


def test_a_rotated_credentials_file_is_read_again_when_the_old_key_is_refused(
    store: Store, tmp_path: Path
) -> None:
    store.key = "old"
    for status, code, function in REFUSALS:
        check_rotation(store, tmp_path, status, code, function)


@pytest.mark.slow
@pytest.mark.parametrize("code", ["TokenRefreshRequired", "AccessDenied", "InvalidToken"])
@pytest.mark.parametrize("status", [400, 401, 403])
def test_every_call_survives_a_rotation(
    status: int, code: str, store: Store, tmp_path: Path
) -> None:
    store.key = "old"
    if status == 400 and code == "AccessDenied":
        code = "ExpiredTokenException"
    for function in (
        *(one for _, _, one in REFUSALS),
        lambda url: storage.fetch_file(url, tmp_path / "x"),
        lambda url: storage.put_file(tmp_path / "x", url),
    ):
        check_rotation(store, tmp_path, status, code, function)


def test_the_credentials_of_a_process_and_of_a_profile_are_asked_for_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").unlink()
    answer = {
        "Version": 1,
        "AccessKeyId": "first",
        "SecretAccessKey": "hidden",
        "SessionToken": "t",
    }
    (tmp_path / "key.json").write_text(json.dumps(answer))
    (tmp_path / "config").write_text(
        f"[default]\ncredential_process = cat {tmp_path}/key.json\n"
        f"[profile other]\naws_access_key_id = first\naws_secret_access_key = hidden\n"
    )
    store.key = "first"
    assert storage.read_bytes(URL) == b"content"
    store.key, store.status, store.code = "second", 400, "ExpiredToken"
    assert "has expired" in error_of()
    (tmp_path / "key.json").write_text(json.dumps(answer | {"AccessKeyId": "second"}))
    assert storage.read_bytes(URL) == b"content"

    monkeypatch.setenv("AWS_PROFILE", "other")
    assert "has expired" in error_of()
    config = (tmp_path / "config").read_text()
    (tmp_path / "config").write_text(config.replace("key_id = first", "key_id = second"))
    assert storage.read_bytes(URL) == b"content"


def test_parts_that_are_refused_at_once_share_one_new_connection(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 10)
    store.data, store.key = bytes(range(200)), "old"
    blocks = storage._blocks(URL)
    assert next(blocks) == bytes(range(10))
    store.key = "new"
    write_key(tmp_path, "new")
    connected = num_connections()
    assert b"".join(blocks) == bytes(range(10, 200))
    assert num_connections() == connected + 1


@pytest.mark.slow
def test_a_key_that_may_only_read_is_replaced_in_the_middle_of_an_upload_in_parts(
    bucket: str, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write_key(tmp_path, *ADMIN)
    url, request = f"s3://{bucket}/x", object_storage.request
    storage.put_bytes(url, b"old")

    def rotating(method: str, **arguments: Any) -> Any:
        answer = request(method, **arguments)
        if method == "create_multipart_upload":
            write_key(tmp_path, *READ_ONLY)
            object_storage._generation += 1  # as after a refusal
            request("head_object", Bucket=bucket, Key="x")
            write_key(tmp_path, *ADMIN)
        return answer

    monkeypatch.setattr(object_storage, "request", rotating)
    connected = num_connections()
    storage.put_bytes(url, bytes(11 * 2**20))
    assert num_connections() == connected + 2  # the one above, and one for all parts
    assert storage.read_bytes(url) == bytes(11 * 2**20)


def test_a_refusal_that_stays_is_named_after_one_reconnection(store: Store) -> None:
    for status, code, wanted in (
        (400, "ExpiredToken", "the session token has expired, renew it"),
        (400, "InvalidToken", "renew AWS_SESSION_TOKEN, or unset it"),
        (403, "InvalidAccessKeyId", "InvalidAccessKeyId.*check AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", "AccessDenied.*what this key may do in this bucket"),
    ):
        store.status, store.code = status, code
        store.requests.clear()
        assert re.search(wanted, error_of(storage.read_bytes))
        assert store.requests == ["GET /bucket/x"] * 2
    assert re.search(wanted, error_of(storage.size))  # though a HEAD says no reason


def test_a_clock_that_is_off_is_named_with_its_minutes(store: Store) -> None:
    for code, minutes, function in (
        ("RequestTimeTooSkewed", 20, storage.read_bytes),
        ("RequestTimeTooSkewed", -90, storage.size),
        ("SignatureDoesNotMatch", 600, lambda url: storage.put_bytes(url, b"")),
    ):
        store.code, store.seconds_ahead = code, 60 * minutes
        message = error_of(function)
        assert f"clock and the server's differ by about {abs(minutes)} minutes" in message
        assert "AWS_ACCESS_KEY_ID" not in message


@pytest.mark.parametrize(
    "config",
    ["credential_process = no-such-program", "credential_process = false", "sso_session = gone"],
)
def test_credentials_that_cannot_be_had_are_not_taken_for_a_missing_object(
    config: str, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "credentials").unlink()
    (tmp_path / "config").write_text(f"[default]\n{config}\nsso_account_id = 1\n")
    for function in (storage.exists, storage.read_bytes):
        assert "needs a key" in error_of(function)


# Endpoints.


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("store:8333", "AWS_ENDPOINT_URL=store:8333 has no scheme; set http://store:8333"),
        ("store", "AWS_ENDPOINT_URL=store has no scheme; set http://store"),
        ("u:hidden@store:1/p", "AWS_ENDPOINT_URL=store:1/p has no scheme; set http://store:1/p"),
        ("//store:8333", "has no scheme; set http://store:8333"),
        ("http:/store", "has no scheme"),
        ("htp://store:8333", "AWS_ENDPOINT_URL=htp://store:8333 is no url; set http://host:port"),
        ("http://store:port", "AWS_ENDPOINT_URL=http://store:port is no url"),
        ("http://", "AWS_ENDPOINT_URL=http:// is no url"),
        ('"http://store:8333"', "is no url"),
        (" http://u:hidden@store", "is no url"),
    ],
)
def test_an_endpoint_that_is_no_url_is_named_with_what_to_set(
    given: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", given)
    for function in (storage.exists, lambda url: storage.put_bytes(url, b"")):
        assert wanted in error_of(function)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", given)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store")
    assert wanted.replace("_URL=", "_URL_S3=") in error_of()


@pytest.mark.parametrize(
    "given",
    ["http://store:8333", "https://s3.example.com/a/b/", "http://[::1]:9", "http://10.0.0.1"],
)
def test_an_endpoint_is_shown_with_its_path_and_without_secrets(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, _, rest = given.partition("://")
    for secret in ("", "user:hidden@", "hid/den:@@"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}://{secret}{rest}?token=hidden")
        assert object_storage.endpoint() == given


@pytest.mark.parametrize(
    ("status", "page"),
    [
        (200, b"<html>Blocked</html>"),
        (200, b"<!doctype html><p>Please log in"),
        (404, b"no"),
        (403, b"<html>Blocked</html>"),
        (407, b"no"),
        *(
            pytest.param(status, page, marks=pytest.mark.slow)
            for status in (302, 403, 404, 407, 502)
            for page in (b"", b"<html>Blocked</html>", b"<!doctype html><p>Please log in", b"no")
        ),
    ],
)
def test_the_web_page_of_a_proxy_is_neither_a_refused_key_nor_content(
    status: int, page: bytes, store: Store, tmp_path: Path
) -> None:
    store.page, store.status = page, status
    functions = [
        storage.read_bytes,
        storage.list_names,
        storage.exists,
        lambda url: storage.put_bytes(url, b"lost"),
        lambda url: storage.fetch_file(url, tmp_path / "x"),
    ]
    for function in functions if status in (200, 404) else functions[:1]:
        message = error_of(function)
        assert "HTTP_PROXY" in message and "AWS_ENDPOINT_URL" in message
        assert "ACCESS_KEY" not in message and "no such object" not in message
    assert not (tmp_path / "x").exists()


def test_a_proxy_that_cannot_be_reached_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:8333")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        proxy = f"http://user:hidden@127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "x")  # another connection
    assert re.search("behind a proxy .* check HTTP_PROXY", error_of())


def serve(listener: socket.socket, answer: bytes, context: ssl.SSLContext | None = None) -> None:
    """Send `answer` to each client, in TLS if there is a context."""

    def one() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    plain = context.wrap_socket(connection, server_side=True) if context else None
                    (plain or connection).sendall(answer)
                    (plain or connection).recv(2**16)
                except OSError:
                    pass

    threading.Thread(target=one, daemon=True).start()


def test_a_port_that_speaks_no_http_or_no_tls_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer in (b"SSH-2.0-OpenSSH_9.9\r\n", b"220 mail ready\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serve(listener, answer)
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
            assert re.search("does not answer as S3 does.*check AWS_ENDPOINT_URL", error_of())
            listener.shutdown(socket.SHUT_RDWR)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint.replace("http", "https"))
    wanted = "no TLS that is trusted here; set http:// or https:// in AWS_ENDPOINT_URL"
    with pytest.raises(StorageError, match=wanted):  # at once: no attempts are counted
        storage.read_bytes(URL)


def test_a_certificate_that_nobody_signed_is_an_error_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pem = str(tmp_path / "server.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    done = subprocess.run([*command.split(), *names, "-keyout", pem, "-out", pem + ".crt"])
    assert done.returncode == 0
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem + ".crt", pem)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nETag: x\r\nConnection: close\r\n\r\nsafe"
        serve(listener, answer, context)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"no TLS that is trusted here; .*AWS_CA_BUNDLE"):
            storage.read_bytes(URL)
        monkeypatch.setenv("AWS_CA_BUNDLE", pem + ".crt")
        assert storage.read_bytes(URL) == b"safe"
        listener.shutdown(socket.SHUT_RDWR)


# Requests.


def test_aws_region_is_the_region_that_signs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    store.key = time.strftime("old/%Y%m%d/eu-west-1", time.gmtime())  # Credential=KEY/DATE/REGION
    assert storage.read_bytes(URL) == b"content"


def test_a_file_is_read_with_one_request_and_a_large_one_with_one_for_each_part(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 100)
    store.key = "old"
    for length, num_requests in ((0, 1), (1, 1), (200, 1), (201, 3), (1000, 10)):
        store.data = bytes(one % 251 for one in range(length))
        store.requests.clear()
        assert storage.read_bytes(URL) == store.data
        assert store.requests == ["GET /bucket/x"] * num_requests
        storage.fetch_file(URL, tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == store.data
        assert len(store.requests) == 2 * num_requests


def test_a_large_object_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 10)
    store.key, store.data = "old", bytes(95)
    blocks = storage._blocks(URL)
    next(blocks)
    store.data, store.etag = b"1" * 95, '"2"'
    with pytest.raises(StorageError, match="replaced while it was read; read it again"):
        list(blocks)
    assert storage.read_bytes(URL) == b"1" * 95


@pytest.mark.parametrize("code", ["SlowDown", "InternalError"])
def test_keys_of_a_batch_that_a_busy_service_did_not_delete_are_deleted_later(
    code: str, store: Store
) -> None:
    kept = f"<DeleteResult><Error><Key>x</Key><Code>{code}</Code></Error></DeleteResult>"
    store.key, store.data = "old", kept.encode()
    with storage.patient(60, waiting=lambda: setattr(store, "data", b"<DeleteResult/>")):
        storage.remove(URL)
    assert store.data == b"<DeleteResult/>"  # it was waited for


def test_a_key_of_a_batch_that_may_not_be_deleted_is_an_error_at_once(store: Store) -> None:
    store.key, store.data = (
        "old",
        (b"<DeleteResult><Error><Key>x</Key><Code>AccessDenied</Code></Error></DeleteResult>"),
    )
    with storage.patient(60), pytest.raises(StorageError, match=r"AccessDenied.*this key may do"):
        storage.remove(URL)


def test_what_a_service_does_not_implement_is_not_waited_for(store: Store) -> None:
    store.status, store.code = 501, "NotImplemented"
    with storage.patient(0.2), pytest.raises(StorageError, match="501 NotImplemented; check"):
        storage.put_bytes(URL, b"", create_only=True)
    assert len(store.requests) == 1
