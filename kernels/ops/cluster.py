# SPDX-License-Identifier: MIT
# mypy: allow-untyped-defs
"""DPC-kNN of every frame, over a number of tokens that only the device knows (Sec. 4).

Four launches, each of which needs all of the one before: densities, scores, ranks (``peaks``), nearest centres.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, tiles
from .layout import Layout
from .peaks import block, density_kernel, distances, rank_kernel, score_kernel


@dataclass(frozen=True)
class Scores:
    """What the launches tell one another of S tokens of every frame, all contiguous; written where a token is.

    Attributes:
        sparsity: [frames, S] float32, the mean of the smallest squared distances (m).
        farthest: [frames, S] float32, the largest squared distance.
        score: [frames, S] float32, log(delta) - m.
        rank: [frames, S] int32, tokens of the frame with a better score.
    """

    sparsity: Tensor
    farthest: Tensor
    score: Tensor
    rank: Tensor

    @classmethod
    def empty(cls, frames: int, slots: int, device: torch.device) -> "Scores":
        kinds = (torch.float32, torch.float32, torch.float32, torch.int32)
        sparsity, farthest, score, rank = (torch.empty((frames, slots), dtype=kind, device=device) for kind in kinds)
        return cls(sparsity, farthest, score, rank)


@triton.jit
def _nearest_center(gram, squares, rank, slots, count, clusters, rows, channels, COLUMNS: tl.constexpr):
    """The centre that is nearest to each row; ties to the lowest token, however far; a centre is its own."""
    nobody = slots
    best = tl.full([rows.shape[0], COLUMNS], float("inf"), tl.float32)
    center = tl.zeros([rows.shape[0], COLUMNS], tl.int32) + nobody
    for first in range(0, count, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        squared, _ = distances(gram, squares, slots, count, rows, columns, channels)
        usable = tl.load(rank + columns, mask=columns < count, other=slots) < clusters
        closer = usable[None, :] & ((squared < best) | (center == nobody))
        center = tl.where(closer, columns[None, :], center)
        best = tl.where(closer, squared, best)
    nearest = tl.min(best, axis=1)
    center = tl.min(tl.where(best == nearest[:, None], center, nobody), axis=1)
    own = tl.load(rank + rows, mask=rows < count, other=slots) < clusters
    return tl.where(own, rows, center)


@triton.jit
def _lay_out(candidate, slot, rank, row_base, source_index, assignment, t, n, clusters, BLOCK: tl.constexpr):
    """A row for every token of a frame that ADTS kept and for every centre, in the order of position."""
    row = tl.load(row_base + t)
    for first in range(0, n, BLOCK):
        token = first + tl.arange(0, BLOCK)
        free = tl.load(candidate + t * n + token, mask=token < n, other=1) != 0
        own_slot = tl.load(slot + t * n + token, mask=token < n, other=-1)
        place = tl.load(rank + own_slot, mask=own_slot >= 0, other=clusters)
        kept = ~free | (place < clusters)
        at = row + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(source_index + at, t * n + token, mask=kept)
        tl.store(assignment + t * n + token, at, mask=kept)
        row += tl.sum(kept.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["start", "n", "slots", "row_blocks", "row_programs"])
def assign_kernel(
    gram,
    squares,
    count,
    clusters,
    rank,
    candidate,
    slot,
    row_base,
    slot_center,
    source_index,
    assignment,
    start,
    n,
    slots,
    d,
    row_blocks,
    row_programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Two kinds of programs, which need the ranks alone: nearest centres, and the output rows of a frame.
    ORDERED: tl.constexpr = slot_center is None
    if tl.program_id(0) < row_programs:
        here, rows, num_tokens, num_clusters, merging = block(count, clusters, start, row_blocks, ORDERED, ROWS)
        if tl.min(rows, axis=0) < num_tokens:
            of_frame = rank + here * slots
            center = tl.where(rows < num_clusters, rows, -1)
            if merging:
                center = _nearest_center(
                    gram + here * slots * slots, squares + here * slots, of_frame, slots, num_tokens, num_clusters,
                    rows, d, COLUMNS=COLUMNS,
                )  # fmt: skip
            if ORDERED:
                place = tl.load(of_frame + center, mask=rows < num_tokens, other=0)
                tl.store(assignment + rows, place, mask=rows < num_tokens)
            else:
                tl.store(slot_center + (start + here) * slots + rows, center, mask=rows < num_tokens)
    elif slot_center is not None:
        here = (tl.program_id(0) - row_programs).to(tl.int64)
        t = start + here
        num_clusters = tl.load(clusters + t)
        _lay_out(
            candidate, slot, rank + here * slots, row_base, source_index, assignment, t, n, num_clusters, BLOCK=BLOCK
        )  # fmt: skip


def cluster(
    gram: Tensor,
    squares: Tensor,
    scores: Scores,
    count: Tensor,
    clusters: Tensor,
    d: int,
    neighbours: int,
    assignment: Tensor,
    centers: Tensor | None = None,
    layout: Layout | None = None,
    start: int = 0,
) -> None:
    """Cluster the first ``count`` of S tokens of every frame around density peaks.

    Args:
        gram: [frames, S, S] float32, contiguous: inner products of D channels about any common origin.
        squares: [frames, S] float32, contiguous, the diagonal of ``gram``.
        scores: of as many frames or more, written.
        count, clusters: [T] int32: tokens and wanted clusters of each frame; ``start`` is the first of gram.
        neighbours: that make the density, the token itself included; a frame with fewer tokens takes all.
        centers, assignment: [clusters], [S] int64, written as ``cluster_tokens`` returns them (one frame).

    With ``layout`` instead of ``centers``, the output rows of these frames are laid out: its ``slot_center`` and
    ``source_index`` are written, and ``assignment`` [T, N] int64 at the tokens that ADTS kept and at the centres.
    """
    frames, slots, _ = gram.shape
    ordered = centers is not None
    tile = tiles()
    row_blocks = cdiv(slots, tile.rows)
    programs = frames * row_blocks
    shape = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    given = (gram, squares, count, clusters)
    densities = (*given, scores.sparsity, scores.farthest)
    launch(
        density_kernel,
        programs,
        *densities,
        start,
        slots,
        d,
        neighbours,
        row_blocks,
        ORDERED=ordered,
        **shape,
        num_warps=8,
    )
    launch(score_kernel, programs, *densities, scores.score, start, slots, d, row_blocks, ORDERED=ordered, **shape)
    ranks = (count, clusters, scores.score, scores.rank, centers)
    launch(
        rank_kernel, programs, *ranks, start, slots, row_blocks, **shape, max_registers=128
    )  # left alone, sm_120 spills
    n = slots
    lists: tuple[Tensor | None, ...] = (None,) * 5
    if layout is not None:
        n = layout.candidate.shape[1]
        lists = (layout.candidate, layout.slot, layout.row_base, layout.slot_center, layout.source_index)
    launch(
        assign_kernel,
        programs + (0 if layout is None else frames),
        *given,
        scores.rank,
        *lists,
        assignment,
        start,
        n,
        slots,
        d,
        row_blocks,
        programs,
        **shape,
        BLOCK=tile.tokens,
    )
