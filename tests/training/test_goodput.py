"""Every second of a run is counted once, over all its attempts. Worked out by hand."""

import json

import pytest

from sepdist.training.meter import Goodput


def interval(
    goodput: Goodput, step: float, data: float = 0, checkpoint: float = 0, validation: float = 0
) -> dict:
    goodput.add(
        {"step": step, "data_wait": data, "checkpoint": checkpoint, "validation": validation}
    )
    return goodput.read()


def test_a_run_that_dies_twice() -> None:
    first = Goodput([], None, now=100.0)
    first.started(110.0)  # 10 s of start-up
    kept = interval(first, 20.0, data=1.0, checkpoint=2.0)  # to 133; the checkpoint is here
    interval(first, 15.0, validation=5.0)  # to 153: the last log line
    note = first.note(153.0)  # killed at 160

    second = Goodput([{"step": 1}, kept], note, now=170.0)
    assert second.seconds["redone"] == 20.0 and second.seconds["step"] == 20.0
    note = second.note(second.last_note)  # killed again before its first step

    third = Goodput([kept], note, now=180.0)
    third.started(190.0)
    metrics = interval(third, 30.0)
    expected = {
        "step": 50.0,
        "data_wait": 1.0,
        "checkpoint": 2.0,
        "validation": 0.0,
        "redone": 20.0,
    }
    expected["restart"] = 10.0 + (190.0 - 153.0)
    assert {kind: metrics[f"goodput/{kind}_seconds"] for kind in expected} == expected
    assert sum(expected.values()) == (190.0 - 100.0) + 30.0  # the clock's own account
    assert metrics["goodput/share"] == pytest.approx(50.0 / 120.0)


def test_a_run_without_faults_has_only_its_start_besides_the_work() -> None:
    goodput = Goodput([], None, now=0.0)
    goodput.started(4.0)
    metrics = interval(goodput, 96.0)
    assert metrics["goodput/share"] == 0.96 and metrics["goodput/redone_seconds"] == 0.0
    assert json.loads(goodput.note(100.0))["time"] == 100.0
