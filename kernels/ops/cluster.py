# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""DPC-kNN of every frame, over a number of tokens that only the device knows (Sec. 4)."""

import triton
import triton.language as tl
from torch import Tensor

from .device import finite_or, pick
from .launch import launch, power_of_2
from .layout import Layout

LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)  # of log(0), so that padding ranks below it


@triton.jit
def _distances(gram, n, count, rows, lane, square, channels):
    """Squared distances of a tile of rows to all tokens, over D; +inf where it is not finite."""
    at_rows = tl.load(gram + rows.to(tl.int64) * (n + 1), mask=rows < count, other=0.0)
    inside = (rows[:, None] < count) & (lane[None, :] < count)
    product = tl.load(gram + rows.to(tl.int64)[:, None] * n + lane[None, :], mask=inside, other=0.0)
    # Copies of a row have the same inner products to the bit, so they are at 0 exactly.
    squared = (at_rows[:, None] - product) + (square[None, :] - product)
    squared = finite_or(squared, float("inf"))
    return tl.where(inside, tl.maximum(squared, 0.0) / channels, float("inf")), inside


@triton.jit
def _peak_ranks(gram, n, count, neighbours, channels, lane, square, ROWS: tl.constexpr):
    """Rank of every token by its score log(delta) - m, 0 the highest; ties to the lowest index."""
    sparsity = tl.zeros(lane.shape, tl.float32)  # m; the density is exp(-m)
    largest = tl.full([], 0.0, tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        squared, inside = _distances(gram, n, count, rows, lane, square, channels)
        largest = tl.maximum(largest, tl.max(tl.max(tl.where(inside, squared, 0.0), axis=1), axis=0))
        total = tl.zeros([ROWS], tl.float32)
        for _ in range(neighbours):
            nearest, which = tl.min(squared, axis=1, return_indices=True)
            total += nearest
            squared = tl.where(lane[None, :] == which[:, None], float("inf"), squared)
        mine = rows[:, None] == lane[None, :]
        sparsity += tl.sum(tl.where(mine, (total / neighbours)[:, None], 0.0), axis=0)

    padded = tl.where(lane < count, sparsity, float("inf"))
    densest = tl.min(tl.where((padded == tl.min(padded, axis=0)) & (lane < count), lane, n), axis=0)
    delta = tl.full(lane.shape, float("inf"), tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        squared, inside = _distances(gram, n, count, rows, lane, square, channels)
        of_rows = pick(sparsity, lane, rows)[:, None]
        denser = (of_rows == sparsity[None, :]) & (rows[:, None] < lane[None, :])
        denser = inside & (denser | (of_rows < sparsity[None, :]))
        delta = tl.minimum(delta, tl.min(tl.where(denser, squared, float("inf")), axis=0))
    delta = tl.sqrt_rn(tl.where(lane == densest, largest, delta))
    score = tl.log(delta) - sparsity
    score = tl.where(score > LOWEST_SCORE, score, LOWEST_SCORE)  # -inf and NaN

    rank = tl.zeros(lane.shape, tl.int32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        of_rows = pick(score, lane, rows)[:, None]
        before = (of_rows == score[None, :]) & (rows[:, None] < lane[None, :])
        before = (rows[:, None] < count) & (before | (of_rows > score[None, :]))
        rank += tl.sum(before.to(tl.int32), axis=0)
    return rank


@triton.jit
def _nearest_center(gram, n, count, channels, lane, square, center, value, ROWS: tl.constexpr):
    """``value`` of each token's nearest center; ties to the lowest token; a center is its own."""
    lowest = tl.min(tl.where(center, lane, n), axis=0)
    best = tl.full(lane.shape, float("inf"), tl.float32)
    result = tl.zeros(lane.shape, tl.int32) + tl.sum(tl.where(lane == lowest, value, 0), axis=0)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        squared, _ = _distances(gram, n, count, rows, lane, square, channels)
        usable = pick(center.to(tl.int32), lane, rows)[:, None] != 0
        nearest, which = tl.min(tl.where(usable, squared, float("inf")), axis=0, return_indices=True)
        of_rows = pick(value, lane, rows)
        chosen = tl.arange(0, ROWS)[:, None] == which[None, :]
        found = tl.sum(tl.where(chosen, of_rows[:, None], 0), axis=0)
        result = tl.where(nearest < best, found, result)
        best = tl.minimum(best, nearest)
    return tl.where(center, value, result)


@triton.jit(do_not_specialize=["start", "n", "slots", "neighbours"])
def cluster_kernel(
    gram,
    count,
    clusters,
    centers,
    assignment,
    candidate,
    slot_token,
    picked_before,
    row_base,
    slot_row,
    source_index,
    start,
    n,
    slots,
    d,
    neighbours,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    here = tl.program_id(0).to(tl.int64)
    t = start + here
    rows_of_frame = gram + here * slots * slots
    lane = tl.arange(0, BLOCK_S)
    num_tokens = tl.load(count + t)
    num_clusters = tl.load(clusters + t)
    inside = lane < num_tokens
    rank = lane
    square = tl.load(rows_of_frame + lane.to(tl.int64) * (slots + 1), mask=inside, other=0.0)
    merging = num_clusters < num_tokens
    if centers is not None:
        merging = num_clusters > 0  # the centers are asked for, and in order
    if merging & (num_clusters > 0):
        few = tl.minimum(neighbours, num_tokens)
        rank = _peak_ranks(rows_of_frame, slots, num_tokens, few, d, lane, square, ROWS=ROWS)
    center = inside & (rank < num_clusters)
    if centers is not None:
        tl.store(centers + rank, lane, mask=center)
        value = rank
    else:
        base = tl.load(row_base + t).to(tl.int32)
        order = tl.cumsum(center.to(tl.int32), axis=0) - 1
        value = base + order + tl.load(picked_before + t * slots + lane, mask=inside, other=0)
    result = tl.where(center, value, -1)
    if merging & (num_clusters > 0):
        result = _nearest_center(rows_of_frame, slots, num_tokens, d, lane, square, center, value, ROWS=ROWS)
    if centers is not None:
        tl.store(assignment + lane, result, mask=inside)
    else:
        tl.store(slot_row + t * slots + lane, tl.where(inside, result, -1), mask=lane < slots)
        slot_at = tl.load(slot_token + t * slots + lane, mask=inside, other=0)
        tl.store(source_index + value, t * n + slot_at, mask=center)
        # The tokens that ADTS kept lie between the centers: a row for each, in the order of position.
        token = tl.arange(0, BLOCK_N)
        free = tl.load(candidate + t * n + token, mask=token < n, other=1) != 0
        row = base + tl.cumsum((~free).to(tl.int32), axis=0) - 1
        for first in range(0, num_tokens, ROWS):
            rows = first + tl.arange(0, ROWS)
            at_rows = pick(slot_at, lane, rows)[:, None]
            is_center = pick(center.to(tl.int32), lane, rows)[:, None]
            row += tl.sum(tl.where(at_rows < token[None, :], is_center, 0), axis=0)
        tl.store(source_index + row, t * n + token, mask=~free)
        tl.store(assignment + t * n + token, row, mask=~free)


def cluster(
    gram: Tensor,
    count: Tensor,
    clusters: Tensor,
    d: int,
    neighbours: int,
    assignment: Tensor,
    centers: Tensor | None = None,
    layout: Layout | None = None,
    start: int = 0,
) -> None:
    """Cluster the first ``count`` of S tokens of every frame around density peaks.

    Args:
        gram: [frames, S, S] float32, contiguous: inner products of D channels about any common origin.
        count, clusters: [T] int32: tokens and wanted clusters of each frame; ``start`` is the first of gram.
        neighbours: that make the density, the token itself included; a frame with fewer tokens takes all.
        centers, assignment: [clusters], [S] int64, written as ``cluster_tokens`` returns them (one frame).

    With ``layout`` instead of ``centers``, the output rows of these frames are laid out: its ``slot_row`` and
    ``source_index`` are written, and ``assignment`` [T, N] int64 at the tokens that ADTS kept.
    """
    frames, slots, _ = gram.shape
    n = slots
    lists: tuple[Tensor | None, ...] = (None,) * 6
    if layout is not None:
        n = layout.candidate.shape[1]
        lists = (
            layout.candidate, layout.slot_token, layout.picked_before, layout.row_base, layout.slot_row,
            layout.source_index,
        )  # fmt: skip
    block = power_of_2(slots)
    launch(
        cluster_kernel,
        frames,
        gram,
        count,
        clusters,
        centers,
        assignment,
        *lists,
        start,
        n,
        slots,
        d,
        neighbours,
        BLOCK_S=block,
        BLOCK_N=power_of_2(n),
        ROWS=max(1, min(8, 4096 // block)),
        num_warps=8,
        max_registers=128,  # left alone, sm_80 and sm_90 spill
    )
