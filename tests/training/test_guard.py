"""A step is left out by what its gradient is, never by chance; too many in a row send the run back."""

import math

import pytest

from sepdist.training.guard import LEAST_HISTORY, GradientGuard, Rollback


def filled(*norms: float, **options: float) -> GradientGuard:
    guard = GradientGuard(**({"spike_factor": 10.0, "max_skipped": 3} | options))
    for step, norm in enumerate(norms):
        guard.observe(step, norm, True)
    return guard


def test_the_limit_is_the_factor_times_the_median_of_what_was_applied() -> None:
    norms = [
        float(1 + (7 * i) % 60) for i in range(60)
    ]  # 1 to 60 in another order: the median is 30.5
    assert filled(*norms).limit == 305.0


def test_there_is_no_limit_before_there_is_a_history_or_without_a_factor() -> None:
    assert filled(*[1.0] * (LEAST_HISTORY - 1)).limit == math.inf
    assert filled(*[1.0] * 100, spike_factor=0.0).limit == math.inf


def test_old_norms_are_forgotten() -> None:
    assert filled(*[100.0] * 80, *[1.0] * 100).limit == 10.0


def test_skipped_steps_do_not_move_the_limit() -> None:
    guard = filled(*[1.0] * 60)
    guard.observe(60, 1e9, False)
    guard.observe(61, math.nan, False)
    assert guard.limit == 10.0


def test_the_third_skipped_step_in_a_row_names_the_whole_bad_spell() -> None:
    guard = filled(1.0, 1.0)
    guard.observe(2, math.nan, False)
    guard.observe(3, math.nan, False)
    guard.observe(4, 1.0, True)
    guard.observe(5, math.nan, False)
    guard.observe(6, math.inf, False)
    with pytest.raises(Rollback) as caught:
        guard.observe(7, math.nan, False)
    assert (caught.value.first, caught.value.stop) == (5, 8)


def test_a_continued_guard_has_the_same_limit() -> None:
    guard = filled(*[0.1 * i for i in range(70)])
    other = filled()
    other.load_state_dict(guard.state_dict())
    assert other.limit == guard.limit
