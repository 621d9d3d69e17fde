"""Background threads for the data stream: functions in, futures out.

Unlike those of `concurrent.futures`, these threads never keep a process alive: an executor's threads are joined at
exit, so a worker that fails while object storage does not answer would linger until its last retry.
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
_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
_Queue = queue.SimpleQueue[_Job | None]

PATIENCE_SECONDS = 2.0  # how long an end waits for what is running


class Background:
    """Daemon threads that take up what is submitted in order; they end with `close`, the object or the process."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._jobs: _Queue = queue.SimpleQueue()
        self._threads: list[
            threading.Thread
        ] = []  # started by the first submit, so that nothing runs before a fork
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._jobs, self._threads)

    def submit(self, function: Callable[..., _T], *arguments: Any) -> "Future[_T]":
        """Run `function(*arguments)` in a thread; its result or its exception is the future's."""
        future: Future[_T] = Future()
        with self._lock:
            if not self._end.alive:
                raise RuntimeError(f"the {self._name} threads were closed")
            if not self._threads:
                for number in range(self._num_threads):
                    thread = threading.Thread(
                        target=_work, args=(self._jobs,), name=f"{self._name}-{number}", daemon=True
                    )
                    self._threads.append(thread)
                    thread.start()
            self._jobs.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Cancel what has not begun and end the threads; one in the middle of a download ends with it."""
        with self._lock:
            end = self._end.detach()
        if end is not None:
            _end(self._jobs, self._threads)


def _work(jobs: _Queue) -> None:
    while (job := jobs.get()) is not None:
        _run(*job)
        del job  # an idle thread must not keep the job's owner alive


def _run(future: "Future[Any]", function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*arguments)
    except BaseException as error:  # raised again where the result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)


def _end(jobs: _Queue, threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            job = jobs.get_nowait()
            if job is not None:
                job[0].cancel()
    for _ in threads:
        jobs.put(None)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
