# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""Inner products of the tokens of a frame, with each other."""

import triton
import triton.language as tl
from torch import Tensor

from .device import dot, finite_or
from .launch import cdiv, dot_precision, launch


@triton.jit(do_not_specialize=["n", "tiles"], do_not_specialize_on_alignment=["count"])
def gram_kernel(
    x,
    center,
    count,
    gram,
    squares,
    n,
    d,
    tiles,
    stride_t,
    stride_n,
    stride_d,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Tile (i, j) with j <= i of the frame's matrix; its mirror image is stored with it.
    t = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)  # if the root was rounded down
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    j = tile - i * (i + 1) // 2
    rows = n
    if count is not None:
        rows = tl.load(count + t)
    if i * BLOCK < rows:
        at_i = i * BLOCK + tl.arange(0, BLOCK)
        at_j = j * BLOCK + tl.arange(0, BLOCK)
        at_d = tl.arange(0, BLOCK_D).to(tl.int64)
        # Rows beyond the last are clamped rather than masked: the loads of the loop stay unpredicated.
        row_i = tl.where(at_i < rows, at_i, 0).to(tl.int64)
        row_j = tl.where(at_j < rows, at_j, 0).to(tl.int64)
        frame = x + t * stride_t
        a_at = frame + row_i[:, None] * stride_n + at_d[None, :] * stride_d
        b_at = frame + row_j[None, :] * stride_n + at_d[:, None] * stride_d
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, d, BLOCK_D):
            if EVEN_D:
                a, b = tl.load(a_at), tl.load(b_at)
            else:
                inside = start + at_d < d
                a = tl.load(a_at, mask=inside[None, :], other=0.0)
                b = tl.load(b_at, mask=inside[:, None], other=0.0)
            if center is not None:
                origin = finite_or(tl.load(center + t * d + start + at_d, mask=start + at_d < d, other=0.0), 0.0)
                a -= origin[None, :]
                b -= origin[:, None]
            acc = dot(a, b, acc, PRECISION)
            a_at += BLOCK_D * stride_d
            b_at += BLOCK_D * stride_d
        out = gram + t * n * n
        inside = (at_i[:, None] < rows) & (at_j[None, :] < rows)
        tl.store(out + at_i.to(tl.int64)[:, None] * n + at_j[None, :], acc, mask=inside)
        if i == j:
            own = tl.sum(tl.where(at_i[:, None] == at_j[None, :], acc, 0.0), axis=1)
            tl.store(squares + t * n + at_i, own, mask=at_i < rows)
        else:
            mirrored = (at_j[:, None] < rows) & (at_i[None, :] < rows)
            tl.store(out + at_j.to(tl.int64)[:, None] * n + at_i[None, :], tl.trans(acc), mask=mirrored)


def gram(x: Tensor, out: Tensor, squares: Tensor, center: Tensor | None = None, count: Tensor | None = None) -> None:
    """Write the inner products of the rows of every frame.

    Args:
        x: [T, N, D] fp32, fp16 or bf16, any strides.
        out: [T, N, N] float32, contiguous; what lies beyond ``count`` is left as it is.
        squares: [T, N] float32, contiguous, becomes the diagonal. Lengths that cosines are made of come from there and
            from nowhere else: then two equal rows are at distance 0, as each is rounded as its product is.
        center: [T, D] float32, contiguous, what is subtracted from the rows first (fp32 rows only);
            channels where it is not finite subtract 0.
        count: [T] int32, how many rows of each frame count; None for all.
    """
    t, n, d = x.shape
    block, block_d = 64, 32  # 64 channels at a time spill on sm_120
    across = cdiv(n, block)
    tiles = across * (across + 1) // 2
    launch(
        gram_kernel,
        t * tiles,
        x,
        center,
        count,
        out,
        squares,
        n,
        d,
        tiles,
        *x.stride(),
        EVEN_D=d % block_d == 0,
        PRECISION=dot_precision(),
        BLOCK=block,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=4 if x.element_size() == 2 else 3,
        max_registers=136 if x.element_size() == 2 else 255,  # left alone, sm_80 stops at 128 and spills
    )
