# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""Greedy calibrated Max-Min Diversity: the nearest of each token, then a frame's picks in one program (Sec. 2)."""

import triton
import triton.language as tl
from torch import Tensor

from .device import finite_or, first_of_largest, inverse_norm, take_better
from .launch import cdiv, launch, tiles

FLAT_DISTANCE = tl.constexpr(1e-5)  # cosine distances below are rounding, and count as 0
LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)  # of a non-finite score; a picked token ranks below it
PICKED = tl.constexpr(-1.0)  # in the place of a distance


@triton.jit
def _distance(gram, inverse_i, inverse_j):
    distance = 1 - gram * inverse_i * inverse_j
    return finite_or(tl.where(distance < FLAT_DISTANCE, 0.0, distance), float("inf"))


@triton.jit(do_not_specialize=["n", "row_blocks"])
def nearest_kernel(
    gram, squares, nearest, inverse, n, row_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    # A block of rows of a frame: the distance of each to the nearest of all others.
    frame = (tl.program_id(0) // row_blocks).to(tl.int64) * n
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    inverse_row = inverse_norm(squares, frame + row, row < n, 1, 0)
    best = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        other = (row[:, None] < n) & (column[None, :] < n) & (row[:, None] != column[None, :])
        product = tl.load(gram + (frame + row)[:, None] * n + column[None, :], mask=other, other=0.0)
        inverse_column = inverse_norm(squares, frame + column, column < n, 1, 0)
        distance = _distance(product, inverse_column[None, :], inverse_row[:, None])
        best = tl.minimum(best, tl.where(other, distance, float("inf")))
    tl.store(nearest + frame + row, tl.min(best, axis=1), mask=row < n)
    tl.store(inverse + frame + row, inverse_row, mask=row < n)


@triton.jit(do_not_specialize=["n", "k", "stride_t"], do_not_specialize_on_alignment=["candidate", "weight"])
def select_kernel(
    candidate,
    index,
    gram,
    inverse,
    nearest,
    weight,
    n,
    k,
    stride_t,
    stride_n,
    BLOCK: tl.constexpr,
):
    # ``nearest`` is the state of the loop, in memory: it is read while the row of the last choice is on its way.
    t = tl.program_id(0).to(tl.int64)
    frame = t * n
    choice = tl.full([], -1, tl.int32)
    for step in range(k):
        known = tl.where(choice >= 0, n, 0)  # tokens whose distance to the last choice there is: none at first
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_at = tl.zeros([BLOCK], tl.int32) + n
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            if gram is None:
                near = tl.load(nearest + frame + at, mask=at < known, other=1.0)
            else:
                near = tl.load(nearest + frame + at, mask=inside, other=0.0)
                product = tl.load(gram + (frame + choice) * n + at, mask=at < known, other=0.0)
                inverse_choice = tl.load(inverse + frame + choice, mask=choice >= 0, other=1.0)
                inverse_at = tl.load(inverse + frame + at, mask=at < known, other=1.0)
                to_choice = _distance(product, inverse_choice, inverse_at)
                # Before the first pick it was the distance to any other token, and is forgotten.
                to_picked = tl.where(step == 1, to_choice, tl.minimum(near, to_choice))
                near = tl.where(choice >= 0, to_picked, near)
            near = tl.where(at == choice, PICKED, near)
            tl.store(nearest + frame + at, near, mask=inside)
            score = near
            if weight is not None:
                w = tl.load(weight + t * stride_t + at.to(tl.int64) * stride_n, mask=inside, other=0.0)
                score *= w.to(tl.float32)
            score = finite_or(score, LOWEST_SCORE)
            score = tl.where(inside & (near != PICKED), score, float("-inf"))
            best, best_at = take_better(score, at, best, best_at)
        _, choice = first_of_largest(best, best_at, n)
        tl.debug_barrier()  # what one thread stored another may load
    known = tl.where(choice >= 0, n, 0)
    picked_before = tl.full([], 0, tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        near = tl.load(nearest + frame + at, mask=at < known, other=0.0)
        picked = inside & ((near == PICKED) | (at == choice))
        if candidate is not None:
            tl.store(candidate + frame + at, (~picked).to(tl.uint8), mask=inside)
        if index is not None:
            place = picked_before + tl.cumsum(picked.to(tl.int32), axis=0) - 1
            tl.store(index + t * k + place, at, mask=picked)
            picked_before += tl.sum(picked.to(tl.int32), axis=0)


def nearest_others(gram: Tensor, squares: Tensor, nearest: Tensor, inverse: Tensor) -> None:
    """Find the distance of every token to the nearest of all others of its frame.

    Args:
        gram: [T, N, N] float32, contiguous.
        squares: [T, N] float32, contiguous, the diagonal of ``gram``.
        nearest: [T, N] float32, contiguous, becomes the cosine distance; +inf where there is no other.
        inverse: [T, N] float32, contiguous, becomes 1 / length; 1 for a token of length 0.
    """
    num_frames, n, _ = gram.shape
    tile = tiles()
    row_blocks = cdiv(n, tile.rows)
    launch(
        nearest_kernel,
        num_frames * row_blocks,
        gram,
        squares,
        nearest,
        inverse,
        n,
        row_blocks,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )


def select(
    gram: Tensor | None,
    inverse: Tensor | None,
    nearest: Tensor,
    weight: Tensor | None,
    k: int,
    candidate: Tensor | None,
    index: Tensor | None,
) -> None:
    """Pick ``k`` tokens of every frame, straight from the inner products.

    Args:
        gram: [T, N, N] float32, contiguous; None: the tokens of highest weight.
        inverse: [T, N] float32, contiguous, of ``nearest_others``; None without ``gram``.
        nearest: [T, N] float32, contiguous, of ``nearest_others``, or anything without ``gram``; written.
        weight: [T, N] fp32, fp16 or bf16, any strides; None for 1.
        k: tokens to pick, at most N.
        candidate: [T, N] uint8, contiguous, becomes 1 for the tokens that were not picked; or None.
        index: [T, k] int64, contiguous, becomes the picked tokens, ascending; or None.
    """
    out = index if candidate is None else candidate
    assert out is not None
    strides = (0, 0) if weight is None else weight.stride()
    launch(
        select_kernel,
        len(out),
        candidate,
        index,
        gram,
        inverse,
        nearest,
        weight,
        nearest.shape[1],
        k,
        *strides,
        BLOCK=2 * tiles().tokens,
        num_warps=8,
    )
