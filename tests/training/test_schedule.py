"""Learning rate, early stopping and gradient limit follow the history, and survive a restart."""

import json
import math
from pathlib import Path

import pytest

from sepdist.config import ConfigError
from sepdist.training.schedule import LEAST_NORMS, GradientGuard, Schedule
from tests.support.runs import frozen


def schedule(**changes: float | str) -> Schedule:
    options = {
        "warmup_steps": 0,
        "factor": 0.5,
        "patience": 2,
        "min_lr": 1e-5,
        "early_stop_patience": 5,
    } | changes
    return Schedule(1e-3, **options)


def test_the_rate_halves_after_patience_validations_without_improvement_and_one_more() -> None:
    plateau = schedule()
    rates = []
    for score in [1.0, 0.9, 0.9, 0.9, 2.0, 1.0, 1.0, 1.0]:
        plateau.observe(score, 1)
        rates.append(plateau.lr(100))
    assert rates == [1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 5e-4, 2.5e-4]


def test_the_warm_up_is_linear_and_reaches_the_base_rate() -> None:
    warm = schedule(warmup_steps=4)
    assert [warm.lr(step) for step in range(5)] == [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3]


def test_the_rate_never_falls_below_the_floor() -> None:
    plateau = schedule(patience=0, early_stop_patience=0)
    for _ in range(50):
        plateau.observe(0.0, 1)
    assert plateau.lr(0) == 1e-5 and not plateau.should_stop


def test_the_rate_falls_linearly_over_the_last_steps_and_not_before_them() -> None:
    decaying = schedule(decay_steps=4, max_steps=10)
    rates = [decaying.lr(step) for step in range(10)]
    assert rates == pytest.approx([1e-3] * 7 + [7.5e-4, 5e-4, 2.5e-4], rel=1e-12)
    assert schedule(decay_steps=200, max_steps=200).lr(199) == 1e-5, "not below the floor"


def test_warm_up_and_plateau_still_scale_a_decaying_rate() -> None:
    decaying = schedule(warmup_steps=2, decay_steps=10, max_steps=10, patience=0)
    decaying.observe(1.0, 3)
    decaying.observe(0.0, 4)
    rates = [decaying.lr(step) for step in (0, 1, 5)]
    assert rates == pytest.approx([2.5e-4, 4.5e-4, 2.5e-4], rel=1e-12)


def test_without_decay_steps_the_number_of_steps_does_not_matter() -> None:
    assert [schedule(max_steps=3).lr(step) for step in range(5)] == [1e-3] * 5


def halvings(plateau: Schedule, scores: list[float]) -> list[int]:
    """The validations, counted from 1, that halve the rate; one every 10 steps."""
    found, rate = [], plateau.lr(10**6)
    for number, score in enumerate(scores, 1):
        plateau.observe(score, 10 * number)
        if plateau.lr(10**6) != rate:
            found.append(number)
            rate = plateau.lr(10**6)
    return found


def test_validations_during_the_warm_up_do_not_count_towards_a_plateau() -> None:
    """Up in 10 epochs and then halved after 4 without improvement, as paper 2 says."""
    warm = schedule(warmup_steps=100, patience=4, early_stop_patience=15)
    assert halvings(warm, [1.0] + [0.0] * 19) == [15, 20]
    assert halvings(schedule(patience=4), [1.0] + [0.0] * 19) == [6, 11, 16]


@pytest.mark.parametrize(("hold", "expected"), [(0, [4, 7]), (50, [8]), (250, [])])
def test_nothing_is_halved_in_the_hold(hold: int, expected: list[int]) -> None:
    """SpeechBrain's recipes: patience 2, not before epoch 5 (here the 5th validation) or 25."""
    assert halvings(schedule(hold_steps=hold), [1.0] + [0.5] * 8) == expected


def test_early_stop_counts_no_stagnation_of_the_warm_up_unless_no_score_is_finite() -> None:
    warm = schedule(warmup_steps=100, early_stop_patience=3)
    stops = []
    for number, score in enumerate([1.0] + [0.0] * 12, 1):
        warm.observe(score, 10 * number)
        stops.append(warm.should_stop)
    assert stops.index(True) + 1 == 13
    broken = schedule(warmup_steps=100, early_stop_patience=3)
    for number in range(1, 4):
        broken.observe(math.nan, 10 * number)
    assert broken.should_stop
    with pytest.raises(RuntimeError, match="3 in all"):
        broken.check_end()


