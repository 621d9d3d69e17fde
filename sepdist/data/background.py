"""Daemon threads that run functions and return futures, for reading ahead.

An executor of `concurrent.futures` is joined at exit, so a worker that fails while object storage
does not answer would linger until its last retry. These threads never keep a process alive.
"""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")
_Queue = queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]

PATIENCE_SECONDS = 2.0  # how long `close` waits for running jobs


class Background:
    """Threads that run jobs in order, until `close` or until this object or the process ends."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._jobs: _Queue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []  # started by the first job, so after any fork
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._jobs, self._threads)

    def submit(self, function: Callable[..., _T], *arguments: Any) -> "Future[_T]":
        """Run `function(*arguments)` in a thread; the future gets its result or exception."""
        future: Future[_T] = Future()
        with self._lock:
            if not self._end.alive:
                raise RuntimeError(f"the {self._name} threads were closed")
            for number in range(len(self._threads), self._num_threads):
                name = f"{self._name}-{number}"
                thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._jobs.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Cancel waiting jobs and end the threads, each when its running job returns."""
        with self._lock:
            self._end()


def _work(jobs: _Queue) -> None:
    while (job := jobs.get()) is not None:
        _run(*job)
        del job  # an idle thread must not keep the job's owner alive


def _run(future: "Future[Any]", function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised again by future.result()
            future.set_exception(error)


def _end(jobs: _Queue, threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while job := jobs.get_nowait():
            job[0].cancel()
    for _ in threads:
        jobs.put(None)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
