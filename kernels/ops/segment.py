# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""Frame means, segments (DySeg, Sec. 1) and the relevance of tokens to their segment (Sec. 2, E)."""

import triton
import triton.language as tl
from torch import Tensor

from .device import finite_or
from .launch import cdiv, frame_block, launch, power_of_2

PART = 128  # channels that one program of frame_statistics reads; its sums are parts of a row's


@triton.jit(do_not_specialize=["num_frames", "n", "frames_per_program"])
def frame_statistics_kernel(
    x,
    frames,
    squares,
    transitions,
    num_frames,
    n,
    d,
    num_parts,
    frames_per_program,
    stride_t,
    stride_n,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(0) % num_parts
    first = tl.program_id(0) // num_parts * frames_per_program
    at_d = (part * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside_d = at_d < d
    previous = tl.zeros([BLOCK_D], tl.float32)
    # The frame before the first is read again, for the transition between them.
    for frame in range(tl.maximum(first - 1, 0), tl.minimum(first + frames_per_program, num_frames)):
        t = tl.full([], 0, tl.int64) + frame
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(0, n, BLOCK_N):
            at_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            at = x + t * stride_t + (at_n[:, None] * stride_n + at_d[None, :] * stride_d)
            tile = tl.load(at, mask=(at_n[:, None] < n) & inside_d[None, :], other=0.0).to(tl.float32)
            acc += tile
            if squares is not None:  # noqa: SIM102 -- known when compiled, unlike the next
                if frame >= first:
                    out = squares + (part.to(tl.int64) * num_frames + t) * n + at_n
                    tl.store(out, tl.sum(tile * tile, axis=1), mask=at_n < n)
        mean = tl.sum(acc, axis=0) / n
        if frame >= first:
            tl.store(frames + t * d + at_d, mean, mask=inside_d)
            if transitions is not None:
                out = transitions + part.to(tl.int64) * 2 * num_frames + t
                tl.store(out, tl.sum(mean * previous, axis=0))
                tl.store(out + num_frames, tl.sum(mean * mean, axis=0))
        previous = mean


def num_parts(d: int) -> int:
    """How many parts of PART channels the sums over D come in."""
    return cdiv(d, PART)


def frames_per_program(num_frames: int, parts: int) -> int:
    """So many that ``frame_statistics`` has 1024 programs: loads enough on their way, few frames read twice."""
    return max(1, min(16, num_frames * parts // 1024))


def frame_statistics(x: Tensor, frames: Tensor, squares: Tensor | None, transitions: Tensor | None) -> None:
    """Read every feature once: frame means, and what cosines of tokens and of frames need.

    Args:
        x: [T, N, D] fp32, fp16 or bf16, any strides.
        frames: [T, D] float32, contiguous, becomes the mean over N.
        squares: [P, T, N] float32, contiguous, becomes parts of the squared length of every token; or None.
        transitions: [P, 2, T] float32, contiguous, becomes parts of the inner product of a frame's mean with
            the previous one (0: of no use at frame 0) and with itself; or None.
    """
    t, n, d = x.shape
    parts = num_parts(d)
    at_a_time = frames_per_program(t, parts)
    launch(
        frame_statistics_kernel,
        cdiv(t, at_a_time) * parts,
        x,
        frames,
        squares,
        transitions,
        t,
        n,
        d,
        parts,
        at_a_time,
        *x.stride(),
        BLOCK_N=16,  # 32 spill on sm_120
        BLOCK_D=PART,
    )


@triton.jit
def _cut_segments(transitions, num_frames, num_parts, threshold, min_cuts, times, inside):
    """Running number of the segment of every frame."""
    product = tl.zeros(times.shape, tl.float32)
    square = tl.zeros(times.shape, tl.float32)
    square_before = tl.zeros(times.shape, tl.float32)
    later = inside & (times > 0)
    for _ in range(num_parts):
        product += tl.load(transitions + times, mask=later, other=0.0)
        square += tl.load(transitions + num_frames + times, mask=later, other=0.0)
        square_before += tl.load(transitions + num_frames + times - 1, mask=later, other=0.0)
        transitions += 2 * num_frames
    lengths = tl.sqrt_rn(square) * tl.sqrt_rn(square_before)
    similarity = finite_or(product / tl.where(lengths > 0, lengths, 1.0), float("-inf"))
    similarity = tl.where(square + square_before < float("inf"), similarity, float("-inf"))
    cut = later & (similarity < threshold)
    for _ in range(min_cuts - tl.sum(cut.to(tl.int32), axis=0)):  # none if there are enough already
        lowest = tl.argmin(tl.where(later & ~cut, similarity, float("inf")), axis=0)
        cut |= times == lowest
    return tl.cumsum(cut.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_frames", "min_cuts"])
def segment_kernel(
    frames,
    transitions,
    segment_id,
    events,
    num_frames,
    d,
    num_parts,
    threshold,
    min_cuts,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_T: tl.constexpr,
):
    # Every program finds all segments, as that is a handful of small reductions: no launch in between.
    times = tl.arange(0, BLOCK_T)
    inside = times < num_frames
    if transitions is None:
        ids = tl.load(segment_id + times, mask=inside, other=0).to(tl.int32)
    else:
        ids = _cut_segments(transitions, num_frames, num_parts, threshold, min_cuts, times, inside)
        if tl.program_id(0) == 0:
            tl.store(segment_id + times, ids, mask=inside)
    if events is not None:
        blocks = tl.cdiv(d, BLOCK_D)
        t = tl.program_id(0) // blocks
        at_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        mine = tl.sum(tl.where(times == t, ids, 0), axis=0)
        first = tl.min(tl.where(inside & (ids == mine), times, num_frames), axis=0)
        if t == first:
            length = tl.sum((inside & (ids == mine)).to(tl.int32), axis=0)
            acc = tl.zeros([TILE_T, BLOCK_D], tl.float32)
            for start in range(0, length, TILE_T):
                row = start + tl.arange(0, TILE_T)
                mask = (row[:, None] < length) & (at_d[None, :] < d)
                acc += tl.load(frames + (t + row).to(tl.int64)[:, None] * d + at_d[None, :], mask=mask, other=0.0)
            tl.store(events + mine.to(tl.int64) * d + at_d, tl.sum(acc, axis=0) / length, mask=at_d < d)


def segment(
    frames: Tensor,
    transitions: Tensor | None,
    segment_id: Tensor,
    events: Tensor | None,
    threshold: float = 0.0,
    min_segments: int = 1,
) -> None:
    """Cut a video into segments, and average the frames of each.

    Args:
        frames: [T, D] float32, contiguous: frame means.
        transitions: [P, 2, T] float32 of ``frame_statistics``; None: the segments are given.
        segment_id: [T] int64, contiguous, written unless given.
        events: [T, D] float32, contiguous, row s becomes the mean frame of segment s, rows beyond the
            number of segments are left as they are; or None.
        threshold, min_segments: as ``segment_frames`` takes them.
    """
    t, d = frames.shape
    block_d = 256
    launch(
        segment_kernel,
        1 if events is None else t * cdiv(d, block_d),
        frames,
        transitions,
        segment_id,
        events,
        t,
        d,
        num_parts(d) if transitions is None else len(transitions),
        float(threshold),
        min(min_segments, t) - 1,
        BLOCK_T=frame_block(t),
        BLOCK_D=block_d,
        TILE_T=4,
    )


@triton.jit(do_not_specialize=["n", "row_blocks", "stride_at"], do_not_specialize_on_alignment=["attention"])
def relevance_kernel(
    x,
    segment_id,
    events,
    attention,
    out,
    n,
    d,
    row_blocks,
    stride_t,
    stride_n,
    stride_d,
    stride_at,
    stride_an,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = (tl.program_id(0) // row_blocks).to(tl.int64)
    at_n = (tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    event = events + tl.load(segment_id + t) * d
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        at_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = (at_n[:, None] < n) & (at_d[None, :] < d)
        at = x + t * stride_t + (at_n[:, None] * stride_n + at_d[None, :] * stride_d)
        e = tl.load(event + at_d, mask=at_d < d, other=0.0)
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32) * e[None, :]
    relevance = tl.sum(acc, axis=1)
    relevance = tl.where(relevance < 0, 0.0, relevance)  # unlike maximum, keeps NaN
    if attention is not None:
        at = attention + t * stride_at + at_n * stride_an
        relevance *= tl.load(at, mask=at_n < n, other=0.0).to(tl.float32)
    tl.store(out + t * n + at_n, relevance, mask=at_n < n)


def relevance(x: Tensor, segment_id: Tensor, events: Tensor, attention: Tensor | None, out: Tensor) -> None:
    """Relevance of each token to its segment, times its received attention.

    Args:
        x: [T, N, D] fp32, fp16 or bf16, any strides.
        segment_id: [T] int64, contiguous.
        events: [T, D] float32, contiguous, of ``segment``.
        attention: [T, N] fp32, fp16 or bf16, any strides; None for 1.
        out: [T, N] float32, contiguous, written.
    """
    t, n, d = x.shape
    block_n = 16
    blocks = cdiv(n, block_n)
    strides = (0, 0) if attention is None else attention.stride()
    launch(
        relevance_kernel,
        t * blocks,
        x,
        segment_id,
        events,
        attention,
        out,
        n,
        d,
        blocks,
        *x.stride(),
        *strides,
        BLOCK_N=block_n,
        BLOCK_D=min(256, power_of_2(d)),
    )