def test_a_cosine_falls_from_the_end_of_warm_up_and_hold_to_zero_after_the_last_step() -> None:
    """(1 + cos(pi t / 6)) / 2, whose cosines are 1, sqrt(3) / 2, 1 / 2 and 0."""
    ours = schedule(shape="cosine", warmup_steps=2, hold_steps=3, max_steps=9, min_lr=0.0)
    for _ in range(9):
        ours.observe(0.0, 20)  # a plateau changes no shape but its own
    falls = [1, (2 + 3**0.5) / 4, 0.75, 0.5, 0.25, (2 - 3**0.5) / 4]
    expected = [5e-4, 1e-3, 1e-3] + [1e-3 * fall for fall in falls]
    assert [ours.lr(step) for step in range(9)] == pytest.approx(expected, rel=1e-12)


def test_linear_and_constant_rates_are_those_of_a_table_by_hand() -> None:
    linear = schedule(shape="linear", warmup_steps=2, max_steps=6)
    rates = [5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4]
    assert [linear.lr(step) for step in range(6)] == pytest.approx(rates)
    constant = schedule(shape="constant", decay_steps=2, max_steps=6)
    assert halvings(constant, [1.0] + [0.0] * 30) == []
    assert [constant.lr(step) for step in range(6)] == [1e-3] * 5 + [5e-4]
    assert schedule(shape="cosine", max_steps=100).lr(99) == 1e-5, "not below schedule.min_lr"


def test_a_shape_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.shape=cosin: give one of plateau, cosine"):
        frozen({"train": "t", "dev": "d"}, tmp_path / "run", "schedule.shape=cosin")


def test_training_stops_early_after_the_given_number_of_stagnant_validations() -> None:
    plateau = schedule()
    stops = []
    for score in [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]:
        plateau.observe(score, 1)
        stops.append(plateau.should_stop)
    assert stops == [False] * 5 + [True]


def test_a_restored_schedule_goes_on_as_if_never_interrupted() -> None:
    whole, first = schedule(), schedule()
    scores = [1.0, 0.5, 0.4, 0.3, 0.2, 0.6, 0.1]
    for score in scores:
        whole.observe(score, 1)
    for score in scores[:3]:
        first.observe(score, 1)
    second = schedule()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for score in scores[3:]:
        second.observe(score, 1)
    assert second.state_dict() == whole.state_dict() and second.lr(9) == whole.lr(9)


# The limit on gradient norms.


def filled(*norms: float, **options: float) -> GradientGuard:
    guard = GradientGuard(**({"spike_factor": 10.0, "max_skipped": 3} | options))
    for step, norm in enumerate(norms):
        guard.observe(step, norm, True)
    return guard


def test_the_limit_is_the_factor_times_the_median_of_what_was_applied() -> None:
    norms = [float(1 + (7 * i) % 60) for i in range(60)]  # a permutation of 1 to 60
    assert filled(*norms).limit == 305.0


def test_there_is_no_limit_before_there_is_a_history_or_without_a_factor() -> None:
    assert filled(*[1.0] * (LEAST_NORMS - 1)).limit == math.inf
    assert filled(*[1.0] * 100, spike_factor=0.0).limit == math.inf


def test_old_norms_are_forgotten() -> None:
    assert filled(*[100.0] * 80, *[1.0] * 100).limit == 10.0


def test_skipped_steps_do_not_move_the_limit() -> None:
    guard = filled(*[1.0] * 60)
    guard.observe(60, 1e9, False)
    guard.observe(61, math.nan, False)
    assert guard.limit == 10.0


def test_the_third_skipped_step_in_a_row_is_an_error_that_names_all_three() -> None:
    guard = filled(1.0, 1.0)
    guard.observe(2, math.nan, False)
    guard.observe(3, math.nan, False)
    guard.observe(4, 1.0, True)
    guard.observe(5, math.nan, False)
    guard.observe(6, math.inf, False)
    with pytest.raises(RuntimeError, match=r"steps 5 to 7 were skipped.*lower optim\.lr"):
        guard.observe(7, math.nan, False)


def test_a_continued_guard_has_the_same_limit_and_goes_on_counting() -> None:
    guard = filled(*[0.1 * i for i in range(70)])
    guard.observe(70, math.nan, False)
    guard.observe(71, math.nan, False)
    other = filled()
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.limit == guard.limit
    with pytest.raises(RuntimeError, match="steps 70 to 72"):
        other.observe(72, math.nan, False)
