# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""The forest that the links make: roots, and the mean of every tree (Sec. 3)."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, power_of_2, tiles

ROWS_AT_A_TIME = 8  # a program's tile of features that it sums


def channels_at_a_time(d: int) -> int:
    return min(512, power_of_2(d))


@triton.jit(do_not_specialize=["n", "slots", "blocks"])
def roots_kernel(root, candidate, slot, slot_token, n, slots, blocks, BLOCK: tl.constexpr):
    # A block of a frame's tokens. Pointer jumping in place, without a barrier between programs. Reading an entry while
    # another program updates it is harmless: an entry only ever moves from one ancestor to an earlier one of the same
    # tree, so whatever is read lies on the way, and only a root points to itself. Early frames start first.
    t = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    token = first + tl.arange(0, BLOCK)
    inside = token < n
    own = t * n + token
    at = tl.load(root + own, mask=inside, other=0)
    moving = tl.sum(inside.to(tl.int32), axis=0)
    while moving > 0:
        above = tl.load(root + at, mask=inside, other=0, volatile=True)
        moving = tl.sum((inside & (above != at)).to(tl.int32), axis=0)
        at = above
        tl.store(root + own, at, mask=inside)
    if slot is not None:
        before = tl.zeros(
            [BLOCK], tl.int32
        )  # roots of the blocks before this one: they point to themselves, jump or not
        for start in range(0, first, BLOCK):
            other = t * n + start + tl.arange(0, BLOCK)
            before += ((tl.load(root + other) == other) & (tl.load(candidate + other) != 0)).to(tl.int32)
        free = tl.load(candidate + own, mask=inside, other=0) != 0
        is_root = free & (at == own)
        rank = tl.sum(before, axis=0) + tl.cumsum(is_root.to(tl.int32), axis=0) - 1
        tl.store(slot + own, tl.where(is_root, rank, -1), mask=inside)
        tl.store(slot_token + t * slots + rank, token, mask=is_root)


