"""Confidence intervals and a paired test of mean scores, where mixtures share speakers.

Mixtures of one speaker are scored alike, so they are no independent draws. The interval is from the
bootstrap over speakers: they are drawn with replacement, and a mixture weighs the product of the
counts of its speakers. That is the pigeonhole bootstrap (Owen, "The Pigeonhole Bootstrap", Annals
of Applied Statistics 1(2), 2007), with both factors the same people (Davezies, D'Haultfoeuille and
Guyonvarch, "Empirical Process Results for Exchangeable Arrays", Annals of Statistics 49(2), 2021).
It is mildly conservative: no bootstrap of such data is exact.

Shapes: N mixtures, K kinds of scores, P speakers, R replicates.
"""

from collections.abc import Sequence

import numpy as np

from sepdist.seeding import rng

MIN_SPEAKERS = 5  # fewer say nothing about others
SCHEME = "95 %, percentiles of a bootstrap over speakers; a mixture weighs the product of counts"


def speaker_table(speakers: Sequence[str]) -> tuple[np.ndarray, int]:
    """Numbers of each mixture's speakers, [N, most of one], filled up with P; and P.

    `speakers` has them with "+" in between. A mixture without any counts as its own speaker.
    """
    sets = [sorted(set(text.split("+"))) if text else [i] for i, text in enumerate(speakers)]
    numbers = {one: i for i, one in enumerate(dict.fromkeys(one for each in sets for one in each))}
    table = np.full((len(sets), max(map(len, sets))), len(numbers))
    for row, each in zip(table, sets, strict=True):
        row[: len(each)] = [numbers[one] for one in each]
    return table, len(numbers)


def mean_intervals(
    values_NK: np.ndarray, speakers: Sequence[str], replicates: int = 1000, level: float = 0.95
) -> np.ndarray:
    """The ends [2, K] of the intervals of the means; NaN scores are left out, NaN if undefined."""
    table, num_speakers = speaker_table(speakers)
    if num_speakers < MIN_SPEAKERS or not replicates:
        return np.full((2, values_NK.shape[1]), np.nan)
    known_NK, random = ~np.isnan(values_NK), rng(0, "bootstrap over speakers")
    filled_NK, means = np.where(known_NK, values_NK, 0.0), []
    for _ in range(replicates):
        drawn = random.integers(num_speakers, size=num_speakers)
        weights_N = np.append(np.bincount(drawn, minlength=num_speakers), 1)[table].prod(1)
        with np.errstate(invalid="ignore"):  # of a replicate without any mixture
            means.append(weights_N @ filled_NK / (weights_N @ known_NK))
    return np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


def sign_flip_p(
    differences_N: np.ndarray, speakers: Sequence[str], replicates: int = 9999
) -> float:
    """P value of a paired permutation test of mean 0 that flips the signs of speakers, two-sided.

    Least squares divides every difference into a sum of effects of its speakers, whose signs are
    flipped at random, because differences that share a speaker are no independent pairs. For one
    speaker per mixture this is the common test with the speakers' sums as clusters.
    """
    table, num_speakers = speaker_table(speakers)
    has_NP = (table[:, :, None] == np.arange(num_speakers)).any(1).astype(float)
    has_NP = np.unique(has_NP, axis=1)  # speakers who only occur together cannot be told apart
    effects_P = np.linalg.pinv(has_NP.T @ has_NP, hermitian=True) @ (has_NP.T @ differences_N)
    shares_P = has_NP.sum(0) * effects_P
    signs_RP = rng(0, "sign flips").choice([-1.0, 1.0], (replicates, len(shares_P)))
    observed, tolerance = abs(differences_N.sum()), 1e-9 * np.abs(differences_N).sum()
    as_far = np.abs(signs_RP @ shares_P) >= observed - tolerance
    return float((1 + as_far.sum()) / (1 + replicates))
