# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""The mean of every tree (Sec. 3)."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, power_of_2, tiles

ROWS_AT_A_TIME = 8  # a program's tile of features that it sums
OTHERS_TOGETHER = tl.constexpr(2)  # trees of a program; more means fewer that find nothing to do, and longer ones


def channels_at_a_time(d: int) -> int:
    return min(512, power_of_2(d))


@triton.jit
def _tree_mean(
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
def _copy_alone(
    x,
    slot_token,
    count,
    mean,
    size,
    t,
    here,
    first,
    slots,
    n,
    d,
    stride_t,
    stride_n,
    stride_d,
    at_d,
    ROWS: tl.constexpr,
):
    """Of the trees from slot ``first`` on those of one token, whose mean is the token."""
    slot = first + tl.arange(0, ROWS)
    inside = slot < tl.load(count + t)
    alone = inside & (tl.load(size + t * slots + slot, mask=inside, other=0) == 1)
    token = tl.load(slot_token + t * slots + slot, mask=inside, other=0).to(tl.int64)
    mask = alone[:, None] & (at_d[None, :] < d)
    at = x + t * stride_t + (token[:, None] * stride_n + at_d.to(tl.int64)[None, :] * stride_d)
    row = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(mean + (here * slots + slot)[:, None] * d + at_d[None, :], row, mask=mask)


@triton.jit
def store_tree_means(
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
    KNOWN: tl.constexpr,
    FOREST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of channels of some trees that begin in a frame from ``start`` on.

    KNOWN: ``size`` is 1 for the trees of one token alone. The first programs of a frame copy those, ROWS of them at a
    time; then comes a program for every TOGETHER slots, which looks for others and leaves their ``size`` above 1.
    """
    TOGETHER: tl.constexpr = OTHERS_TOGETHER if KNOWN else 1
    blocks = tl.cdiv(d, BLOCK_D)
    groups = tl.cdiv(slots, ROWS) if KNOWN else 0
    units = groups + tl.cdiv(slots, TOGETHER)
    unit = program // blocks
    at_d = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    here = (unit // units).to(tl.int64)
    t = start + here
    place = unit % units
    if place < groups:
        _copy_alone(
            x, slot_token, count, mean, size, t, here, place * ROWS, slots, n, d, stride_t, stride_n, stride_d, at_d,
            ROWS=ROWS,
        )  # fmt: skip
    else:
        first = (place - groups) * TOGETHER
        num_trees = tl.load(count + t)
        lane = first + tl.arange(0, TOGETHER)
        others = lane < num_trees
        if KNOWN:
            others = tl.load(size + t * slots + lane, mask=others, other=1) != 1
        if tl.sum(others.to(tl.int32), axis=0) > 0:
            for slot in range(first, first + TOGETHER):
                at_slot = t * slots + slot
                other = slot < num_trees
                if KNOWN:
                    other = tl.load(size + at_slot, mask=other, other=1) != 1
                if other:
                    token = t * n + tl.load(slot_token + at_slot)
                    first_frame = token // n if FOREST else t * 0
                    total, members = _tree_mean(
                        x, label, token, first_frame, num_frames, n, d, stride_t, stride_n, stride_d, at_d,
                        FOREST=FOREST, BLOCK_N=BLOCK_N, ROWS=ROWS, BLOCK_D=BLOCK_D,
                    )  # fmt: skip
                    tl.store(mean + (here * slots + slot) * d + at_d, total, mask=at_d < d)
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
    KNOWN: tl.constexpr,
    FOREST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    store_tree_means(
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
        KNOWN=KNOWN,
        FOREST=FOREST,
        BLOCK_N=BLOCK_N,
        ROWS=ROWS,
        BLOCK_D=BLOCK_D,
    )


def mean_programs(frames: int, slots: int, d: int, known: bool = True) -> int:
    """How many programs ``store_tree_means`` needs."""
    units = cdiv(slots, ROWS_AT_A_TIME) + cdiv(slots, OTHERS_TOGETHER.value) if known else slots
    return frames * units * cdiv(d, channels_at_a_time(d))


def tree_means(
    x: Tensor,
    label: Tensor,
    slot_token: Tensor,
    count: Tensor,
    mean: Tensor,
    size: Tensor,
    start: int = 0,
    known: bool = True,
    forest: bool = True,
) -> None:
    """Average the members of the trees that begin in frames ``start`` to ``start + len(mean)``.

    Args:
        x: [T, N, D] fp32, fp16 or bf16, any strides.
        label: [T, N] int64, contiguous, the flat index of each token's root.
        slot_token: [L, S] int32, contiguous: roots of every frame; L = T, or 1 for a list of flat indices.
        count: [L] int32, how many of them there are.
        mean: [frames, S, D] float32, contiguous, written where there is a root.
        size: [L, S] int32, contiguous, becomes the number of members where there is a root.
        known: whether ``size`` is 1 for every tree of one token already, and something else for all others.
        forest: whether ``label`` came from links to the previous frame; otherwise all frames are searched.
    """
    num_frames, n, d = x.shape
    frames, slots, _ = mean.shape
    block_d = channels_at_a_time(d)
    launch(
        tree_mean_kernel,
        mean_programs(frames, slots, d, known),
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
        KNOWN=known,
        FOREST=forest,
        BLOCK_N=tiles().tokens,
        ROWS=ROWS_AT_A_TIME,
        BLOCK_D=block_d,
        max_registers=80,  # left alone, sm_90 to sm_120 stop at 56 and spill
    )
