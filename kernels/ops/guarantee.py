# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""The root guarantee and what follows from it: links that stay, clusters and output rows (Sec. 3 and 4)."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import frame_block, launch, tiles

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


@triton.jit
def _place_of_tie(parent, similarity, first_token, num_tokens, weakest, ties, TILE: tl.constexpr):
    """Where in a segment the last of the first ``ties`` links of strength ``weakest`` is; -1 if ``ties`` is 0."""
    place = tl.full([], -1, tl.int32)
    before = tl.full([], 0, tl.int32)
    for start in range(0, num_tokens, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < num_tokens
        linked = tl.load(parent + first_token + at, mask=inside, other=-1) >= 0
        key = _ordered(tl.load(similarity + first_token + at, mask=inside, other=0.0))
        tied = (linked & (key == weakest)).to(tl.int32)
        which = before + tl.cumsum(tied, axis=0)
        place = tl.maximum(place, tl.max(tl.where((tied != 0) & (which <= ties), at, -1), axis=0))
        before += tl.sum(tied, axis=0)
    return place


@triton.jit(do_not_specialize=["num_frames", "n", "selected", "merged"])
def guarantee_kernel(
    parent,
    similarity,
    candidate,
    segment_id,
    root,
    linked,
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

        links = tl.zeros([TILE_T * BLOCK_N], tl.int32)
        candidates = tl.zeros([TILE_T * BLOCK_N], tl.int32)
        for start in range(0, length * n, TILE_T * BLOCK_N):
            at = start + tl.arange(0, TILE_T * BLOCK_N)
            inside = at < length * n
            links += (tl.load(parent + first * n + at, mask=inside, other=-1) >= 0).to(tl.int32)
            candidates += tl.load(candidate + first * n + at, mask=inside, other=0).to(tl.int32)
            tl.store(linked + first * n + at, tl.zeros([TILE_T * BLOCK_N], tl.uint8), mask=inside)
        tl.debug_barrier()  # all of ``linked`` is 0 before any is set
        num_links, num_candidates = tl.sum(links, axis=0), tl.sum(candidates, axis=0)

        keep = (num_candidates - quota).to(tl.int32)
        weakest = tl.full([], -(2**31), tl.int32)  # every strength is above
        last_tie = tl.full([], -1, tl.int32)
        if num_links > keep:
            weakest, ties = _weakest_kept(parent, similarity, first * n, length * n, keep, TILE=TILE_T * BLOCK_N)
            last_tie = _place_of_tie(parent, similarity, first * n, length * n, weakest, ties, TILE=TILE_T * BLOCK_N)
        num_roots = (num_candidates - tl.minimum(num_links, keep)).to(tl.int64)

        roots_before = tl.full([], 0, tl.int64)
        for start in range(0, length, TILE_T):
            t = first + start + tl.arange(0, TILE_T)
            in_segment = t < first + length
            is_root = tl.zeros([TILE_T, BLOCK_N], tl.int32)
            for begin in range(0, n, BLOCK_N):
                token = begin + tl.arange(0, BLOCK_N)[None, :]
                at = t[:, None] * n + token
                inside = in_segment[:, None] & (token < n)
                link = tl.load(parent + at, mask=inside, other=-1)
                key = _ordered(tl.load(similarity + at, mask=inside, other=0.0))
                kept = (key > weakest) | ((key == weakest) & (at - first * n <= last_tie))
                kept = (link >= 0) & kept
                tl.store(root + at, tl.where(kept, at - token - n + link, at), mask=inside)
                tl.store(linked + at - token - n + link, tl.full([TILE_T, BLOCK_N], 1, tl.uint8), mask=kept)
                free = tl.load(candidate + at, mask=inside, other=0) != 0
                is_root += (free & ~kept).to(tl.int32)
            roots = tl.sum(is_root, axis=1).to(tl.int64)
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
    linked: Tensor,
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
        linked: [T, N] uint8, contiguous, becomes 1 where a link to the token stays, 0 elsewhere.
        count: [T] int32, becomes the number of roots in each frame.
        clusters: [T] int32, becomes the number of clusters of each frame.
        row_base: [T + 1] int64, becomes the first output row of each frame; B at the end.
    """
    t, n = parent.shape
    tile = tiles().tokens
    launch(
        guarantee_kernel,
        t,
        parent,
        similarity,
        candidate,
        segment_id,
        root,
        linked,
        count,
        clusters,
        row_base,
        t,
        n,
        selected,
        merged,
        BLOCK_T=frame_block(t),
        BLOCK_N=tile // 4,
        TILE_T=8,
        num_warps=16,
    )
