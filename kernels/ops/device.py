# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""Functions that several kernels share."""

import triton
import triton.language as tl

from .launch import INTERPRETED


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # false for NaN too


@triton.jit
def finite_or(x, value):
    return tl.where(is_finite(x), x, value)


@triton.jit
def take_better(value, at, best, best_at):
    """The larger of ``value`` and ``best`` in every lane, and where it was."""
    better = value > best  # not >=: ties go to what came earlier
    return tl.where(better, value, best), tl.where(better, at, best_at)


@triton.jit
def first_of_largest(best, best_at, n):
    """The largest of all lanes and the lowest place that has it, of those below ``n``."""
    highest = tl.max(best, axis=0)
    return highest, tl.min(tl.where(best == highest, best_at, n), axis=0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32. The interpreter would multiply the bits of bf16 as integers."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def inverse_norm(squares, offsets, mask, num_parts, stride_part):
    """1 / length of rows whose squared length comes in parts; 1 for a zero row, so that its cosine is 0.

    A row that is not finite may get any value: its inner products are not finite, and stay so.
    """
    total = tl.zeros(offsets.shape, tl.float32)
    for _ in range(num_parts):
        total += tl.load(squares + offsets, mask=mask, other=0.0)
        squares += stride_part
    return tl.where(total > 0, 1 / tl.sqrt_rn(total), 1.0)
