# SPDX-License-Identifier: MIT
"""Where the tokens of a video go, as the steps of the pipeline tell it to one another on the device."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Lists of T frames of N tokens and at most S trees, all contiguous. Each is written by the step in brackets.

    Attributes:
        candidate: [T, N] uint8, whether ADTS left a token to TSTM [``select``].
        root: [T, N] int64, flat index of a token's root [``guarantee``, ``roots``].
        count: [T] int32, roots of each frame [``guarantee``].
        row_base: [T + 1] int64, first output row of each frame; B at the end [``guarantee``].
        slot: [T, N] int32, place of a root in its frame's list; -1 elsewhere [``roots``].
        slot_token: [T, S] int32, the roots of every frame, ascending [``roots``].
        tree_size: [T, S] int32, members of each tree [``roots``, where it is 1; ``tree_means``].
        slot_center: [T, S] int32, the root that each joins, as a place in its frame's list, or -1 [``cluster``].
        source_index: [B] int64, the token that each output row stands for [``cluster``].
    """

    candidate: Tensor
    root: Tensor
    count: Tensor
    row_base: Tensor
    slot: Tensor
    slot_token: Tensor
    tree_size: Tensor
    slot_center: Tensor
    source_index: Tensor
