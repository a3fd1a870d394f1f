# SPDX-License-Identifier: MIT
"""Which rows of a video its encoder computes, and which row stands for each of the others.

In C++ where the extension is built, else in numpy: integers alone, so that both choose the same on every machine.

**Distance.** d(t, m, p) is the sum over channels of the absolute differences of row p of the temporal positions t and
m, and D(t, m, p) = d(t, m, p) + floor(sum over p of d(t, m, p) / P): a row of a frame that has changed is a worse copy.

**Column.** The rows at one place p of one block. K segments cut it into K ranges of at most ``longest`` positions. Of
each range one position stands for all: that of least total D to them. cost(K) is the least sum of all D.

**Shares.** Every column begins with the least K that it can have. The lower convex hull of its costs gives steps to
larger K, each with a gain for every further row, points on an edge of the hull being steps of their own. Steps of all
columns are taken by falling gain, then rising K, then block, then place, until ``num_rows`` are given; of a step that
is too large for what is left the rest is given to its column.

**Ties** go to the lowest index: of the position that stands for a range, and of where a column's last range begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import check_tensor, native

Ints = NDArray[np.int64]
# with num_rows None, in levels: the mean distance of all pixels to what stands for them, and that of a row's; the mean
# alone would leave out what is small and short, an event
UNEXPLAINED = 3
FARTHEST = 8
_SHORTEST_LIMIT = 16  # of `longest`: what the time of the choice grows with
_OPEN_LIMIT = 32  # the same where the number of rows is open
_MOST_TIMES = 8  # the rows of a column are at most so many times what a column has in the mean
_FAR = 1 << 60
_TOO_FAR = 1 << 32  # added to a distance beyond FARTHEST, which no sum of distances reaches


@dataclass(frozen=True)
class _Limits:
    """What is known before a pixel is looked at: the first position behind each block, ``longest``, and of a column of
    each block the least and the most rows."""

    ends: list[int]
    longest: int
    least: list[int]
    most: list[int]


def choose_rows(levels: Tensor, blocks: Sequence[int], num_rows: int | None, backend: str = "auto") -> Tensor:
    """The temporal position whose row stands for each row of a video.

    Args:
        levels: [T, P, C] uint8 on the CPU, the pixels of the P rows of T temporal positions.
        blocks: the first position of each block, ascending from 0: a row is never copied from another block.
        num_rows: rows that stand for themselves, from P times the number of blocks to T * P; None: as few as leave
            ``UNEXPLAINED`` levels in the mean, and of no row more than ``FARTHEST``.
        backend: "native", "torch" (the reference, in this file) or "auto": native where it is built.

    Returns:
        position [T, P] int64: of ``num_rows`` rows their own.

    Raises:
        ValueError: an argument is not as described, or the backend is not to be had.
    """
    sizes = check_tensor("levels", levels, "T P C", (torch.uint8,))
    if levels.device.type != "cpu":
        raise ValueError(f"levels must be on cpu, got {levels.device}")
    if backend not in ("auto", "torch", "native"):
        raise ValueError(f"backend must be one of auto, torch, native, got {backend!r}")
    limits = _limits(sizes["T"], sizes["P"], blocks, num_rows)
    if backend == "torch" or (backend == "auto" and native.MISSING):
        return torch.from_numpy(_reference(levels.numpy().astype(np.int64), limits, num_rows))
    unexplained, farthest = UNEXPLAINED * levels.numel(), _farthest(sizes["C"], num_rows)
    sizes_of_ranges = (limits.longest, limits.least, limits.most)
    return native.choose_rows(levels, limits.ends, *sizes_of_ranges, num_rows, unexplained, farthest)


def _farthest(channels: int, num_rows: int | None) -> int:
    return FARTHEST * channels if num_rows is None else _FAR


def _limits(num_frames: int, places: int, blocks: Sequence[int], num_rows: int | None) -> _Limits:
    first = list(blocks)
    if first[:1] != [0] or any(a >= b for a, b in zip(first, [*first[1:], num_frames], strict=True)):
        raise ValueError(f"blocks must ascend from 0 and end before T={num_frames}, got {first}")
    lengths = [b - a for a, b in zip(first, [*first[1:], num_frames], strict=True)]
    if num_rows is not None and not places * len(first) <= num_rows <= num_frames * places:
        raise ValueError(
            f"num_rows must be between {places * len(first)}, one position of each block, and T*P={num_frames * places}"
            f", got {num_rows}"
        )
    ends = [*first[1:], num_frames]

    def least(longest: int) -> list[int]:
        return [-(-length // longest) for length in lengths]

    if num_rows is None:
        return _Limits(ends, _OPEN_LIMIT, least(_OPEN_LIMIT), lengths)
    longest = _SHORTEST_LIMIT  # leave half of the rows a choice
    while places * sum(least(longest)) > max(places * len(first), num_rows // 2):
        longest *= 2
    most = [min(n, _MOST_TIMES * -(-num_rows * n // (places * num_frames))) for n in lengths]
    return _Limits(ends, longest, least(longest), most)


def _reference(levels: Ints, limits: _Limits, num_rows: int | None) -> Ints:
    places = levels.shape[1]
    columns: list[_Block] = []
    start = 0
    for end, least, most in zip(limits.ends, limits.least, limits.most, strict=True):
        farthest = _farthest(levels.shape[2], num_rows)
        columns.append(_Block(levels[start:end], limits.longest, least, most, farthest))
        start = end
    rows = _share(columns, num_rows, UNEXPLAINED * levels.size)
    position, start = np.empty(levels.shape[:2], dtype=np.int64), 0
    for index, (block, end) in enumerate(zip(columns, limits.ends, strict=True)):
        position[start:end] = start + block.cut(rows[index * places : (index + 1) * places])
        start = end
    return position


class _Block:
    """The columns of one block, side by side.

    Attributes:
        costs: [most + 1, P], the least sum of D of each column in K ranges.
        distances: [most + 1, P], its sum of d.
        least: the first K of these that can be.
    """

    def __init__(self, levels: Ints, longest: int, least: int, most: int, farthest: int) -> None:
        self.least = least
        t, places = levels.shape[:2]
        n = min(longest, t)
        near = np.zeros((n, t, places), dtype=np.int64)  # of position i and the one k further: near[k, i]
        for k in range(1, n):
            near[k, : t - k] = np.abs(levels[k:] - levels[:-k]).sum(-1)
        mean = near.sum(-1, keepdims=True) // places
        near += _TOO_FAR * (near > farthest)
        penalised = near + mean
        # of the ranges that begin at a and have e + 1 positions: who stands for them, sums of D and d
        self._middle = np.zeros((t, n, places), dtype=np.int64)
        cost, distance = np.full((2, t, n, places), _FAR, dtype=np.int64)
        for a in range(t):
            i = np.arange(min(n, t - a))
            lag, earlier = np.abs(i[:, None] - i), a + np.minimum(i[:, None], i)
            total = penalised[lag, earlier].cumsum(0)
            total[i[:, None] < i] = _FAR  # who stands for a range is in it
            middle = total.argmin(1)
            self._middle[a, i] = a + middle
            cost[a, i] = np.take_along_axis(total, middle[:, None], 1)[:, 0]
            distance[a, i] = np.take_along_axis(near[lag, earlier].cumsum(0), middle[:, None], 1)[:, 0]
        self._begin = np.zeros((most + 1, t + 1, places), dtype=np.int64)  # of the last of K ranges that end before b
        self.costs: Ints = np.full((most + 1, places), _FAR, dtype=np.int64)
        self.distances: Ints = self.costs.copy()
        best, sums = np.full((2, t + 1, places), _FAR, dtype=np.int64)
        best[0] = sums[0] = 0
        for k in range(1, most + 1):
            before, sums_before = best.copy(), sums.copy()
            best[0] = _FAR
            for b in range(1, t + 1):
                begin = np.arange(max(0, b - n), b)
                candidates = np.minimum(before[begin] + cost[begin, b - 1 - begin], _FAR)
                first = candidates.argmin(0)[None]
                best[b] = np.take_along_axis(candidates, first, 0)[0]
                sums[b] = np.take_along_axis(sums_before[begin] + distance[begin, b - 1 - begin], first, 0)[0]
                self._begin[k, b] = begin[first[0]]
            self.costs[k], self.distances[k] = best[t], sums[t]

    def steps(self, place: int) -> list[tuple[Fraction, int, int]]:
        """Of a column: gain for each further row, and from which K to which, along its hull."""
        cost, hull = self.costs[:, place].tolist(), [self.least]
        for j in range(self.least + 1, len(cost)):
            while len(hull) > 1 and _rises(cost, hull[-2], hull[-1], j):
                hull.pop()
            hull.append(j)
        return [(Fraction(cost[i] - cost[j], j - i), i, j) for i, j in pairwise(hull)]

    def cut(self, rows: Ints) -> Ints:
        """Who stands for each position [T, P], with ``rows`` [P] ranges."""
        t, _, places = self._middle.shape
        position = np.empty((t, places), dtype=np.int64)
        for place, k in enumerate(rows.tolist()):
            b = t
            while b:
                a = self._begin[k, b, place]
                position[a:b, place] = self._middle[a, b - 1 - a, place]
                b, k = a, k - 1
        return position


def _rises(cost: list[int], i: int, j: int, k: int) -> bool:
    """Whether a row gains more from j to k than from i to j."""
    return (cost[i] - cost[j]) * (k - j) < (cost[j] - cost[k]) * (j - i)


def _share(blocks: list[_Block], num_rows: int | None, unexplained: int) -> Ints:
    """Rows of each column, of all blocks in a row."""
    columns = [(block, place) for block in blocks for place in range(block.costs.shape[1])]
    rows = np.array([block.least for block, _ in columns])
    left = None if num_rows is None else num_rows - int(rows.sum())
    distance = sum(int(block.distances[block.least].sum()) for block in blocks)
    steps = [
        (-gain, to, column, since)
        for column, (block, place) in enumerate(columns)
        for gain, since, to in block.steps(place)
    ]
    for _, to, column, since in sorted(steps):
        if left == 0 if left is not None else distance <= unexplained:
            break
        if left is not None:
            to = min(to, since + left)
            left -= to - since
        rows[column] = to
        block, place = columns[column]
        distance += int(block.distances[to, place] - block.distances[since, place])
    return rows
