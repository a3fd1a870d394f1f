# SPDX-License-Identifier: MIT
"""Token Merging: Your ViT But Faster (ToMe, arXiv 2210.09461)."""

import torch
from torch import Tensor

import flashvid_vllm.ops as ops

from ..budget import Budget
from ..compress import CompressedVideo
from .common import finite_first, is_finite, merge, most_similar, windows

ROUNDS = 12  # the layers of ViT-B
MOST_TOKENS = 4096  # compared half with half: the paper's videos have 1568


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Merge similar tokens of the video pair by pair, wherever they are (bipartite soft matching, Sec. 3).

    A round splits the tokens alternately into A and B, links each of A to its most similar of B (cosine), and
    merges the r strongest links into B; a merged token is the mean of all that it stands for. As in the paper's
    constant schedule, r is the same in each of 12 rounds, and at most half of the tokens.

    Differs from the paper: all rounds run on the encoder's output, not one in each of its layers, so there is no
    proportional attention; similarity is of features, as keys are not at hand; tokens stay in the order of their
    position between rounds; and a video of more than 4096 tokens is taken in equal stretches of frames, as the
    comparisons grow with the square.

    Args:
        features: [T, N, D], contiguous.
        attention: not read.
        budget: says B.
        backend: of ``ops.match_tokens`` and ``ops.pool_trees``.
    """
    finite, n = is_finite(features), budget.tokens_per_frame
    source = torch.full(features.shape[:2], -1, dtype=torch.int64, device=features.device)
    for start, stop, tokens in windows(budget, MOST_TOKENS):
        if tokens:
            local = _match(features[start:stop], finite[start:stop], tokens, backend)
            source[start:stop] = torch.where(local >= 0, start * n + local, -1)
    return merge(features, source, backend)


def _match(features: Tensor, finite: Tensor, tokens: int, backend: str) -> Tensor:
    """The choice [T, N] that leaves ``tokens`` of ``features`` [T, N, D]; a token that is not ``finite`` [T, N] is
    merged with none, and dropped as long as there are enough others."""
    position = torch.arange(finite.numel(), device=features.device)
    left = finite_first(position, finite.flatten(), tokens)
    source = torch.full_like(position, -1)
    source[left] = left
    x = features.flatten(0, 1)[left]
    per_round = -(-(len(left) - tokens) // ROUNDS)
    while len(left) > tokens:
        count = min(per_round, len(left) - tokens, len(left) // 2)
        similarity, nearest = most_similar(x[None, ::2], x[1::2], backend)
        strongest = similarity[0].argsort(descending=True, stable=True)[:count]
        goes_to = position.clone()
        goes_to[left[::2][strongest]] = left[1::2][nearest[0, strongest].clamp(min=0)]
        source = torch.where(source >= 0, goes_to[source.clamp(min=0)], -1)
        choice = source.view(finite.shape)
        left, mean, _ = ops.pool_trees(features, choice.clamp(min=0), choice >= 0, backend)
        x = mean.to(features.dtype)
    return source.view(finite.shape)
