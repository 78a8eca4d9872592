"""How certain a mean is: bootstrap intervals, the signed-rank test, and Holm's adjustment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from custom.errors import AliceError

MIN_CASES = 3  # an interval of two cases would only repeat the two values (ours)


class Interval(NamedTuple):
    """Confidence interval of a mean; nan if there are too few cases."""

    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike, *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Interval:
    """Bootstrap interval of a mean, or of a mean difference if the values are paired differences.

    Cases are drawn with replacement. One row of values gives the bias-corrected and accelerated interval
    (BCa). Several rows are training seeds: seeds and cases are drawn independently, and the interval is the
    percentile one. With few cases or seeds any bootstrap interval is too narrow.

    Args:
        values: (cases,) or (seeds, cases); nan where there is no value.
        seed: of the random draws.
        draws: number of draws.
        level: coverage of the interval, in (0, 1).

    Returns:
        The interval; nan if there are fewer than three cases.

    Raises:
        AliceError: if a value is infinite, or ``level`` or ``draws`` is out of range.
    """
    table = np.atleast_2d(np.asarray(values, dtype=float))
    if np.isinf(table).any():
        raise AliceError("An infinite value has no mean; count it and leave it out first.")
    if not 0 < level < 1 or draws < 1:
        raise AliceError(f"Take a level in (0, 1) and at least one draw, got {level} and {draws}.")
    known = ~np.isnan(table)
    table, known = (part[known.any(axis=1)][:, known.any(axis=0)] for part in (table, known))
    num_seeds, num_cases = table.shape
    if num_cases < MIN_CASES:
        return Interval(math.nan, math.nan)

    # a draw is how often it takes each seed and each case
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws)
    case_weights = rng.multinomial(num_cases, np.full(num_cases, 1 / num_cases), size=draws)
    sums = (seed_weights @ np.where(known, table, 0.0) * case_weights).sum(axis=1)
    sizes = (seed_weights @ known.astype(int) * case_weights).sum(axis=1)
    means = sums[sizes > 0] / sizes[sizes > 0]

    levels = np.array([(1 - level) / 2, (1 + level) / 2])
    if num_seeds == 1:
        levels = _bca_levels(table[0], means, levels)
    return Interval(*np.quantile(means, levels).tolist())


def signed_rank_p(differences: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros keep their ranks (Pratt), infinities rank highest.

    Nan values are left out. If all differences are zero, p is 1; if there are none, p is nan. With fewer than
    six differences p cannot fall below 0.05.
    """
    values = np.asarray(differences, dtype=float)
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan
    values = np.where(np.isinf(values), values, values.round(12))  # 0.9 - 0.8 and 0.8 - 0.7 are a tie
    if not values.any():
        return 1.0
    # only ranks matter to the test, so finite stand-ins of the same rank replace infinities
    _, stand_in = np.unique(np.append(np.abs(values), 0.0), return_inverse=True)
    return float(stats.wilcoxon(np.sign(values) * stand_in[:-1], zero_method="pratt").pvalue)


def _bca_levels(
    cases: NDArray[np.float64], means: NDArray[np.float64], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The quantiles of the drawn means that make the interval BCa (Efron 1987)."""
    observed = cases.mean()
    below = np.mean(means < observed) + np.mean(means == observed) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / (len(means) + 1), len(means) / (len(means) + 1)))
    influences = cases - observed  # how each case changes the mean, up to a factor that cancels
    spread = (influences**2).sum() ** 1.5
    acceleration = (influences**3).sum() / (6 * spread) if spread > 0 else 0.0
    shifted = bias + stats.norm.ppf(levels)
    return stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p values; a nan is not counted as a test."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = list(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted
