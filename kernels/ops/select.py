# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""Greedy calibrated Max-Min Diversity: all picks of all frames in one launch (Sec. 2)."""

import triton
import triton.language as tl
from torch import Tensor

from .device import finite_or, inverse_norm
from .launch import launch, power_of_2

FLAT_DISTANCE = tl.constexpr(1e-5)  # cosine distances below are rounding, and count as 0
LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)  # of a non-finite score; a picked token ranks below it


@triton.jit
def _distance(gram, inverse_i, inverse_j):
    distance = 1 - gram * inverse_i * inverse_j
    return finite_or(tl.where(distance < FLAT_DISTANCE, 0.0, distance), float("inf"))


# candidate and weight: of a chunk of frames, which may begin anywhere
@triton.jit(do_not_specialize=["n", "k", "stride_t"], do_not_specialize_on_alignment=["candidate", "weight"])
def select_kernel(
    candidate,
    index,
    gram,
    weight,
    n,
    k,
    stride_t,
    stride_n,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < n
    w = tl.full([BLOCK], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + t * stride_t + lane.to(tl.int64) * stride_n, mask=inside, other=0.0).to(tl.float32)
    nearest = tl.full([BLOCK], 1.0, tl.float32)
    inverse = tl.full([BLOCK], 1.0, tl.float32)
    if gram is not None:
        frame = gram + t * n * n
        inverse = inverse_norm(frame, lane.to(tl.int64) * (n + 1), inside, 1, 0)
        nearest = tl.full([BLOCK], float("inf"), tl.float32)
        for start in range(0, n, ROWS):  # the first pick: distance to the nearest of all others
            row = start + tl.arange(0, ROWS)
            inverse_row = inverse_norm(frame, row.to(tl.int64) * (n + 1), row < n, 1, 0)
            other = (row[:, None] < n) & inside[None, :] & (row[:, None] != lane[None, :])
            product = tl.load(frame + row.to(tl.int64)[:, None] * n + lane[None, :], mask=other, other=0.0)
            distance = _distance(product, inverse_row[:, None], inverse[None, :])
            nearest = tl.minimum(nearest, tl.min(tl.where(other, distance, float("inf")), axis=0))
    picked = lane < 0
    for step in range(k):
        score = finite_or(w * nearest, LOWEST_SCORE)
        choice = tl.argmax(tl.where(inside & ~picked, score, float("-inf")), axis=0)
        picked |= lane == choice
        if gram is not None:
            product = tl.load(frame + choice.to(tl.int64) * n + lane, mask=inside, other=0.0)
            inverse_choice = tl.sum(tl.where(lane == choice, inverse, 0.0), axis=0)
            to_choice = _distance(product, inverse_choice, inverse)
            nearest = tl.where(step == 0, to_choice, tl.minimum(nearest, to_choice))
    if candidate is not None:
        tl.store(candidate + t * n + lane, (~picked).to(tl.uint8), mask=inside)
    if index is not None:
        place = tl.cumsum(picked.to(tl.int32), axis=0) - 1
        tl.store(index + t * k + place, lane, mask=picked)


def select(gram: Tensor | None, weight: Tensor | None, k: int, candidate: Tensor | None, index: Tensor | None) -> None:
    """Pick ``k`` tokens of every frame, straight from the inner products: their diagonal gives the lengths.

    Args:
        gram: [T, N, N] float32, contiguous; None: the tokens of highest weight.
        weight: [T, N] fp32, fp16 or bf16, any strides; None for 1.
        k: tokens to pick, at most N.
        candidate: [T, N] uint8, contiguous, becomes 1 for the tokens that were not picked; or None.
        index: [T, k] int64, contiguous, becomes the picked tokens, ascending; or None.
    """
    out = index if candidate is None else candidate
    source = gram if weight is None else weight
    assert out is not None
    assert source is not None or k == 0
    num_frames = len(out)
    n = source.shape[1] if source is not None else out.shape[1]
    block = power_of_2(n)
    strides = (0, 0) if weight is None else weight.stride()
    launch(
        select_kernel,
        num_frames,
        candidate,
        index,
        gram,
        weight,
        n,
        k,
        *strides,
        BLOCK=block,
        ROWS=max(1, min(16, 2048 // block)),
        num_warps=4 if block <= 1024 else 8,
        max_registers=128,  # left alone, sm_80 to sm_120 spill
    )
