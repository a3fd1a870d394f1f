# SPDX-License-Identifier: MIT
"""VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467)."""

import torch
from torch import Tensor

from ..budget import Budget
from ..compress import CompressedVideo
from .common import finite_first, frame_shares, is_finite, merge, most_similar, top

CONTEXTUAL = (10, 64)  # of 64 tokens 54 are dominant and 10 contextual; of 128 and 192 as many in proportion


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """In every frame, keep the tokens that attention dwells on and merge the others into a few (Sec. 2.3).

    Dominant: the most attended tokens, as they are; attention is what a token receives on average, the paper's
    rule for encoders without a class token. Contextual: of the others, evenly spaced ones are targets; each of the
    rest goes to its most similar target, and a target becomes the mean of what it has got and itself.

    Left out: fine-tuning of the projector. Differs: similarity is of features, as the encoder's keys are not at
    hand; the mean is the paper's, where the published code adds a target to the mean of the others. A frame that
    may keep fewer than 7 tokens has none for contextual ones, and drops what is not dominant.

    Args:
        features: [T, N, D], contiguous.
        attention: [T, N].
        budget: says B; the frames' shares differ by at most one.
        backend: of ``ops.match_tokens`` and ``ops.pool_trees``.
    """
    assert attention is not None
    n, finite = budget.tokens_per_frame, is_finite(features)
    attention = attention.masked_fill(~finite, -torch.inf)
    source = torch.full(features.shape[:2], -1, dtype=torch.int64, device=features.device)
    for t, tokens in enumerate(frame_shares(budget)):
        num_targets = tokens * CONTEXTUAL[0] // CONTEXTUAL[1]
        dominant = top(attention[t], tokens - num_targets)
        source[t, dominant] = dominant
        if num_targets:
            is_left = source[t] < 0
            others = is_left.nonzero().flatten()
            others = finite_first(others, finite[t, others], num_targets)
            targets = others[:: len(others) // num_targets][:num_targets]
            _, nearest = most_similar(features[t, others][None], features[t, targets], backend)
            source[t, others] = torch.where(nearest[0] >= 0, targets[nearest[0]], -1)
            source[t, targets] = targets
    first = n * torch.arange(len(source), device=source.device)[:, None]
    return merge(features, torch.where(source >= 0, first + source, -1), backend)
