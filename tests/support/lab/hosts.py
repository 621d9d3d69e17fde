"""Several hosts on one machine, with a network between them that can fail and an S3 server.

A host is a tree of processes with a network, a name, process numbers, /dev/shm, /tmp/ray and a
home of its own; the file system is shared. The switch (switch.py) joins the hosts and this process,
so that a test may look at the S3 server as any client does. Needs root, /dev/net/tun, iproute2 and
util-linux; nothing outlives the process that started it.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.disturb import kill_all
from tests.support.runs import ROOT
from tests.support.s3server import ADMIN, S3Server, die_with_parent

BUCKET = "lab"
SITE = Path(__file__).parent / "site"  # on PYTHONPATH, it slows steps down


def why_not_here() -> str:
    """What this machine lacks to run hosts; empty if nothing."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "hosts of their own need /dev/net/tun"
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    return f"hosts of their own need the programs {', '.join(missing)}" if missing else ""


class Switch:
    """The switch's process, and what is wrong on its links."""

    def __init__(self, log: Path) -> None:
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.lab.switch"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._links: dict[str, dict[str, Any]] = {}
        self._apart: set[tuple[str, str]] = set()

    def _tell(self, **command: Any) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "ok\n", "the switch has ended, see its log"

    def plug(self, name: str, pid: int, address: str) -> None:
        self._tell(plug=name, pid=pid, address=address)

    def impair(self, name: str, **impairments: Any) -> None:
        """Set `delay=[least, most]` in seconds, `loss` as a share, or `cut` of a host's link."""
        self._links[name] = self._links.get(name, {}) | impairments
        self._tell(links=self._links, apart=sorted(self._apart))

    def separate(self, one: str, other: str) -> None:
        """Let two hosts not reach each other, while others reach both."""
        self._apart.add((one, other))
        self._tell(links=self._links, apart=sorted(self._apart))

    def heal(self) -> None:
        """End every impairment."""
        self._links, self._apart = {}, set()
        self._tell(links={}, apart=[])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Host:
    """A host that can be started and lose its power any number of times."""

    def __init__(self, name: str, address: str, folder: Path, switch: Switch) -> None:
        self.name, self.address, self.folder, self.switch = name, address, folder, switch
        for own in ("home", "ray"):
            (folder / own).mkdir(parents=True, exist_ok=True)
        self.credentials = folder / "home" / "credentials"
        self._holder: subprocess.Popen[str] | None = None
        self.pid = 0

    def boot(self) -> None:
        """Start the host and plug it into the switch, with nothing running on it."""
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc"]
        first = [sys.executable, "-m", "tests.support.lab.init", self.name, str(self.folder)]
        self._holder = subprocess.Popen(
            ["unshare", *spaces, "--fork", "--kill-child", *first],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", f"{self.name} did not start"
        self.pid = psutil.Process(self._holder.pid).children()[0].pid
        self.switch.plug(self.name, self.pid, self.address)

    def lose_power(self) -> None:
        """End all its processes at once, without a word to the others."""
        if self._holder is None:
            return
        self.switch.impair(self.name, cut=True)  # else the kernel would close their connections
        self._holder.kill()
        self._holder.wait()
        psutil.wait_procs([psutil.Process(self.pid)] if psutil.pid_exists(self.pid) else [], 10)
        self._holder = None

    def inside(self, *command: str, processes: bool = True) -> list[str]:
        """The command that runs `command` on this host; without `processes`, only its network."""
        spaces = ["-n", "-u", "-i", "-m", "-p"] if processes else ["-n"]
        return ["nsenter", "-t", str(self.pid), *spaces, "--", *command]

    def start(self, *command: str, log: Path, **environment: str) -> psutil.Popen:
        with open(log, "ab") as output:
            return psutil.Popen(
                self.inside("env", f"--chdir={ROOT}", *command),
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment without its credentials, and with the host's own."""
        mine = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        own = {
            "HOME": str(self.folder / "home"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.credentials),
            "PYTHONPATH": f"{SITE}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 starves workers beside other programs
        }
        return mine | own | more


class Lab:
    """Hosts h0, h1, ... and one named s3 with the S3 server and an empty bucket.

    `own_names` says what a host's name means on itself: "address" its address on the network, or
    "debian" 127.0.1.1, as Debian and Ubuntu set it up.
    """

    def __init__(self, folder: Path, num_hosts: int = 3, own_names: str = "address") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.switch = Switch(folder / "switch.log")
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.switch.close)
        subnet = _free_subnet()
        names = [*(f"h{number}" for number in range(num_hosts)), "s3"]
        addresses = {name: f"{subnet}.{1 + number}" for number, name in enumerate(names)}
        self.hosts = {
            name: Host(name, address, folder / name, self.switch)
            for name, address in addresses.items()
        }
        for name in names:
            known = addresses | ({name: "127.0.1.1"} if own_names == "debian" else {})
            lines = [f"{address} {host}\n" for host, address in known.items()]
            (folder / name / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        try:
            self.switch.plug("operator", 0, f"{subnet}.254")
            for host in self.hosts.values():
                self._stack.callback(host.lose_power)
                host.boot()
            store = self.hosts["s3"]
            enter = store.inside(processes=False)
            self.s3 = S3Server(folder / "store", address=store.address, enter=enter)
            self._stack.callback(self.s3.kill)
            self.s3.start()
            self.set_key(ADMIN)
            self.s3.client().create_bucket(Bucket=BUCKET)
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> list[Host]:
        """All hosts but that of the S3 server."""
        return [host for name, host in self.hosts.items() if name != "s3"]

    def set_key(self, key: tuple[str, str]) -> None:
        """Rewrite every host's credentials file."""
        text = f"[default]\naws_access_key_id = {key[0]}\naws_secret_access_key = {key[1]}\n"
        for host in self.workers:
            beside = host.credentials.with_suffix(".new")
            beside.write_text(text)
            beside.replace(host.credentials)

    def aws(self) -> dict[str, str]:
        """The variables by which hosts find the S3 server; the key is in their files."""
        keep = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE")
        keep += ("AWS_EC2_METADATA_DISABLED", "NO_PROXY", "no_proxy")
        return {name: value for name, value in self.s3.environment().items() if name in keep}

    def close(self) -> None:
        self._stack.close()


def _free_subnet() -> str:
    listed = subprocess.run(["ip", "-4", "-o", "addr"], capture_output=True, text=True, check=True)
    taken = set(re.findall(r"10\.77\.\d+", listed.stdout))
    return next(one for one in (f"10.77.{n}" for n in range(256)) if one not in taken)


def child_of(process: psutil.Process) -> psutil.Process | None:
    """The process that `Host.start` started on its host, below nsenter."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        return process.children()[0]
    return None


def end(processes: Sequence[psutil.Process]) -> None:
    """Kill processes and all below them."""
    family: list[psutil.Process] = []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [*one.children(recursive=True), one]
    kill_all(family)
