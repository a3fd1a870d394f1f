# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""The root guarantee and what follows from it: links that stay, clusters and output rows (Sec. 3 and 4)."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import frame_block, launch, power_of_2

BYTE = tl.constexpr(256)
HALF = tl.constexpr(2**31)


@triton.jit
def _ordered(similarity):
    """Bits of a float as an int32 in the same order; -0 and 0 are equal."""
    bits = tl.where(similarity == 0, 0.0, similarity).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weakest_kept(parent, similarity, first_token, num_tokens, keep, TILE: tl.constexpr):
    """The ``keep`` strongest links of a segment: all above the returned strength, and so many equal to it.

    Radix selection: four passes, each of which settles a byte of the strength from the highest to the lowest.
    """
    prefix = tl.full([], 0, tl.int64)
    byte = tl.arange(0, BYTE)
    for digit in range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros([BYTE], tl.int32)
        for start in range(0, num_tokens, TILE):
            at = start + tl.arange(0, TILE)
            inside = at < num_tokens
            linked = tl.load(parent + first_token + at, mask=inside, other=-1) >= 0
            key = _ordered(tl.load(similarity + first_token + at, mask=inside, other=0.0)).to(tl.int64) + HALF
            linked = linked & ((key >> (shift + 8)) == prefix)
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), BYTE, mask=linked)
        above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)
        here = (above <= keep) & (keep < above + histogram)  # exactly one byte
        prefix = prefix * 256 + tl.sum(tl.where(here, byte, 0), axis=0)
        keep -= tl.sum(tl.where(here, above, 0), axis=0)
    return (prefix - HALF).to(tl.int32), keep


@triton.jit(do_not_specialize=["num_frames", "n", "selected", "merged"])
def guarantee_kernel(
    parent,
    similarity,
    candidate,
    segment_id,
    root,
    count,
    clusters,
    row_base,
    num_frames,
    n,
    selected,
    merged,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_T: tl.constexpr,
):
    # A program per possible segment; those beyond the last have nothing to do.
    times = tl.arange(0, BLOCK_T)
    ids = tl.load(segment_id + times, mask=times < num_frames, other=-1)
    length = tl.sum((ids == tl.program_id(0)).to(tl.int32), axis=0)
    if length > 0:
        first = tl.sum((ids < tl.program_id(0)).to(tl.int32), axis=0) - tl.sum((ids < 0).to(tl.int32), axis=0)
        first = first.to(tl.int64)
        quota_before = first * merged // num_frames
        quota = (first + length) * merged // num_frames - quota_before
        lane = tl.arange(0, BLOCK_N)

        links = tl.full([], 0, tl.int32)
        candidates = tl.full([], 0, tl.int32)
        for start in range(0, length * n, TILE_T * BLOCK_N):
            at = start + tl.arange(0, TILE_T * BLOCK_N)
            inside = at < length * n
            links += tl.sum((tl.load(parent + first * n + at, mask=inside, other=-1) >= 0).to(tl.int32), axis=0)
            candidates += tl.sum(tl.load(candidate + first * n + at, mask=inside, other=0).to(tl.int32), axis=0)

        keep = (candidates - quota).to(tl.int32)
        weakest = tl.full([], -(2**31), tl.int32)  # every strength is above
        ties = tl.full([], 0, tl.int32)
        if links > keep:
            weakest, ties = _weakest_kept(parent, similarity, first * n, length * n, keep, TILE=TILE_T * BLOCK_N)
        num_roots = (candidates - tl.minimum(links, keep)).to(tl.int64)

        roots_before = tl.full([], 0, tl.int64)
        ties_before = tl.full([], 0, tl.int32)
        for start in range(0, length, TILE_T):
            t = first + start + tl.arange(0, TILE_T)
            in_segment = t < first + length
            at = t[:, None] * n + lane[None, :]
            inside = in_segment[:, None] & (lane[None, :] < n)
            link = tl.load(parent + at, mask=inside, other=-1)
            key = _ordered(tl.load(similarity + at, mask=inside, other=0.0))
            tied = (link >= 0) & (key == weakest)
            in_row = tl.sum(tied.to(tl.int32), axis=1)
            rank = ties_before + (tl.cumsum(in_row, axis=0) - in_row)[:, None]
            rank += tl.cumsum(tied.to(tl.int32), axis=1) - 1
            ties_before += tl.sum(in_row, axis=0)
            kept = (link >= 0) & ((key > weakest) | (tied & (rank < ties)))
            tl.store(root + at, tl.where(kept, at - lane[None, :] - n + link, at), mask=inside)

            free = tl.load(candidate + at, mask=inside, other=0) != 0
            roots = tl.sum((free & ~kept).to(tl.int64), axis=1)
            upto = roots_before + tl.cumsum(roots, axis=0)
            shares_before = quota * (upto - roots) // num_roots
            tl.store(count + t, roots.to(tl.int32), mask=in_segment)
            tl.store(clusters + t, (quota * upto // num_roots - shares_before).to(tl.int32), mask=in_segment)
            tl.store(row_base + t, t * selected + quota_before + shares_before, mask=in_segment)
            roots_before += tl.sum(roots, axis=0)
        if first + length == num_frames:
            tl.store(row_base + num_frames, (first + length) * selected + merged)


def guarantee(
    parent: Tensor,
    similarity: Tensor,
    candidate: Tensor,
    segment_id: Tensor,
    selected: int,
    merged: int,
    root: Tensor,
    count: Tensor,
    clusters: Tensor,
    row_base: Tensor,
) -> None:
    """Drop the weakest links of segments that would be left with fewer roots than tokens to keep.

    Args:
        parent: [T, N] int64, contiguous, in the previous frame or -1.
        similarity: [T, N] float32, contiguous.
        candidate: [T, N] uint8, contiguous.
        segment_id: [T] int64, contiguous.
        selected, merged: tokens that ADTS keeps of each frame [K], and TSTM of the video [M].
        root: [T, N] int64, contiguous, becomes the flat index of the parent if that link stays, or the
            token's own.
        count: [T] int32, becomes the number of roots in each frame.
        clusters: [T] int32, becomes the number of clusters of each frame.
        row_base: [T + 1] int64, becomes the first output row of each frame; B at the end.
    """
    t, n = parent.shape
    block_n = power_of_2(n)
    launch(
        guarantee_kernel,
        t,
        parent,
        similarity,
        candidate,
        segment_id,
        root,
        count,
        clusters,
        row_base,
        t,
        n,
        selected,
        merged,
        BLOCK_T=frame_block(t),
        BLOCK_N=block_n,
        TILE_T=max(1, 512 // block_n),
        num_warps=8,
        max_registers=128,  # left alone, sm_80 and sm_120 spill
    )
