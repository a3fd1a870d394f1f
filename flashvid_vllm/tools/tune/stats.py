# SPDX-License-Identifier: MIT
"""Intervals over videos, and McNemar's test. Questions about one video are not independent: whole videos are drawn."""

import math
from collections.abc import Callable
from math import comb
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
FEW = 5  # videos that differ: with fewer a bootstrap of shares is too sure of itself
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)

Estimate = tuple[float, float, float]  # value, low, high


def mean(values: np.ndarray, video: np.ndarray) -> Estimate:
    """The mean of ``values`` [n] with its 95 % interval; ``video`` [n] says whose each is."""
    return ratio(np.asarray(values, float), np.ones(len(values)), video)


def ratio(above: np.ndarray, below: np.ndarray, video: np.ndarray) -> Estimate:
    """The sum of ``above`` [n] by that of ``below`` [n], with its 95 % interval.

    The percentile bootstrap draws whole videos. That of m videos is too narrow for a small m: it is stretched about
    the value by t(m - 1) / z * sqrt(m / (m - 1)), which is 1.44 for 6 videos and 1.02 for 100. Of one video nothing
    is known about others: the interval is infinite.
    """
    _, index = np.unique(video, return_inverse=True)
    tops, bottoms = np.bincount(index, weights=above), np.bincount(index, weights=below)
    value = float(tops.sum() / bottoms.sum())
    return _stretched(value, len(tops), lambda drawn: tops[drawn].sum(1) / bottoms[drawn].sum(1))


def median(values: np.ndarray, video: np.ndarray) -> Estimate:
    """The median over videos of each one's mean, all above 0, with the interval of `ratio`, taken of logarithms."""
    _, index = np.unique(video, return_inverse=True)
    means = np.log(np.bincount(index, weights=values) / np.bincount(index))
    value, low, high = _stretched(float(np.median(means)), len(means), lambda drawn: np.median(means[drawn], axis=1))
    return math.exp(value), math.exp(low), math.exp(high)


def share(values: np.ndarray, video: np.ndarray) -> Estimate:
    """The share of ``values`` [n] (0 or 1) that are 1, with a 95 % interval within [0, 1].

    As `mean`, but where fewer than FEW videos have a 0, or fewer than FEW a 1, the bootstrap sees too little of what it
    has to vary (with all alike nothing: a width of 0), so the interval then reaches at least as far as Wilson's of
    as many independent trials as there are videos: it takes a video's questions for one, the worst that they can be.
    All of m videos alike: the lower bound is m / (m + 3.84), 98 % for 189 of them; the rule of three, 1 - 3 / m, is
    one-sided and narrower.
    """
    values = np.asarray(values, float)
    value, low, high = mean(values, video)
    videos = len(np.unique(video))
    if min(len(np.unique(video[values == 0])), len(np.unique(video[values == 1]))) < FEW:
        wide_low, wide_high = wilson(value, videos)
        low, high = min(low, wide_low), max(high, wide_high)
    return value, max(low, 0.0), min(high, 1.0)


def wilson(value: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was found in so many independent trials."""
    z2 = _Z * _Z
    centre = (value + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(value * (1 - value) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided p of two settings being right equally often on the same questions, [n] bool each.

    Questions count as independent, which those about one video are not quite.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    tail = sum(comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def videos_needed(value: float, bound: float, bar: float, videos: int) -> int | None:
    """How many videos would tell on which side of ``bar`` a ``value`` lies; None: it lies on the bar, none would.

    ``bound`` is the end of its interval beyond the bar, of so many ``videos``. The half-width shrinks with the root of
    their number; one of a share of 0 or 1 with the number itself (Wilson's interval).
    """
    if value == bar:
        return None
    if value in (0.0, 1.0) and 0 < bar < 1:
        gap = abs(value - bar)
        return max(videos + 1, math.ceil(_Z * _Z * (1 - gap) / gap))
    if not math.isfinite(bound):
        return None
    return max(videos + 1, math.ceil(videos * ((value - bound) / (value - bar)) ** 2))


def t_quantile(degrees: int) -> float:
    """Student's t that a share of 0.975 lies below: exact for 1 and 2 degrees, else Cornish-Fisher (within 0.006)."""
    p = 0.5 + LEVEL / 2
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, n = _Z, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def _stretched(value: float, videos: int, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    if videos == 1:
        return value, -math.inf, math.inf
    rng = np.random.default_rng(0)
    found = statistic(rng.integers(0, videos, (RESAMPLES, videos)))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    stretch = t_quantile(videos - 1) / _Z * math.sqrt(videos / (videos - 1))
    return value, value - stretch * max(0.0, value - float(low)), value + stretch * max(0.0, float(high) - value)
