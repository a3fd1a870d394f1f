# SPDX-License-Identifier: MIT
"""Budgets that follow the video: what is explained worst stays, whichever frame it is in. A method of this project."""

from torch import Tensor

import flashvid_vllm.ops as ops

from ..budget import Budget
from ..compress import CompressedVideo
from .common import merge

STILL = 0.7  # of what is still, in its frame's spread


def compress(
    features: Tensor, attention: Tensor | None, budget: Budget, backend: str, keeps_positions: bool
) -> CompressedVideo:
    """Keep the B tokens that what is kept explains worst (`ops.explain_tokens`), and merge the others into them.

    A frame has as many tokens as it has news, segments are not set, and the least residual that stays is the threshold
    between kept and merged, from the video itself. What stays where it is comes behind all that is clearly new: then
    whole frames are told again, those that show most first. That helps where a token's position says which frame it is
    from, and wastes tokens where it does not: there what is still is not told again. A kept token becomes the mean of
    all that it stands for, at its own place.

    Args:
        features: [T, N, D], contiguous.
        attention: not read: as a weight of the residuals it made no answer better, and with positions kept many worse.
        budget: says B.
        backend: of the ops.
        keeps_positions: whether the LLM sees kept tokens at their positions in the whole video.
    """
    return merge(
        features, ops.explain_tokens(features, budget.tokens, STILL if keeps_positions else 0, backend), backend
    )
