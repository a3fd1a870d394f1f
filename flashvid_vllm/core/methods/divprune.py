# SPDX-License-Identifier: MIT
"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175)."""

import torch
from torch import Tensor

import flashvid_vllm.ops as ops

from ..budget import Budget
from ..compress import CompressedVideo
from .common import keep, windows

MOST_TOKENS = 4096  # compared all with all: the paper's images have up to 2880, its videos 1152


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Keep a subset of large smallest pairwise distance (the Max-Min Diversity Problem, Sec. 3).

    Greedily, on cosine distance: first the token that is farthest from its nearest other, then the one that is
    farthest from its nearest kept one. The others are dropped.

    Differs from the paper: a video of more than 4096 tokens is taken in equal stretches of frames, as distances
    grow with the square; and distances below 1e-5 count as 0, being rounding (``ops.select_tokens``).

    Args:
        features: [T, N, D], contiguous.
        attention: not read.
        budget: says B.
        backend: of ``ops.select_tokens``.
    """
    index = []
    for start, stop, tokens in windows(budget, MOST_TOKENS):
        picked = ops.select_tokens(features[start:stop].flatten(0, 1)[None], None, tokens, backend)[0]
        index.append(start * budget.tokens_per_frame + picked)
    return keep(features, torch.cat(index))
