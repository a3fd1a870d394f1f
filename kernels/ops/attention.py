# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""Received attention: column means of softmax(q k^T / sqrt(d)), without [H, N, N]."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .device import dot
from .launch import cdiv, dot_precision, launch, power_of_2

MOST_CHANNELS = 256  # of a head; vision encoders have 64 to 128
LOG2_E = math.log2(math.e)


@triton.jit
def _channels(rows_at, stride_d, inside, d, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH channels from FIRST on of the rows at ``rows_at`` [rows, 1]."""
    at_d = FIRST + tl.arange(0, WIDTH).to(tl.int64)[None, :]
    return tl.load(rows_at + at_d * stride_d, mask=inside[:, None] & (at_d < d), other=0.0)


@triton.jit
def _logits(a, a_rest, b_at, stride_d, inside, d, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr):
    """Products of the rows ``a`` with those at ``b_at`` [1, rows]; ``a_rest`` has the channels from BLOCK_D on."""
    acc = tl.zeros([a.shape[0], inside.shape[0]], tl.float32)
    at_d = tl.arange(0, BLOCK_D).to(tl.int64)[:, None]
    b = tl.load(b_at + at_d * stride_d, mask=inside[None, :] & (at_d < d), other=0.0)
    acc = dot(a, b, acc, PRECISION)
    if REST > 0:
        at_d = BLOCK_D + tl.arange(0, REST).to(tl.int64)[:, None]
        b = tl.load(b_at + at_d * stride_d, mask=inside[None, :] & (at_d < d), other=0.0)
        acc = dot(a_rest, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["n", "row_blocks", "stride_qt", "stride_kt"])
def log_sum_exp_kernel(
    query,
    key,
    logs,
    scale,
    heads,
    n,
    d,
    row_blocks,
    stride_qt,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kn,
    stride_kd,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
):
    d, stride_qt, stride_qh, stride_qn = d * UNIT, stride_qt * UNIT, stride_qh * UNIT, stride_qn * UNIT
    stride_kt, stride_kh, stride_kn = stride_kt * UNIT, stride_kh * UNIT, stride_kn * UNIT
    of_head = (tl.program_id(0) // row_blocks).to(tl.int64)
    t, head = of_head // heads, of_head % heads
    at_m = (tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    q_at = query + t * stride_qt + head * stride_qh + at_m[:, None] * stride_qn
    q = _channels(q_at, stride_qd, at_m < n, d, FIRST=0, WIDTH=BLOCK_D)
    q_rest = _channels(q_at, stride_qd, at_m < n, d, FIRST=BLOCK_D, WIDTH=REST) if REST > 0 else q
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, n, BLOCK_N):
        at_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        k_at = key + t * stride_kt + head * stride_kh + at_n[None, :] * stride_kn
        logits = _logits(q, q_rest, k_at, stride_kd, at_n < n, d, PRECISION, BLOCK_D, REST) * scale
        logits = tl.where(at_n[None, :] < n, logits, float("-inf"))
        now = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp2(largest - now) + tl.sum(tl.exp2(logits - now[:, None]), axis=1)
        largest = now
    tl.store(logs + of_head * n + at_m, largest + tl.log2(total), mask=at_m < n)


@triton.jit(do_not_specialize=["n", "column_blocks", "stride_qt", "stride_kt"])
def column_sum_kernel(
    query,
    key,
    logs,
    sums,
    scale,
    heads,
    n,
    d,
    column_blocks,
    stride_qt,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kn,
    stride_kd,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
):
    # One program sums a block of one head's columns over all queries: no atomics, a fixed order.
    d, stride_qt, stride_qh, stride_qn = d * UNIT, stride_qt * UNIT, stride_qh * UNIT, stride_qn * UNIT
    stride_kt, stride_kh, stride_kn = stride_kt * UNIT, stride_kh * UNIT, stride_kn * UNIT
    of_head = (tl.program_id(0) // column_blocks).to(tl.int64)
    t, head = of_head // heads, of_head % heads
    at_n = (tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k_at = key + t * stride_kt + head * stride_kh + at_n[:, None] * stride_kn
    k = _channels(k_at, stride_kd, at_n < n, d, FIRST=0, WIDTH=BLOCK_D)
    k_rest = _channels(k_at, stride_kd, at_n < n, d, FIRST=BLOCK_D, WIDTH=REST) if REST > 0 else k
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_M):
        at_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        q_at = query + t * stride_qt + head * stride_qh + at_m[None, :] * stride_qn
        logits = _logits(k, k_rest, q_at, stride_qd, at_m < n, d, PRECISION, BLOCK_D, REST) * scale
        log = tl.load(logs + of_head * n + at_m, mask=at_m < n, other=float("inf"))
        acc += tl.sum(tl.exp2(logits - log[None, :]), axis=1)
    tl.store(sums + of_head * n + at_n, acc, mask=at_n < n)


@triton.jit(do_not_specialize=["n", "blocks"])
def head_mean_kernel(sums, received, heads, n, blocks, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    # The heads are added in a fixed order: the same bits every time.
    t = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    inside = (head[:, None] < heads) & (at[None, :] < n)
    of_heads = tl.load(sums + (t * heads + head)[:, None] * n + at[None, :], mask=inside, other=0.0)
    tl.store(received + t * n + at, tl.sum(of_heads, axis=0) / (heads * n), mask=at < n)


def row_unit(*tensors: Tensor) -> int:
    """What a compiler may know to divide the length and every stride of rows that lie in one piece: 8, or 1.

    16 bytes of fp16 and bf16 are then loaded at once. Triton itself looks for 16, which heads of 72 channels are not.
    """
    whole = all(
        x.stride(-1) == 1 and all(size % 8 == 0 and size < 2**31 for size in (x.shape[-1], *x.stride()[:-1]))
        for x in tensors
    )
    return 8 if whole else 1


def channel_blocks(d: int) -> tuple[int, int]:
    """Two powers of 2 that hold ``d`` channels, the second may be 0: 72 and 80 are 64 and 16, not 128."""
    whole = power_of_2(d, least=16)
    rest = power_of_2(d - whole // 2, least=16)
    return (whole // 2, rest) if whole > 32 and rest < whole // 2 else (whole, 0)


def attention(query: Tensor, key: Tensor, logs: Tensor, sums: Tensor, received: Tensor) -> None:
    """Average the attention that each token receives, over heads and queries, in two passes over the logits.

    Args:
        query, key: [T, H, N, d] fp32, fp16 or bf16, any strides, d up to MOST_CHANNELS.
        logs: [T, H, N] float32, contiguous, becomes the row-wise log2 of the sum of exponentials.
        sums: [T, H, N] float32, contiguous, becomes what each token receives in each head.
        received: [T, N] float32, contiguous, written.

    Raises:
        ValueError: d is above MOST_CHANNELS.
    """
    t, heads, n, d = query.shape
    if d > MOST_CHANNELS:
        raise ValueError(f"a head must have at most {MOST_CHANNELS} channels, got {d}")
    half = query.element_size() == 2
    unit = row_unit(query, key)
    sizes = (LOG2_E / math.sqrt(d), heads, n, d // unit)
    strides: list[int] = []
    for x in (query, key):
        strides += [*(stride // unit for stride in x.stride()[:-1]), x.stride(-1)]
    block_d, rest = channel_blocks(d)
    # 128 rows of its own a program, so that what all programs read of the others is half; in fp32 that spills
    rows, row_tile = (128, 64) if half else (16, 64)
    columns, column_tile = (128, 64) if half else (64, 16)
    row_blocks, column_blocks = cdiv(n, rows), cdiv(n, columns)
    options: dict[str, Any] = {"UNIT": unit, "PRECISION": dot_precision(), "BLOCK_D": block_d, "REST": rest}
    launch(
        log_sum_exp_kernel,
        t * heads * row_blocks,
        query,
        key,
        logs,
        *sizes,
        row_blocks,
        *strides,
        BLOCK_M=rows,
        BLOCK_N=row_tile,
        **options,
        num_warps=8,
    )
    launch(
        column_sum_kernel,
        t * heads * column_blocks,
        query,
        key,
        logs,
        sums,
        *sizes,
        column_blocks,
        *strides,
        BLOCK_M=column_tile,
        BLOCK_N=columns,
        **options,
        num_warps=8,
    )
    block = 128
    blocks = cdiv(n, block)
    every = power_of_2(heads)
    launch(head_mean_kernel, t * blocks, sums, received, heads, n, blocks, HEADS=every, BLOCK=block)
