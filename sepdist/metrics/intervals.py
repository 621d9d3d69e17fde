"""Confidence intervals and a paired test of mean scores, where mixtures share speakers.

Mixtures of one speaker are scored alike, so they are no independent draws. The interval is from the
bootstrap over speakers: they are drawn with replacement, and a mixture weighs the product of the
counts of its speakers. That is the pigeonhole bootstrap (Owen, "The Pigeonhole Bootstrap", Annals
of Applied Statistics 1(2), 2007), with both factors the same people (Davezies, D'Haultfoeuille and
Guyonvarch, "Empirical Process Results for Exchangeable Arrays", Annals of Statistics 49(2), 2021).
It is mildly conservative: no bootstrap of such data is exact. Where several runs that differ by
their seeds scored the same mixtures, the seeds are drawn with replacement too.

Shapes: E seeds, N mixtures, K kinds of scores, P speakers, R replicates.
"""

from collections.abc import Sequence

import numpy as np

from sepdist.seeding import rng

MIN_SPEAKERS = 5  # fewer say nothing about others
SEEDS = "95 %, percentiles of a bootstrap over seeds and speakers"
SCHEME = "95 %, percentiles of a bootstrap over speakers; a mixture weighs the product of counts"


def speakers_in(speakers: Sequence[str]) -> np.ndarray:
    """Which of all speakers each mixture has, 0 or 1, [N, P].

    `speakers` has them with "+" in between. A mixture without any counts as its own speaker.
    """
    sets = [{*text.split("+")} if text else {i} for i, text in enumerate(speakers)]
    names = list(dict.fromkeys(one for each in sets for one in sorted(each)))
    return np.array([[one in each for one in names] for each in sets], float)


def mean_intervals(
    values: np.ndarray, speakers: Sequence[str], replicates: int = 1000
) -> list[list[float] | None]:
    """95 % intervals of the K means of scores [N, K] or [E, N, K]; None for few speakers.

    Scores that are NaN do not count; with seeds there are none.
    """
    has_NP, known_NK = speakers_in(speakers), ~np.isnan(values.reshape(-1, *values.shape[-2:])[0])
    num_speakers = has_NP.shape[1]
    if num_speakers < MIN_SPEAKERS:
        return [None] * values.shape[-1]
    chances = np.full(num_speakers, 1 / num_speakers)
    counts_RP = rng(0, "bootstrap over speakers").multinomial(num_speakers, chances, replicates)
    weights_RN = np.exp(np.log(np.maximum(counts_RP, 1e-99)) @ has_NP.T).round()
    if values.ndim == 3:
        shares_RE = rng(0, "bootstrap over seeds").multinomial(
            num_seeds := len(values), np.full(num_seeds, 1 / num_seeds), replicates
        )
        sums_RK = np.einsum("re,rn,enk->rk", shares_RE / num_seeds, weights_RN, values)
    else:
        sums_RK = weights_RN @ np.where(known_NK, values, 0.0)
    with np.errstate(invalid="ignore"):  # of draws of speakers who have no mixture together
        means_RK = sums_RK / (weights_RN @ known_NK)
    ends_K2 = np.nanquantile(means_RK, [0.025, 0.975], axis=0).T
    return [ends.tolist() if np.isfinite(ends).all() else None for ends in ends_K2]


def t_interval(values_E: np.ndarray) -> list[float] | None:
    """95 % interval of the mean of seeds by Student's t distribution; None for a single one."""
    if len(values_E) < 2:
        return None
    from scipy import stats  # late: SciPy takes a second to import

    mean, deviation = values_E.mean(), values_E.std(ddof=1) / np.sqrt(len(values_E))
    half = stats.t.ppf(0.975, len(values_E) - 1) * deviation
    return [float(mean - half), float(mean + half)]


def sign_flip_p(
    differences_N: np.ndarray, speakers: Sequence[str], replicates: int = 9999
) -> float:
    """P value of a paired permutation test of mean 0 that flips the signs of speakers, two-sided.

    Least squares divides every difference into a sum of effects of its speakers, whose signs are
    flipped at random, because differences that share a speaker are no independent pairs. For one
    speaker per mixture this is the common test with the speakers' sums as clusters.
    """
    # Speakers who only occur together cannot be told apart: they are one.
    has_NP = np.unique(speakers_in(speakers), axis=1)
    effects_P = np.linalg.pinv(has_NP.T @ has_NP, hermitian=True) @ (has_NP.T @ differences_N)
    shares_P = has_NP.sum(0) * effects_P
    signs_RP = rng(0, "sign flips").choice([-1.0, 1.0], (replicates, len(shares_P)))
    least = abs(shares_P.sum()) - 1e-9 * np.abs(shares_P).sum()
    return float((1 + (np.abs(signs_RP @ shares_P) >= least).sum()) / (1 + replicates))
