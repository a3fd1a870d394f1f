# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""What makes a density peak (DPC-kNN, Sec. 4): densities, scores and ranks, each a launch of ``cluster``.

A program has a block of a frame's tokens, the rows, and goes through all of them, the columns.
"""

import triton
import triton.language as tl

from .device import finite_or

LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)  # of log(0)


@triton.jit
def block(count, clusters, start, row_blocks, ORDERED: tl.constexpr, ROWS: tl.constexpr):
    """Of this program: its frame in the chunk, its rows, the frame's tokens and clusters, whether there is work.

    ORDERED: the centres are asked for, and in order, so there is work where every token is one.
    """
    here = (tl.program_id(0) // row_blocks).to(tl.int64)
    first = tl.program_id(0) % row_blocks * ROWS
    num_tokens = tl.load(count + start + here)
    num_clusters = tl.load(clusters + start + here)
    merging = (num_clusters > 0) & ((num_clusters < num_tokens) | ORDERED)
    return here, first + tl.arange(0, ROWS), num_tokens, num_clusters, merging


@triton.jit
def distances(gram, squares, slots, count, rows, columns, channels):
    """Squared distances of a tile of a frame's tokens, over D; +inf where it is not finite."""
    inside = (rows[:, None] < count) & (columns[None, :] < count)
    product = tl.load(gram + rows.to(tl.int64)[:, None] * slots + columns[None, :], mask=inside, other=0.0)
    of_rows = tl.load(squares + rows, mask=rows < count, other=0.0)
    of_columns = tl.load(squares + columns, mask=columns < count, other=0.0)
    # Copies of a row have the same inner products to the bit, so they are at 0 exactly.
    squared = (of_rows[:, None] - product) + (of_columns[None, :] - product)
    squared = tl.maximum(finite_or(squared, float("inf")), 0.0) / channels
    return tl.where(inside, squared, float("inf")), inside


@triton.jit(do_not_specialize=["start", "slots", "neighbours", "row_blocks"])
def density_kernel(
    gram,
    squares,
    count,
    clusters,
    sparsity,
    farthest,
    start,
    slots,
    d,
    neighbours,
    row_blocks,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Of every token m, the mean of its smallest squared distances (the density is exp(-m)), and the largest of all.
    here, rows, num_tokens, _, merging = block(count, clusters, start, row_blocks, ORDERED, ROWS)
    if merging & (tl.min(rows, axis=0) < num_tokens):
        few = tl.minimum(neighbours, num_tokens)
        missing = tl.where(rows < num_tokens, few, 0)
        total = tl.zeros([ROWS], tl.float32)
        below = tl.full([ROWS], -1.0, tl.float32)
        largest = tl.zeros([ROWS, COLUMNS], tl.float32)
        for _ in range(few):  # the smallest that is above the last one, as often as it is there
            smallest = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
            times = tl.zeros([ROWS, COLUMNS], tl.int32)
            for first in range(0, num_tokens, COLUMNS):
                columns = first + tl.arange(0, COLUMNS)
                frame = gram + here * slots * slots
                squared, inside = distances(frame, squares + here * slots, slots, num_tokens, rows, columns, d)
                largest = tl.maximum(largest, tl.where(inside, squared, 0.0))
                usable = inside & (squared > below[:, None])
                times = tl.where(usable & (squared < smallest), 0, times)
                times += (usable & (squared <= smallest)).to(tl.int32)
                smallest = tl.where(usable, tl.minimum(squared, smallest), smallest)
            below = tl.min(smallest, axis=1)
            take = tl.sum(tl.where(smallest == below[:, None], times, 0), axis=1)
            take = tl.minimum(take, missing)
            total += tl.where(take > 0, below * take, 0.0)
            missing -= take
        tl.store(sparsity + here * slots + rows, total / few, mask=rows < num_tokens)
        tl.store(farthest + here * slots + rows, tl.max(largest, axis=1), mask=rows < num_tokens)


@triton.jit(do_not_specialize=["start", "slots", "row_blocks"])
def score_kernel(
    gram,
    squares,
    count,
    clusters,
    sparsity,
    farthest,
    score,
    start,
    slots,
    d,
    row_blocks,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # log(delta) - m, delta the distance to the nearest denser token; of the densest, the largest of all distances.
    here, rows, num_tokens, _, merging = block(count, clusters, start, row_blocks, ORDERED, ROWS)
    if merging & (tl.min(rows, axis=0) < num_tokens):
        m = tl.load(sparsity + here * slots + rows, mask=rows < num_tokens, other=0.0)
        nearest = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
        denser_ones = tl.zeros([ROWS, COLUMNS], tl.int32)
        largest = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, num_tokens, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            frame = gram + here * slots * slots
            squared, inside = distances(frame, squares + here * slots, slots, num_tokens, rows, columns, d)
            of_columns = tl.load(sparsity + here * slots + columns, mask=columns < num_tokens, other=0.0)
            denser = (of_columns[None, :] == m[:, None]) & (columns[None, :] < rows[:, None])
            denser = inside & (denser | (of_columns[None, :] < m[:, None]))
            denser_ones += denser.to(tl.int32)
            nearest = tl.minimum(nearest, tl.where(denser, squared, float("inf")))
            far = tl.load(farthest + here * slots + columns, mask=columns < num_tokens, other=0.0)
            largest = tl.maximum(largest, far)
        is_densest = tl.sum(denser_ones, axis=1) == 0
        delta = tl.sqrt_rn(tl.where(is_densest, tl.max(largest, axis=0), tl.min(nearest, axis=1)))
        value = tl.log(delta) - m
        value = tl.where(value > LOWEST_SCORE, value, LOWEST_SCORE)  # -inf and NaN
        tl.store(score + here * slots + rows, value, mask=rows < num_tokens)


@triton.jit(do_not_specialize=["start", "slots", "row_blocks"])
def rank_kernel(
    count,
    clusters,
    score,
    rank,
    centers,
    start,
    slots,
    row_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # How many tokens have a higher score, or the same and a lower index. Where nothing is merged all are centres.
    ORDERED: tl.constexpr = centers is not None
    here, rows, num_tokens, num_clusters, merging = block(count, clusters, start, row_blocks, ORDERED, ROWS)
    if tl.min(rows, axis=0) < num_tokens:
        place = rows
        if merging:
            mine = tl.load(score + here * slots + rows, mask=rows < num_tokens, other=0.0)
            before = tl.zeros([ROWS, COLUMNS], tl.int32)
            for first in range(0, num_tokens, COLUMNS):
                columns = first + tl.arange(0, COLUMNS)
                other = tl.load(score + here * slots + columns, mask=columns < num_tokens, other=float("-inf"))
                earlier = (other[None, :] == mine[:, None]) & (columns[None, :] < rows[:, None])
                before += (earlier | (other[None, :] > mine[:, None])).to(tl.int32)
            place = tl.sum(before, axis=1)
        tl.store(rank + here * slots + rows, place, mask=rows < num_tokens)
        if centers is not None:
            tl.store(centers + place, rows, mask=(rows < num_tokens) & (place < num_clusters))
