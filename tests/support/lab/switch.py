"""An Ethernet switch in user space that delays, drops and withholds frames between hosts.

    python -m tests.support.lab.switch

It reads one JSON command per line and answers each with "ok":

    {"plug": "h1", "pid": 4711, "address": "10.77.3.2"}    give that process's network an eth0
    {"links": {"h1": {"cut": true}}, "apart": [["h2", "s3"]]}  replace all impairments

A link's impairments apply to what its host sends and to what it receives: `delay` [least, most]
seconds, `loss` the share of frames dropped, `cut` all of them. The hosts of a pair in `apart` do
not reach each other. pid 0 is the network of the switch itself. The switch ends with its input.
The kernel's own netem is not needed, which many containers lack.
"""

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
MTU = 8900  # bytes; fewer frames for a switch in Python
BATCH = 64  # frames read from one port before the others have their turn


def mac_of(address: str) -> bytes:
    """The hardware address of a host, which stays its own when the host is started again."""
    return bytes([2, 0, *map(int, address.split("."))])


@dataclass(eq=False)
class Port:
    name: str
    fd: int
    last_due: float = 0.0  # of the frames on their way to it, which never overtake each other


@dataclass(eq=False)
class Switch:
    ports: dict[bytes, Port] = field(default_factory=dict)  # by hardware address
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    apart: set[frozenset[str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(sys.stdin.fileno(), select.POLLIN)
        self._under_way: list[tuple[float, int, Port, bytes]] = []
        self._numbers = itertools.count()
        self._chance = random.Random(0)

    def run(self) -> None:
        while True:
            self._deliver()
            wait = self._under_way[0][0] - time.monotonic() if self._under_way else 1.0
            ready = [fd for fd, _ in self._poll.poll(max(0.0, wait) * 1000)]
            if sys.stdin.fileno() in ready:
                if not (line := sys.stdin.buffer.raw.readline()):  # type: ignore[attr-defined]
                    return
                self._obey(json.loads(line))
                print("ok", flush=True)
                continue  # a port may have gone
            for source in [port for port in self.ports.values() if port.fd in ready]:
                self._receive(source)

    def _obey(self, command: dict[str, Any]) -> None:
        if "plug" in command:
            self._plug(command["plug"], command["pid"], command["address"])
        else:
            self.links = command["links"]
            self.apart = {frozenset(pair) for pair in command["apart"]}

    def _plug(self, name: str, pid: int, address: str) -> None:
        mac = mac_of(address)
        if mac in self.ports:
            self._unplug(mac)
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        request = fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"lab%d", IFF_TAP | IFF_NO_PI))
        device = request[:16].rstrip(b"\0").decode()  # the kernel put a free number for %d
        inside: list[str] = []
        if pid:
            _run("ip", "link", "set", device, "netns", str(pid))
            inside, old, device = ["nsenter", "-t", str(pid), "-n"], device, "eth0"
            _run(*inside, "ip", "link", "set", old, "name", device)
            _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*inside, "ip", "link", "set", device, "address", mac.hex(":"), "mtu", str(MTU))
        _run(*inside, "ip", "addr", "add", f"{address}/24", "dev", device)
        _run(*inside, "ip", "link", "set", device, "up", "txqueuelen", "5000")
        self.ports[mac] = Port(name, fd)
        self._poll.register(fd, select.POLLIN)

    def _unplug(self, mac: bytes) -> None:
        port = self.ports.pop(mac)
        self._poll.unregister(port.fd)
        os.close(port.fd)

    def _receive(self, source: Port) -> None:
        for _ in range(BATCH):
            try:
                frame = os.read(source.fd, 2**16)
            except BlockingIOError:
                return
            except OSError:  # the host has gone, and its device with it
                self._unplug(next(mac for mac, port in self.ports.items() if port is source))
                return
            known = self.ports.get(frame[:6])
            everyone = [known] if known else list(self.ports.values())
            for target in everyone:
                if target is not source:
                    self._forward(frame, source, target)

    def _forward(self, frame: bytes, source: Port, target: Port) -> None:
        if frozenset((source.name, target.name)) in self.apart:
            return
        due = time.monotonic()
        for link in (self.links.get(source.name), self.links.get(target.name)):
            if not link:
                continue
            if link.get("cut") or self._chance.random() < link.get("loss", 0.0):
                return
            due += self._chance.uniform(*link.get("delay", (0.0, 0.0)))
        target.last_due = due = max(due, target.last_due)
        heapq.heappush(self._under_way, (due, next(self._numbers), target, frame))
        self._deliver()

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, target, frame = heapq.heappop(self._under_way)
            with contextlib.suppress(OSError):  # a full queue, or a host that has gone
                os.write(target.fd, frame)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


if __name__ == "__main__":
    Switch().run()
