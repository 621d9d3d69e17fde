"""Let one command at a time train a run: it holds the run's newest lease.

    run_dir/lease/000001.json   who holds it; rewritten every BEAT_SECONDS by the holder alone

A lease is taken by a create-only put of the next number, so of two commands one gets it. A command
that finds another's lease is refused while the holder lives. It takes over a lease that was
released, whose process is known to be dead, or whose beat has stood still for STALE_SECONDS by the
clock of the finder: clocks of two hosts are never compared. A holder that was cut off for that long
finds the higher number when it is back, and ends.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sepdist import storage
from sepdist.config import ConfigError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


@contextlib.contextmanager
def lease(run_dir: str, lost: Callable[[str], None], say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease of a run inside; ConfigError if another command that lives holds it.

    `say` gets what is waited for, `lost` (in a thread of its own) the reason when the lease was
    taken over by another command.
    """
    folder, pid = storage.join(run_dir, "lease"), os.getpid()
    mine = {"host": socket.gethostname(), "pid": pid, "process": process_id(pid)}
    mine["folder"] = folder  # a copied run has a copy of the lease
    number = _take(folder, mine, say)
    ended = threading.Event()

    def beat() -> None:
        for count in range(1, 2**62):
            if ended.wait(BEAT_SECONDS):
                return
            try:
                if (newest := max(_numbers(folder), default=0)) > number:
                    holder = _name(_read(folder, newest))
                    lost(f"{run_dir} was taken over by {holder}; this command ends")
                    return
                _put(folder, number, mine | {"beat": count})
            except OSError as error:  # the next beat may reach storage again
                logger.info("the lease of %s was not renewed: %s", run_dir, error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):  # else it is taken over when it is stale
            _put(folder, number, mine | {"released": True})


def process_id(pid: int) -> list[str]:
    """What tells a process from all others of this and other hosts; [] where there is no /proc.

    First the boot and the pid namespace, in which pids mean the same; then when it started.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = boot + os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return [space, started]
    return []


def _take(folder: str, mine: Mapping[str, Any], say: Callable[[str], None]) -> int:
    """Return the number of the lease that was taken."""
    while True:
        numbers = _numbers(folder)
        newest = max(numbers, default=0)
        _wait_until_free(folder, newest, say)
        try:
            _put(folder, newest + 1, mine, create_only=True)
        except FileExistsError:
            continue  # another command was faster
        for old in numbers:
            storage.remove(_url(folder, old))
        return newest + 1


def _wait_until_free(folder: str, number: int, say: Callable[[str], None]) -> None:
    """Return once the lease may be taken over; ConfigError if its holder lives."""
    first, began = _read(folder, number), 0.0
    while (holder := _read(folder, number)) and not holder.get("released"):
        here = holder.get("process", [])[:1] == process_id(os.getpid())[:1] != []
        if here and process_id(holder["pid"]) != holder["process"]:
            return
        if here and holder.get("folder", folder) != folder:
            return
        if here or holder != first:
            busy = f"{folder.rpartition('/')[0]} is being trained by {_name(holder)}"
            todo = "stop it (Ctrl-C commits a checkpoint first), or choose another run_dir"
            raise ConfigError(f"{busy}: let it end, {todo}")
        if not began:
            began = time.monotonic()
            silent = f"{_name(holder)} trained this run and did not say that it ended"
            say(f"{silent}; waiting up to {STALE_SECONDS:g} s for a sign of it")
        if time.monotonic() - began > STALE_SECONDS:
            return
        time.sleep(min(1.0, BEAT_SECONDS / 4))


def _numbers(folder: str) -> list[int]:
    names = (name.removesuffix(".json") for name in storage.list_names(folder))
    return [int(name) for name in names if name.isdecimal()]


def _url(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _put(folder: str, number: int, content: Mapping[str, Any], create_only: bool = False) -> None:
    data = json.dumps(content, allow_nan=False).encode()
    storage.put_bytes(_url(folder, number), data, create_only=create_only)


def _read(folder: str, number: int) -> dict[str, Any]:
    """Return who holds a lease; {} if it is no longer there or cannot be understood."""
    try:
        found = json.loads(storage.read_bytes(_url(folder, number)))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(holder: Mapping[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"