def roots(
    root: Tensor, candidate: Tensor | None = None, slot: Tensor | None = None, slot_token: Tensor | None = None
) -> None:
    """Replace every token's parent by the root of its tree; list the roots of every frame.

    Args:
        root: [T, N] int64, contiguous, the flat index of the parent, or the token's own; becomes the root's.
        candidate: [T, N] uint8, contiguous; what is no candidate is no root. None, as all that follow, if
            the lists are not wanted.
        slot: [T, N] int32, contiguous, becomes the place of a root in its frame's list; -1 elsewhere.
        slot_token: [T, S] int32, contiguous, becomes the roots of every frame, ascending; S holds them all.
    """
    t, n = root.shape
    slots = 0 if slot_token is None else slot_token.shape[1]
    block = tiles().tokens
    blocks = cdiv(n, block)
    # No more threads than tokens: two threads with the same token could read different ancestors of it, and
    # disagree on when to stop.
    warps = max(1, min(4, block // 32))
    launch(roots_kernel, t * blocks, root, candidate, slot, slot_token, n, slots, blocks, BLOCK=block, num_warps=warps)


@triton.jit
def tree_mean(
    x,
    label,
    wanted,
    frame,
    num_frames,
    n,
    d,
    stride_t,
    stride_n,
    stride_d,
    at_d,
    FOREST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of the rows whose label is ``wanted``, from ``frame`` on, and their number.

    Members are added in ascending order, by one program: no sort, no atomics, the same bits every time.
    FOREST: members lie in consecutive frames, as a parent is always in the previous one; the first frame
    without a member is the end.
    """
    at_d = at_d.to(tl.int64)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    size = tl.full([], 0, tl.int32)
    first = tl.full([], 0, tl.int32)
    in_frame = tl.full([], 1, tl.int32)
    while (frame < num_frames) & (in_frame > 0):
        token = first + tl.arange(0, BLOCK_N)
        is_member = tl.load(label + frame * n + token, mask=token < n, other=-1) == wanted
        members = tl.sum(is_member.to(tl.int32), axis=0)
        lowest = tl.min(tl.where(is_member, token, n), axis=0)
        highest = tl.max(tl.where(is_member, token, -1), axis=0)
        for start in range(lowest, highest + 1, ROWS):  # no row if there is no member
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            take = tl.load(label + frame * n + row, mask=row <= highest, other=-1) == wanted
            mask = take[:, None] & (at_d[None, :] < d)
            at = x + frame * stride_t + (row[:, None] * stride_n + at_d[None, :] * stride_d)
            acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        size += members
        # One more than the members so far, lest a frame end at a block without one.
        in_frame = tl.where(first == 0, 1, in_frame) + members
        first += BLOCK_N
        if first >= n:
            first = tl.full([], 0, tl.int32)
            frame += 1
            if FOREST:
                in_frame -= 1
    return tl.sum(acc, axis=0) / size, size


@triton.jit
def store_tree_mean(
    x,
    label,
    slot_token,
    count,
    mean,
    size,
    program,
    start,
    slots,
    num_frames,
    n,
    d,
    stride_t,
    stride_n,
    stride_d,
    FOREST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of the channels of one slot of the frames from ``start`` on, if a tree begins there."""
    blocks = tl.cdiv(d, BLOCK_D)
    here = (program // blocks).to(tl.int64)
    t = start + here // slots
    if here % slots < tl.load(count + t):
        at_slot = t * slots + here % slots
        at_d = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        token = t * n + tl.load(slot_token + at_slot)
        total, members = tree_mean(
            x,
            label,
            token,
            token // n if FOREST else t * 0,
            num_frames,
            n,
            d,
            stride_t,
            stride_n,
            stride_d,
            at_d,
            FOREST=FOREST,
            BLOCK_N=BLOCK_N,
            ROWS=ROWS,
            BLOCK_D=BLOCK_D,
        )
        tl.store(mean + here * d + at_d, total, mask=at_d < d)
        if program % blocks == 0:
            tl.store(size + at_slot, members)


@triton.jit(do_not_specialize=["start", "slots", "num_frames", "n"])
def tree_mean_kernel(
    x,
    label,
    slot_token,
    count,
    mean,
    size,
    start,
    slots,
    num_frames,
    n,
    d,
    stride_t,
    stride_n,
    stride_d,
    FOREST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    store_tree_mean(
        x,
        label,
        slot_token,
        count,
        mean,
        size,
        tl.program_id(0),
        start,
        slots,
        num_frames,
        n,
        d,
        stride_t,
        stride_n,
        stride_d,
        FOREST=FOREST,
        BLOCK_N=BLOCK_N,
        ROWS=ROWS,
        BLOCK_D=BLOCK_D,
    )


def tree_means(
    x: Tensor,
    label: Tensor,
    slot_token: Tensor,
    count: Tensor,
    mean: Tensor,
    size: Tensor,
    start: int = 0,
    forest: bool = True,
) -> None:
    """Average the members of the trees that begin in frames ``start`` to ``start + len(mean)``.

    Args:
        x: [T, N, D] fp32, fp16 or bf16, any strides.
        label: [T, N] int64, contiguous, the flat index of each token's root.
        slot_token: [L, S] int32, contiguous: roots of every frame; L = T, or 1 for a list of flat indices.
        count: [L] int32, how many of them there are.
        mean: [frames, S, D] float32, contiguous, written where there is a root.
        size: [L, S] int32, contiguous, number of members, written where there is a root.
        forest: whether ``label`` came from links to the previous frame; otherwise all frames are searched.
    """
    num_frames, n, d = x.shape
    frames, slots, _ = mean.shape
    block_d = channels_at_a_time(d)
    launch(
        tree_mean_kernel,
        frames * slots * cdiv(d, block_d),
        x,
        label,
        slot_token,
        count,
        mean,
        size,
        start,
        slots,
        num_frames,
        n,
        d,
        *x.stride(),
        FOREST=forest,
        BLOCK_N=tiles().tokens,
        ROWS=ROWS_AT_A_TIME,
        BLOCK_D=block_d,
    )
