# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""Matching of neighbouring frames: similarity and its masked argmax in one pass (Sec. 3)."""

import triton
import triton.language as tl
from torch import Tensor

from .device import dot, finite_or, inverse_norm, is_finite, take_better
from .launch import cdiv, dot_precision, launch, power_of_2


@triton.jit
def _store_links(similarity, parent, candidate, at, inside, in_segment, best, best_index, threshold):
    linkable = in_segment & (tl.load(candidate + at, mask=inside, other=0) != 0) & is_finite(best)
    tl.store(similarity + at, tl.where(linkable, best, -1.0), mask=inside)
    tl.store(parent + at, tl.where(linkable & (best > threshold), best_index, -1), mask=inside)


@triton.jit(do_not_specialize=["n", "row_blocks", "stride_part"])
def match_kernel(
    x,
    squares,
    candidate,
    segment_id,
    similarity,
    parent,
    threshold,
    n,
    d,
    row_blocks,
    num_parts,
    stride_part,
    stride_t,
    stride_n,
    stride_d,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = (tl.program_id(0) // row_blocks).to(tl.int64)
    at_m = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_index = tl.zeros([BLOCK_M], tl.int32)
    in_segment = (t > 0) & (tl.load(segment_id + t) == tl.load(segment_id + tl.maximum(t - 1, 0)))
    if in_segment:
        at_d = tl.arange(0, BLOCK_D).to(tl.int64)
        row_m = tl.where(at_m < n, at_m, 0).to(tl.int64)  # clamped: the loads stay unpredicated
        inverse_m = inverse_norm(squares, t * n + at_m, at_m < n, num_parts, stride_part)
        for first in range(0, n, BLOCK_N):
            at_n = first + tl.arange(0, BLOCK_N)
            row_n = tl.where(at_n < n, at_n, 0).to(tl.int64)
            a_at = x + t * stride_t + (row_m[:, None] * stride_n + at_d[None, :] * stride_d)
            b_at = x + (t - 1) * stride_t + (row_n[None, :] * stride_n + at_d[:, None] * stride_d)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, d, BLOCK_D):
                if EVEN_D:
                    a, b = tl.load(a_at), tl.load(b_at)
                else:
                    inside = start + at_d < d
                    a = tl.load(a_at, mask=inside[None, :], other=0.0)
                    b = tl.load(b_at, mask=inside[:, None], other=0.0)
                acc = dot(a, b, acc, PRECISION)
                a_at += BLOCK_D * stride_d
                b_at += BLOCK_D * stride_d
            before = (t - 1) * n + at_n
            usable = tl.load(candidate + before, mask=at_n < n, other=0) != 0
            inverse_n = inverse_norm(squares, before, at_n < n, num_parts, stride_part)
            cosine = finite_or(acc * inverse_m[:, None] * inverse_n[None, :], float("-inf"))
            cosine = tl.where(usable[None, :], cosine, float("-inf"))
            tile_best, tile_index = tl.max(cosine, axis=1, return_indices=True)
            best, best_index = take_better(tile_best, first + tile_index, best, best_index)
    _store_links(similarity, parent, candidate, t * n + at_m, at_m < n, in_segment, best, best_index, threshold)


@triton.jit(do_not_specialize=["n", "row_blocks", "stride_part"])
def match_position_kernel(
    x,
    squares,
    candidate,
    segment_id,
    similarity,
    parent,
    threshold,
    n,
    d,
    row_blocks,
    num_parts,
    stride_part,
    stride_t,
    stride_n,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = (tl.program_id(0) // row_blocks).to(tl.int64)
    at_n = tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = at_n < n
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    in_segment = (t > 0) & (tl.load(segment_id + t) == tl.load(segment_id + tl.maximum(t - 1, 0)))
    if in_segment:
        now = t * n + at_n
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(0, d, BLOCK_D):
            at_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            inside = inside_n[:, None] & (at_d[None, :] < d)
            at = x + t * stride_t + (at_n.to(tl.int64)[:, None] * stride_n + at_d[None, :] * stride_d)
            a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(at - stride_t, mask=inside, other=0.0).to(tl.float32)
            acc += a * b
        inverse_now = inverse_norm(squares, now, inside_n, num_parts, stride_part)
        inverse_before = inverse_norm(squares, now - n, inside_n, num_parts, stride_part)
        usable = tl.load(candidate + now - n, mask=inside_n, other=0) != 0
        cosine = finite_or(tl.sum(acc, axis=1) * inverse_now * inverse_before, float("-inf"))
        best = tl.where(usable, cosine, float("-inf"))
    _store_links(similarity, parent, candidate, t * n + at_n, inside_n, in_segment, best, at_n, threshold)


def match(
    x: Tensor,
    squares: Tensor,
    candidate: Tensor,
    segment_id: Tensor,
    threshold: float,
    matching: str,
    similarity: Tensor,
    parent: Tensor,
) -> None:
    """Link every token to the most similar one of the previous frame; [T, N, N] is never written.

    Args:
        x: [T, N, D] fp32, fp16 or bf16, any strides.
        squares: [P, T, N] float32, contiguous, parts that sum to the squared length of every token.
        candidate: [T, N] uint8, contiguous.
        segment_id: [T] int64, contiguous.
        threshold, matching: as ``match_tokens`` takes them.
        similarity: [T, N] float32, contiguous, written.
        parent: [T, N] int64, contiguous, written.
    """
    t, n, d = x.shape
    parts = (len(squares), t * n)
    tensors = (x, squares, candidate, segment_id, similarity, parent)
    if matching == "position":
        block_n, block_d = 16, min(256, power_of_2(d))
        blocks = cdiv(n, block_n)
        launch(
            match_position_kernel,
            t * blocks,
            *tensors,
            threshold,
            n,
            d,
            blocks,
            *parts,
            *x.stride(),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
        return
    half = x.element_size() == 2
    block_m, block_n, block_d = (64, 128, 64) if half else (64, 64, 32)
    blocks = cdiv(n, block_m)
    launch(
        match_kernel,
        t * blocks,
        *tensors,
        threshold,
        n,
        d,
        blocks,
        *parts,
        *x.stride(),
        EVEN_D=d % block_d == 0,
        PRECISION=dot_precision(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=3,
    )
