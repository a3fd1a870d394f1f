# SPDX-License-Identifier: MIT
"""Which rows of a video the vision encoder computes, and which it copies from another temporal position."""

from dataclasses import dataclass

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
