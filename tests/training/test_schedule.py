"""The learning rate warms up, halves on a plateau and ends the run, and its state survives a restart."""

import json

import pytest

from sepdist.training.schedule import PlateauSchedule


def schedule(**changes: float) -> PlateauSchedule:
    options = {
        "warmup_steps": 0,
        "factor": 0.5,
        "patience": 2,
        "min_lr": 1e-5,
        "early_stop_patience": 5,
    } | changes
    return PlateauSchedule(1e-3, **options)


def test_the_rate_halves_after_patience_validations_without_improvement_and_one_more() -> None:
    plateau = schedule()
    rates = []
    for score in [1.0, 0.9, 0.9, 0.9, 2.0, 1.0, 1.0, 1.0]:
        plateau.observe(score)
        rates.append(plateau.lr(100))
    assert rates == [1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 5e-4, 2.5e-4]


def test_the_warm_up_is_linear_and_reaches_the_base_rate() -> None:
    warm = schedule(warmup_steps=4)
    assert [warm.lr(step) for step in range(5)] == [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3]


def test_the_rate_never_falls_below_the_floor() -> None:
    plateau = schedule(patience=0, early_stop_patience=0)
    for _ in range(50):
        plateau.observe(0.0)
    assert plateau.lr(0) == 1e-5 and not plateau.should_stop


def test_the_rate_falls_linearly_over_the_last_steps_and_not_before_them() -> None:
    decaying = schedule(decay_steps=4, max_steps=10)
    rates = [decaying.lr(step) for step in range(10)]
    assert rates == pytest.approx([1e-3] * 7 + [7.5e-4, 5e-4, 2.5e-4], rel=1e-12)
    assert schedule(decay_steps=200, max_steps=200).lr(199) == 1e-5, "not below the floor"


def test_warm_up_and_plateau_still_scale_a_decaying_rate() -> None:
    decaying = schedule(warmup_steps=2, decay_steps=10, max_steps=10, patience=0)
    decaying.observe(1.0)
    decaying.observe(0.0)
    rates = [decaying.lr(step) for step in (0, 1, 5)]
    assert rates == pytest.approx([2.5e-4, 4.5e-4, 2.5e-4], rel=1e-12)


def test_without_decay_steps_the_number_of_steps_does_not_matter() -> None:
    assert [schedule(max_steps=3).lr(step) for step in range(5)] == [1e-3] * 5


def test_training_stops_early_after_the_given_number_of_stagnant_validations() -> None:
    plateau = schedule()
    verdicts = []
    for score in [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]:
        plateau.observe(score)
        verdicts.append(plateau.should_stop)
    assert verdicts == [False] * 5 + [True]


def test_a_restored_schedule_goes_on_as_if_never_interrupted() -> None:
    whole, first = schedule(), schedule()
    scores = [1.0, 0.5, 0.4, 0.3, 0.2, 0.6, 0.1]
    for score in scores:
        whole.observe(score)
    for score in scores[:3]:
        first.observe(score)
    second = schedule()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for score in scores[3:]:
        second.observe(score)
    assert second.state_dict() == whole.state_dict() and second.lr(9) == whole.lr(9)
