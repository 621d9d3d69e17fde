"""The watchdog bites a worker without progress, and nobody else. Time is a number here that the test moves."""

import subprocess
import sys
import textwrap

import pytest

from sepdist.training import watchdog
from sepdist.training.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def watching(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    monkeypatch.setattr(watchdog.threading.Thread, "start", lambda self: None)
    return Watchdog(30.0, 600.0, clock=clock)


def after(clock: Clock, dog: Watchdog, seconds: float) -> bool:
    """Whether the beat is overdue `seconds` from now, looked at every second as the thread does."""
    for _ in range(int(seconds)):
        clock.now += 1.0
        if dog.overdue():
            return True
    return False


def test_the_first_beat_may_take_the_start_up_time(clock: Clock, monkeypatch) -> None:
    assert not after(clock, watching(clock, monkeypatch), 600)
    assert after(clock, watching(clock, monkeypatch), 601)


def test_after_a_beat_the_hang_time_holds(clock: Clock, monkeypatch) -> None:
    dog = watching(clock, monkeypatch)
    dog.beat()
    assert not after(clock, dog, 30)
    assert after(clock, dog, 1)


def test_slow_steps_may_take_ten_times_the_usual(clock: Clock, monkeypatch) -> None:
    dog = watching(clock, monkeypatch)
    for _ in range(40):
        dog.beat()
        assert not after(clock, dog, 8)
    dog.beat()
    assert not after(clock, dog, 80)
    assert after(clock, dog, 1)


def test_what_is_announced_as_slow_may_take_the_start_up_time_and_does_not_count_as_usual(
    clock, monkeypatch
) -> None:
    dog = watching(clock, monkeypatch)
    for _ in range(40):
        dog.beat()
        clock.now += 1.0
    dog.expect_slow()
    assert not after(clock, dog, 500)
    dog.beat()
    assert after(clock, dog, 31)


def test_a_machine_that_slept_has_not_hung(clock: Clock, monkeypatch) -> None:
    dog = watching(clock, monkeypatch)
    dog.beat()
    clock.now += 1.0
    assert not dog.overdue()
    clock.now += 3600.0
    assert not dog.overdue()
    assert after(clock, dog, 35)


def test_a_live_locked_process_shows_its_stacks_and_ends() -> None:
    program = """
        from sepdist.training.watchdog import Watchdog
        dog = Watchdog(1.0, 600.0)
        dog.beat()
        def live_lock():
            while True:
                pass
        live_lock()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == watchdog.EXIT_STATUS
    assert "live_lock" in done.stderr and "no progress for" in done.stderr
