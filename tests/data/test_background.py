"""Background threads: results and errors come back, and nothing keeps them alive."""

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest

from sepdist.data.background import Background


def wait_for(condition: object, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        gc.collect()
        time.sleep(0.01)
    return bool(condition())  # type: ignore[operator]


def running(name: str) -> int:
    """Count the threads whose names begin with `name`."""
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def test_jobs_of_one_thread_run_in_order_and_give_their_results() -> None:
    pool, seen = Background(1, "test-order"), []
    futures = [pool.submit(lambda i=i: seen.append(i) or i * i) for i in range(20)]
    assert [future.result(20) for future in futures] == [i * i for i in range(20)]
    assert seen == list(range(20))
    pool.close()


def test_an_error_is_the_futures_and_the_thread_goes_on() -> None:
    pool = Background(1, "test-error")
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(20)
    assert pool.submit(lambda: "next").result(20) == "next"
    pool.close()


def test_close_cancels_what_waits_finishes_what_runs_and_refuses_more() -> None:
    pool, started, release = Background(1, "test-close"), threading.Event(), threading.Event()
    first = pool.submit(lambda: started.set() or release.wait(20))
    second = pool.submit(lambda: None)
    assert started.wait(20)
    threading.Timer(0.2, release.set).start()
    pool.close()
    assert first.result(0) is True
    with pytest.raises(CancelledError):
        second.result(0)
    with pytest.raises(RuntimeError, match="test-close threads were closed"):
        pool.submit(lambda: None)
    assert not running("test-close")


def test_close_does_not_wait_forever_for_a_thread_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sepdist.data.background.PATIENCE_SECONDS", 0.1)
    pool, release = Background(1, "test-hang"), threading.Event()
    pool.submit(release.wait, 30)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 10
    release.set()
    assert wait_for(lambda: not running("test-hang"))


def test_no_thread_runs_before_the_first_job_and_a_forgotten_pool_ends_its_own() -> None:
    pool = Background(3, "test-forget")

    class Owner:
        def job(self) -> int:
            return 1

    owner = Owner()
    gone = weakref.ref(owner)

    assert running("test-forget") == 0
    assert pool.submit(owner.job).result(20) == 1
    assert running("test-forget") == 3
    del owner
    assert wait_for(lambda: gone() is None), "an idle thread keeps the last job alive"
    del pool
    assert wait_for(lambda: not running("test-forget"))
