# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""The tokens that stand for the video (Sec. 5), together with the tree means of the chunk that comes next."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, tiles
from .layout import Layout
from .means import ROWS_AT_A_TIME, channels_at_a_time, mean_programs, store_tree_means


@triton.jit
def _write_token(
    x,
    slot,
    count,
    slot_center,
    tree_size,
    mean,
    source_index,
    tokens,
    size,
    row,
    start,
    block,
    n,
    slots,
    d,
    stride_t,
    stride_n,
    stride_d,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    at_d = (block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    source = tl.load(source_index + row)
    t = source // n
    out = tokens + row * d + at_d
    if tl.load(slot + source) < 0:  # ADTS kept it as it is, to the bit
        at = x + t * stride_t + (source % n) * stride_n + at_d * stride_d
        tl.store(out, tl.load(at, mask=at_d < d), mask=at_d < d)
        if block == 0:
            tl.store(size + row, 1)
    else:
        wanted = tl.load(slot + source)
        joined = slot_center + t * slots
        num_roots = tl.load(count + t)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        members = tl.full([], 0, tl.int32)
        num_tokens = tl.full([], 0, tl.int32)
        for begin in range(0, num_roots, BLOCK_N):
            lane = begin + tl.arange(0, BLOCK_N)
            is_member = tl.load(joined + lane, mask=lane < num_roots, other=-1) == wanted
            members += tl.sum(is_member.to(tl.int32), axis=0)
            num_tokens += tl.sum(tl.load(tree_size + t * slots + lane, mask=is_member, other=0), axis=0)
            lowest = tl.min(tl.where(is_member, lane, num_roots), axis=0)
            highest = tl.max(tl.where(is_member, lane, -1), axis=0)
            for first in range(lowest, highest + 1, ROWS):
                at_s = (first + tl.arange(0, ROWS)).to(tl.int64)
                take = tl.load(joined + at_s, mask=at_s <= highest, other=-1) == wanted
                at = mean + ((t - start) * slots + at_s)[:, None] * d + at_d[None, :]
                acc += tl.load(at, mask=take[:, None] & (at_d[None, :] < d), other=0.0)
        token = tl.sum(acc, axis=0) / members
        tl.store(out, token.to(tokens.dtype.element_ty), mask=at_d < d)
        if block == 0:
            tl.store(size + row, num_tokens)


@triton.jit(do_not_specialize=["start", "stop", "token_programs", "assignment_programs", "num_frames", "n", "slots"])
def tokens_kernel(
    x,
    candidate,
    root,
    slot,
    slot_token,
    count,
    slot_center,
    tree_size,
    row_base,
    source_index,
    mean,
    next_mean,
    tokens,
    size,
    assignment,
    start,
    stop,
    token_programs,
    assignment_programs,
    num_frames,
    n,
    slots,
    d,
    stride_t,
    stride_n,
    stride_d,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Three kinds of programs: output tokens of frames [start, stop), the assignment of those frames, and
    # tree means of the frames from stop on. They neither read nor write what another kind writes.
    program = tl.program_id(0)
    blocks = tl.cdiv(d, BLOCK_D)
    if program < token_programs:
        row = tl.load(row_base + start) + program // blocks
        if row < tl.load(row_base + stop):
            _write_token(
                x,
                slot,
                count,
                slot_center,
                tree_size,
                mean,
                source_index,
                tokens,
                size,
                row,
                start,
                program % blocks,
                n,
                slots,
                d,
                stride_t,
                stride_n,
                stride_d,
                BLOCK_N=BLOCK_N,
                ROWS=ROWS,
                BLOCK_D=BLOCK_D,
            )
    elif program < token_programs + assignment_programs:
        of_frames = program - token_programs
        token_blocks = tl.cdiv(n, BLOCK_N)
        token = of_frames % token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        own = (start + of_frames // token_blocks).to(tl.int64) * n + token
        free = tl.load(candidate + own, mask=token < n, other=0) != 0
        above = tl.load(root + own, mask=free, other=0)
        frame = above // n
        center = tl.load(slot_center + frame * slots + tl.load(slot + above, mask=free, other=0), mask=free, other=-1)
        has_center = free & (center >= 0)
        representative = frame * n + tl.load(slot_token + frame * slots + center, mask=has_center, other=0)
        row = tl.load(assignment + representative, mask=has_center, other=-1)
        # A centre's own row is there already: other programs read it.
        tl.store(assignment + own, row, mask=free & (~has_center | (representative != own)))
    elif next_mean is not None:
        store_tree_means(
            x,
            root,
            slot_token,
            count,
            next_mean,
            tree_size,
            program - token_programs - assignment_programs,
            stop,
            slots,
            num_frames,
            n,
            d,
            stride_t,
            stride_n,
            stride_d,
            KNOWN=True,
            FOREST=True,
            BLOCK_N=BLOCK_N,
            ROWS=ROWS,
            BLOCK_D=BLOCK_D,
        )


def write_tokens(
    x: Tensor,
    layout: Layout,
    mean: Tensor,
    next_mean: Tensor | None,
    tokens: Tensor,
    size: Tensor,
    assignment: Tensor,
    start: int,
    stop: int,
) -> None:
    """Write the output of frames ``start`` to ``stop`` and the tree means of the frames after them.

    Args:
        x: [T, N, D] fp32, fp16 or bf16, any strides; all that follow are contiguous.
        layout: of the frames before ``stop``.
        mean: of ``tree_means``, for frames ``start`` to ``stop``.
        next_mean: [frames, S, D] float32, becomes the tree means of the frames from ``stop`` on; or None.
        tokens, size: [B, D] of the features' dtype and [B] int64, written at the rows of these frames.
        assignment: [T, N] int64, written at the candidates of these frames.
    """
    num_frames, n, d = x.shape
    slots = layout.slot_token.shape[1]
    block_d = channels_at_a_time(d)
    blocks = cdiv(d, block_d)
    token_programs = min(len(tokens), (stop - start) * n) * blocks
    block = tiles().tokens
    assignment_programs = (stop - start) * cdiv(n, block)
    next_frames = 0 if next_mean is None else len(next_mean)
    launch(
        tokens_kernel,
        token_programs + assignment_programs + mean_programs(next_frames, slots, d),
        x,
        layout.candidate,
        layout.root,
        layout.slot,
        layout.slot_token,
        layout.count,
        layout.slot_center,
        layout.tree_size,
        layout.row_base,
        layout.source_index,
        mean,
        next_mean,
        tokens,
        size,
        assignment,
        start,
        stop,
        token_programs,
        assignment_programs,
        num_frames,
        n,
        slots,
        d,
        *x.stride(),
        BLOCK_N=block,
        ROWS=ROWS_AT_A_TIME,
        BLOCK_D=block_d,
        max_registers=128,  # left alone, sm_120 spills
    )
