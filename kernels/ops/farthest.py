# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""Farthest first: the tokens of a frame in the order in which what was picked before explains them worst."""

import triton
import triton.language as tl
from torch import Tensor

from .device import first_of_largest, take_better
from .launch import launch, tiles

PICKED = tl.constexpr(-2.0)  # in the place of a distance: below all of them


@triton.jit(do_not_specialize=["n", "picks"])
def farthest_kernel(apart, left, residual, order, n, picks, BLOCK: tl.constexpr):
    # A frame. ``left`` is the state of the loop, in memory: it is read while the last pick's row is on its way.
    t = tl.program_id(0).to(tl.int64)
    frame = t * n
    pick = tl.full([], -1, tl.int32)
    for step in range(picks):
        known = tl.where(pick >= 0, n, 0)  # tokens whose distance to the last pick there is: none at first
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        most_at = tl.zeros([BLOCK], tl.int32) + n
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            own = tl.load(left + frame + at, mask=at < n, other=float("-inf"))
            to_pick = tl.load(apart + (frame + pick) * n + at, mask=at < known, other=float("inf"))
            own = tl.where(at == pick, PICKED, tl.minimum(own, to_pick))
            tl.store(left + frame + at, own, mask=at < n)
            most, most_at = take_better(own, at, most, most_at)
        highest, pick = first_of_largest(most, most_at, n)
        tl.store(residual + t * picks + step, highest)
        tl.store(order + t * picks + step, pick)
        tl.debug_barrier()  # what one thread stored another may load


def farthest(apart: Tensor, left: Tensor, residual: Tensor, order: Tensor) -> None:
    """Pick ``picks`` tokens of every frame, each time one of the largest residual.

    Args:
        apart: [T, N, N] float32, contiguous, distances.
        left: [T, N] float32, contiguous, the residuals that the tokens begin with; written.
        residual: [T, picks] float32, contiguous, becomes those at which they are picked.
        order: [T, picks] int64, contiguous, becomes which they are.
    """
    num_frames, n, _ = apart.shape
    launch(farthest_kernel, num_frames, apart, left, residual, order, n, order.shape[1],
           BLOCK=2 * tiles().tokens, num_warps=8)  # fmt: skip
