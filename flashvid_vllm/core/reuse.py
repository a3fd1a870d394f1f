# SPDX-License-Identifier: MIT
"""Which rows of a video the vision encoder computes, and which it copies from another temporal position."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reuse:
    """The rows of one video of T temporal positions with P rows each that the encoder computes.

    A row is what a tower's output is counted in before any pooling: a patch (SigLIP, CLIP), or a unit of 2 x 2 patches
    where a merger joins them (Qwen). Row ``t * P + p`` is the p-th row of temporal position t, in the order of the
    pixels that the processor lays out.

    Attributes:
        rows: [M] int64, ascending: the rows that are computed.
        source: [T * P] int64, for each row the place in ``rows`` of the one that stands for it: a computed row stands
            for itself, ``rows[source[i]] == i``, another for one at the same place of its frame,
            ``rows[source[i]] % P == i % P``.
    """

    rows: Tensor
    source: Tensor


def leaving_out(num_frames: int, rows_per_frame: int, frame: int, whole: bool) -> Reuse:
    """Of a video all rows but the first one of temporal position ``frame``, or with ``whole`` but all of its: copies of
    those of the position before it."""
    copied = frame * rows_per_frame + torch.arange(rows_per_frame if whole else 1)
    is_computed = torch.ones(num_frames * rows_per_frame, dtype=torch.bool)
    is_computed[copied] = False
    stands = torch.arange(len(is_computed))
    stands[copied] -= rows_per_frame
    return Reuse(is_computed.nonzero().flatten(), (is_computed.cumsum(0) - 1)[stands])
