# SPDX-License-Identifier: MIT
"""Which rows an encoder computes: exactly as many as asked for, of least total distance, in C++ as in numpy."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from flashvid_vllm.ops import native
from flashvid_vllm.ops.reuse import UNEXPLAINED, choose_rows

BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING))]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def noise(t: int, places: int, channels: int, seed: int, values: int = 256) -> Tensor:
    """Levels [t, places, channels], few ``values`` for ties."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, values, (t, places, channels), dtype=np.uint8))


def moving(t: int, places: int, seed: int) -> Tensor:
    """A still scene in which some places change for a while, and a cut."""
    rng = np.random.default_rng(seed)
    levels = np.repeat(rng.integers(0, 200, (1, places, 5)), t, 0)
    for _ in range(t):
        a, p = rng.integers(t), rng.integers(places)
        levels[a : a + rng.integers(1, 4), p] = rng.integers(0, 200, 5)
    levels[t // 2 :] += rng.integers(0, 50, (1, places, 5))
    return torch.from_numpy((levels + rng.integers(0, 2, levels.shape)).astype(np.uint8))


def assert_sound(position: Tensor, blocks: Sequence[int], num_rows: int) -> None:
    """That ``num_rows`` stand for themselves, in ranges, and none for a row of another block."""
    t, places = position.shape
    assert position.dtype == torch.int64
    own = position == torch.arange(t)[:, None]
    assert int(own.sum()) == num_rows
    assert bool(own.gather(0, position).all())
    assert bool((position.diff(dim=0) >= 0).all())
    block = torch.zeros(t, dtype=torch.int64)
    block[list(blocks)] = 1
    block = block.cumsum(0)
    assert torch.equal(block[position], block[:, None].expand(t, places))


def distances(levels: Tensor) -> tuple[Tensor, Tensor]:
    """d and D [T, T, P], as defined."""
    d = (levels[:, None].long() - levels[None].long()).abs().sum(-1)
    return d, d + d.sum(-1, keepdim=True) // levels.shape[1]


def least_cost(far: Tensor, start: int, stop: int, ranges: int) -> int:
    """Of one column by every way to cut it: the least sum of D [T, T] of so many ranges."""
    best = 1 << 60
    for cuts in itertools.combinations(range(start + 1, stop), ranges - 1):
        ends = [start, *cuts, stop]
        best = min(best, sum(int(far[a:b, a:b].sum(0).min()) for a, b in itertools.pairwise(ends)))
    return best


def hull_rows(costs: list[list[int]], num_rows: int) -> list[int]:
    """Rows of each column by taking the step of most gain a row again and again; costs[column][k - 1]."""
    rows = [1] * len(costs)
    while (left := num_rows - sum(rows)) > 0:
        steps = [
            ((cost[k - 1] - cost[j - 1]) / (j - k), -j, -column)
            for column, (cost, k) in enumerate(zip(costs, rows, strict=True))
            for j in range(k + 1, len(cost) + 1)
        ]
        _, to, column = max(steps)
        rows[-column] = min(-to, rows[-column] + left)
    return rows


@pytest.mark.parametrize("values", [2, 256], ids=["ties", "noise"])
@pytest.mark.parametrize("blocks", [[0], [0, 3]])
def test_the_definition_by_brute_force(backend: str, blocks: list[int], values: int) -> None:
    """Ranges, who stands for them, and how many rows a column gets: all of it from the definition."""
    t, places = 7, 3
    for seed in range(3):
        levels = noise(t, places, 2, seed, values)
        _, far = distances(levels)
        ends = [*blocks[1:], t]
        costs = [
            [least_cost(far[..., p], a, b, k) for k in range(1, b - a + 1)]
            for a, b in zip(blocks, ends, strict=True)
            for p in range(places)
        ]
        for num_rows in range(places * len(blocks), t * places + 1, 2):
            position = choose_rows(levels, blocks, num_rows, backend)
            assert_sound(position, blocks, num_rows)
            rows = hull_rows(costs, num_rows)
            for index, (a, b) in enumerate(zip(blocks, ends, strict=True)):
                for p in range(places):
                    at, k = position[a:b, p], rows[index * places + p]
                    assert len(at.unique()) == k
                    paid = int(far[torch.arange(a, b), at, p].sum())
                    assert paid == costs[index * places + p][k - 1]


CASES: list[tuple[Tensor, list[int]]] = [
    (noise(9, 4, 3, 0), [0]),
    (noise(12, 5, 2, 1, 2), [0, 5]),
    (noise(10, 3, 4, 2, 1), [0, 4, 8]),
    (moving(40, 6, 3), [0]),
    (moving(50, 4, 4), [0, 18, 36]),
    (moving(37, 3, 5), [0, 1, 2, 20]),
    (noise(1, 3, 2, 6), [0]),
    (noise(70, 1, 7, 7), [0]),
]


@pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "built")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_native_chooses_as_the_reference(case: int) -> None:
    """To the index, also where there are ties, more than the longest range, and on two threads."""
    levels, blocks = CASES[case]
    t, places = levels.shape[:2]
    least = places * len(blocks)
    for num_rows in sorted({least, least + 1, t * places // 4, t * places // 2, t * places - 1, t * places}):
        if not least <= num_rows <= t * places:
            continue
        expected = choose_rows(levels, blocks, num_rows, "torch")
        assert_sound(expected, blocks, num_rows)
        for threads in (1, 2):
            with threads_of(threads):
                assert torch.equal(choose_rows(levels, blocks, num_rows, "native"), expected)
    open_ended = choose_rows(levels, blocks, None, "torch")
    assert torch.equal(choose_rows(levels, blocks, None), open_ended)


class threads_of:
    """So many threads inside."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


def test_still_videos_and_copies(backend: str) -> None:
    """Nothing is computed twice that is there once, as far as fewer rows may be."""
    still = noise(1, 4, 3, 0).repeat(9, 1, 1)
    assert bool((choose_rows(still, [0], 4, backend) == 0).all())
    assert bool((choose_rows(still, [0], None, backend) == 0).all())
    assert choose_rows(still, [0, 5], 8, backend)[:, 0].tolist() == [0] * 5 + [5] * 4
    # what need not be given is spread: no place has all of it
    assert [len(column.unique()) for column in choose_rows(still, [0], 10, backend).T] == [3, 3, 2, 2]
    two = noise(2, 4, 3, 1)
    copies = two[[0, 0, 0, 1, 1]]
    for num_rows in (8, None):
        assert torch.equal(choose_rows(copies, [0], num_rows, backend)[:, 0], torch.tensor([0, 0, 0, 3, 3]))
    # one place changes: the rows go there
    levels = still.clone()
    levels[:, 2] = noise(9, 1, 3, 2)[:, 0]
    assert [len(column.unique()) for column in choose_rows(levels, [0], 12, backend).T] == [1, 1, 9, 1]


def test_few_rows_reach_further(backend: str) -> None:
    """Ranges of more than 16 positions where shorter ones would take more than half of the rows."""
    scenes = noise(4, 2, 3, 5)[[0] * 30 + [1] * 10 + [2] * 10 + [3] * 14]
    expected = torch.tensor([0] * 30 + [30] * 10 + [40] * 10 + [50] * 14)
    assert torch.equal(choose_rows(scenes, [0], 8, backend), expected[:, None].expand(64, 2))
    assert len(choose_rows(scenes[:1].expand(64, 2, 3), [0], None, backend).unique()) == 2  # 32 where it is open


def test_the_open_number_leaves_what_it_may(backend: str) -> None:
    """One row less of the last step taken would leave more than `UNEXPLAINED` levels."""
    for seed in range(3):
        levels = moving(24, 5, seed)
        near, _ = distances(levels)
        t, places = levels.shape[:2]

        def left(position: Tensor, near: Tensor = near) -> int:
            at = torch.arange(near.shape[0])[:, None], position, torch.arange(near.shape[2])
            return int(near[at].sum())

        position = choose_rows(levels, [0], None, backend)
        num_rows = int((position == torch.arange(t)[:, None]).sum())
        assert places < num_rows < t * places
        assert left(position) <= UNEXPLAINED * levels.numel() < left(choose_rows(levels, [0], num_rows // 2, backend))


@pytest.fixture
def levels() -> Tensor:
    return noise(4, 3, 2, 0)


@pytest.mark.parametrize(
    ("blocks", "num_rows", "message"),
    [
        ([1], 6, "blocks must ascend from 0 and end before T=4, got \\[1\\]"),
        ([], 6, "blocks must ascend from 0"),
        ([0, 2, 2], 9, "blocks must ascend from 0"),
        ([0, 4], 9, "blocks must ascend from 0"),
        ([0, 2], 5, "num_rows must be between 6, one position of each block, and T\\*P=12, got 5"),
        ([0], 13, "num_rows must be between 3"),
    ],
)
def test_bad_arguments(levels: Tensor, blocks: list[int], num_rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_rows(levels, blocks, num_rows)
    with pytest.raises(ValueError, match=r"levels must be torch.uint8, got torch.float32"):
        choose_rows(levels.float(), [0], 6)
    with pytest.raises(ValueError, match=r"backend must be one of auto, torch, native, got 'triton'"):
        choose_rows(levels, [0], 6, "triton")
