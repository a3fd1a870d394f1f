# SPDX-License-Identifier: MIT
"""Intervals and paired tests for right and wrong answers. Questions about one video are not independent."""

from collections.abc import Iterable
from math import comb

import numpy as np

RESAMPLES = 4000


def interval(values: np.ndarray, video: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of the mean of ``values`` [n], whole videos drawn; ``video`` [n] says whose each is.

    For accuracies values are 0 or 1, for a paired difference of two settings -1, 0 or 1.
    """
    _, index = np.unique(video, return_inverse=True)
    sums = np.bincount(index, weights=values)
    counts = np.bincount(index)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided p of two settings being right equally often on the same questions, [n] bool each."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    tail = sum(comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's correction of several p-values, by name."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return corrected


def percent(right: np.ndarray) -> str:
    """The accuracy of [n] bool, as tables have it."""
    return f"{100 * right.mean():.1f}"


def as_line(right: Iterable[bool]) -> str:
    """Answers as a committed file has them: "1" for each right one, "0" for each wrong one."""
    return "".join(str(int(x)) for x in right)


def of_line(line: str) -> np.ndarray:
    """[n] bool of what `as_line` gives."""
    return np.array([character == "1" for character in line])
