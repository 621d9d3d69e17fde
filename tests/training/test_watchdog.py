"""The watchdog ends a worker without progress, and no other. The test moves the clock."""

import faulthandler
import subprocess
import sys
import textwrap

import pytest

from sepdist.training.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times that the timer was set to."""
    seconds: list[float] = []

    def arm(timeout: float, file: int, exit: bool) -> None:
        assert file == 2 and exit
        seconds.append(timeout)

    monkeypatch.setattr(faulthandler, "dump_traceback_later", arm)
    return seconds


def test_the_first_beat_may_take_the_start_up_time_and_the_next_ones_the_hang_time(
    clock: Clock, armed: list[float]
) -> None:
    dog = Watchdog(30.0, 600.0, clock)
    clock.now += 500.0
    dog.beat()
    clock.now += 1.0
    dog.beat()
    assert armed == [600.0, 30.0, 30.0]


def test_slow_steps_may_take_ten_times_the_usual_but_no_more_than_the_start_up(
    clock: Clock, armed: list[float]
) -> None:
    dog = Watchdog(30.0, 600.0, clock)
    dog.beat()
    for _ in range(40):
        clock.now += 8.0
        dog.beat()
    assert armed[-1] == 80.0
    for _ in range(100):
        clock.now += 70.0
        dog.beat()
    assert armed[-1] == 600.0


def test_what_is_announced_as_slow_may_take_the_start_up_time_and_does_not_count_as_usual(
    clock: Clock, armed: list[float]
) -> None:
    dog = Watchdog(30.0, 600.0, clock)
    for _ in range(40):
        dog.beat()
        clock.now += 1.0
    dog.expect_slow()
    clock.now += 500.0
    dog.beat()
    assert armed[-2:] == [600.0, 30.0]


def test_a_hang_time_of_zero_watches_nothing(clock: Clock, armed: list[float]) -> None:
    dog = Watchdog(0.0, 600.0, clock)
    dog.beat()
    dog.expect_slow()
    assert armed == []


def run(hang: str) -> subprocess.CompletedProcess[str]:
    program = f"""
        import ctypes
        from sepdist.training.watchdog import Watchdog
        dog = Watchdog(1.0, 600.0)
        dog.beat()
        def hang():
            {hang}
        hang()
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "hang",
    ["while True: pass", "ctypes.PyDLL(None).sleep(50)"],
    ids=["a live lock", "C code that holds the GIL"],
)
def test_a_process_that_hangs_shows_its_stacks_and_ends(hang: str) -> None:
    done = run(hang)
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr and "in hang" in done.stderr


def test_a_watchdog_that_was_closed_ends_nothing() -> None:
    done = run("dog.close(); ctypes.CDLL(None).sleep(2)")
    assert (done.returncode, done.stderr) == (0, "")
