# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""The forest that the links make: the root of every token, the list of a frame's roots (Sec. 3)."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, tiles


@triton.jit(do_not_specialize=["n", "slots", "blocks"])
def roots_kernel(root, candidate, linked, slot, slot_token, tree_size, n, slots, blocks, BLOCK: tl.constexpr):
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
        alone = tl.load(linked + own, mask=is_root, other=0) == 0
        tl.store(tree_size + t * slots + rank, alone.to(tl.int32), mask=is_root)


def roots(
    root: Tensor,
    candidate: Tensor | None = None,
    linked: Tensor | None = None,
    slot: Tensor | None = None,
    slot_token: Tensor | None = None,
    tree_size: Tensor | None = None,
) -> None:
    """Replace every token's parent by the root of its tree; list the roots of every frame.

    Args:
        root: [T, N] int64, contiguous, the flat index of the parent, or the token's own; becomes the root's.
        candidate: [T, N] uint8, contiguous; what is no candidate is no root. None, as all that follow, if
            the lists are not wanted.
        linked: [T, N] uint8, contiguous, not 0 where a link to the token stays.
        slot: [T, N] int32, contiguous, becomes the place of a root in its frame's list; -1 elsewhere.
        slot_token: [T, S] int32, contiguous, becomes the roots of every frame, ascending; S holds them all.
        tree_size: [T, S] int32, contiguous, becomes 1 for a tree of one token and 0 for others.
    """
    t, n = root.shape
    slots = 0 if slot_token is None else slot_token.shape[1]
    block = tiles().tokens
    blocks = cdiv(n, block)
    # No more threads than tokens: two threads with the same token could read different ancestors of it, and
    # disagree on when to stop.
    warps = max(1, min(4, block // 32))
    lists = (candidate, linked, slot, slot_token, tree_size)
    launch(roots_kernel, t * blocks, root, *lists, n, slots, blocks, BLOCK=block, num_warps=warps)
