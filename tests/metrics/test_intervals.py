"""Intervals and p values of means over mixtures that share speakers, against enumeration."""

import itertools
from collections import Counter

import numpy as np
import pytest

from sepdist.metrics.intervals import mean_intervals, sign_flip_p, t_interval


def scores_of_pairs(
    random: np.random.Generator, num_speakers: int, num: int, spread: float
) -> tuple[np.ndarray, list[str]]:
    """Scores with mean 0: an effect of each of two speakers, and noise."""
    effects = random.normal(0, spread, num_speakers)
    pairs = np.array([random.choice(num_speakers, 2, replace=False) for _ in range(num)])
    scores = effects[pairs].sum(1) + random.normal(0, 1, num)
    return scores, ["+".join(map(str, pair)) for pair in pairs]


def test_the_interval_is_that_of_all_draws_of_speakers_with_the_products_of_their_counts() -> None:
    speakers = ["a+b", "b+c", "c+d", "d+e", "e+a", "a+c"]
    scores = np.array([1.0, 4.0, -2.0, 0.5, 7.0, 3.0])
    means = []
    for draw in itertools.product("abcde", repeat=5):  # each of 3125 draws is as likely
        counts = Counter(draw)
        weights = [counts[pair[0]] * counts[pair[2]] for pair in speakers]
        if sum(weights):
            means.append(np.average(scores, weights=weights))
    [(low, high)] = mean_intervals(scores[:, None], speakers, 20_000)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.15)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.15)


def test_it_covers_the_mean_where_speakers_differ_and_one_over_mixtures_does_not() -> None:
    random, num_trials = np.random.default_rng(1), 60
    covered, covered_by_mixtures = 0, 0
    for _ in range(num_trials):  # 200 mixtures of 35 speakers, as in docs/results-2026-11.md
        scores, speakers = scores_of_pairs(random, 35, 200, 1.0)
        [(low, high)] = mean_intervals(scores[:, None], speakers, 300)
        covered += low <= 0 <= high
        naive = scores[random.integers(200, size=(300, 200))].mean(1)
        covered_by_mixtures += np.quantile(naive, 0.025) <= 0 <= np.quantile(naive, 0.975)
    assert covered >= 0.88 * num_trials  # 95 % less two deviations
    assert covered_by_mixtures < 0.75 * num_trials


def test_with_seeds_the_interval_is_that_of_all_draws_of_seeds_and_speakers() -> None:
    speakers = ["a+b", "b+c", "c+d", "d+e", "e+a", "a+c"]
    scores_EN = np.random.default_rng(4).normal(0, 1, (3, 6)) + np.array([[0.0], [3.0], [5.0]])
    means = []
    for seeds in itertools.product(range(3), repeat=3):
        for draw in itertools.product("abcde", repeat=5):
            counts = Counter(draw)
            weights = [counts[pair[0]] * counts[pair[2]] for pair in speakers]
            if sum(weights):
                means.append(np.average(scores_EN[list(seeds)].mean(0), weights=weights))
    [(low, high)] = mean_intervals(scores_EN[..., None], speakers, 20_000)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.15)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.15)
    alone = mean_intervals(scores_EN[:1, :, None], speakers)
    assert alone == mean_intervals(scores_EN[0, :, None], speakers)


def test_the_interval_over_seeds_is_students() -> None:
    # By hand: mean 3, deviation sqrt(14 / 3), and 3.18245 is t of 3 degrees of freedom in tables.
    half = 3.18245 * (14 / 3) ** 0.5 / 2
    assert t_interval(np.array([1.0, 2, 3, 6])) == pytest.approx([3 - half, 3 + half], abs=1e-4)
    assert t_interval(np.array([1.0])) is None


def test_nan_is_left_out_of_its_own_mean_only() -> None:
    random = np.random.default_rng(2)
    scores, speakers = scores_of_pairs(random, 8, 40, 1.0)
    holes = scores.copy()
    holes[:10] = np.nan
    both = mean_intervals(np.stack([scores, holes], 1), speakers)
    [alone] = mean_intervals(scores[:, None], speakers)
    assert both[0] == pytest.approx(alone)
    assert both[1][0] < np.nanmean(holes) < both[1][1]


def test_few_speakers_have_no_interval_and_unknown_ones_count_one_by_one() -> None:
    scores = np.arange(12.0)[:, None]
    assert mean_intervals(scores, ["a+b", "c+d"] * 6) == [None]
    unknown, own = (mean_intervals(scores, names) for names in ([""] * 12, list("abcdefghijkl")))
    assert unknown == own != [None]


def test_with_one_speaker_each_the_p_value_is_that_of_all_sign_flips_of_their_sums() -> None:
    speakers = [*"abcdefgh", *"abcd"]
    gains = np.random.default_rng(3).normal(0.6, 1, 12)
    sums = np.array([gains[[one == name for one in speakers]].sum() for name in "abcdefgh"])
    flips = np.array([*itertools.product([-1, 1], repeat=8)]) @ sums
    exact = np.mean(np.abs(flips) >= abs(gains.sum()) - 1e-9)
    assert sign_flip_p(gains, speakers) == pytest.approx(exact, abs=0.015)


@pytest.mark.parametrize(("num_speakers", "spread"), [(35, 0.0), (35, 1.0)])
def test_of_equal_systems_few_are_called_different_and_a_clear_gain_is_found(
    num_speakers: int, spread: float
) -> None:
    random = np.random.default_rng(4)
    drawn = [scores_of_pairs(random, num_speakers, 120, spread) for _ in range(60)]
    assert np.mean([sign_flip_p(*one, replicates=199) <= 0.05 for one in drawn]) <= 0.11
    found = [sign_flip_p(one + 2.0, names, replicates=199) <= 0.05 for one, names in drawn[:20]]
    assert np.mean(found) > 0.9


def test_the_same_system_twice_has_p_1_and_speakers_who_never_meet_others_count_once() -> None:
    assert sign_flip_p(np.zeros(4), ["a+b", "c+d", "e+f", "g+h"]) == 1
    # Four pairs are four clusters: 2 of 16 flips are as far from 0.
    assert sign_flip_p(np.ones(4), ["a+b", "c+d", "e+f", "g+h"]) == pytest.approx(1 / 8, abs=0.02)


def test_a_mixture_of_one_speaker_among_pairs_does_not_make_every_difference_certain() -> None:
    speakers = ["+".join(pair) for pair in itertools.combinations_with_replacement("abcde", 2)]
    # Equal differences are equal effects: of the 32 flips only two do not lower the sum.
    assert sign_flip_p(np.ones(15), speakers) == pytest.approx(2 / 32, abs=0.01)
