# SPDX-License-Identifier: MIT
"""Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference (arXiv 2510.14624)."""

import math

import torch
from torch import Tensor

from ..budget import Budget
from ..compress import CompressedVideo
from .common import is_finite, keep, vllms_own


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Keep the tokens that differ most from the same place one frame before, and the first frame.

    vLLM's own function chooses, at the rate at which it keeps just B tokens, and in the features' dtype, as it
    does in serving. The others are dropped.

    Left out: the paper's variant that compares pixels (vLLM compares embeddings, as does this), and its training.
    Differs from vLLM: where B is below N, vLLM keeps the N tokens of the first frame; here it is their first B,
    which is vLLM's order of equals. A token that is not finite counts as unchanged.

    Args:
        features: [T, N, D], contiguous.
        attention: not read.
        budget: says B.
        backend: not used.

    Raises:
        ValueError: vLLM is not installed.
    """
    with vllms_own("evs"):
        from vllm.multimodal.video_prune import evs

    if budget.tokens <= budget.tokens_per_frame:
        return keep(features, torch.arange(budget.tokens, device=features.device))
    finite, x = is_finite(features), features
    if not finite.all():
        x = features.masked_fill(~finite[..., None], 0)
        for t in range(1, len(x)):
            x[t] = torch.where(finite[t, :, None], x[t], x[t - 1])
    grid = (budget.num_frames, 1, budget.tokens_per_frame)
    rate = pruning_rate(budget.tokens, budget.total)
    mask = evs.compute_retention_mask(x.flatten(0, 1), grid, 1, rate)
    return keep(features, mask.nonzero().flatten())


def pruning_rate(kept: int, total: int) -> float:
    """The rate q at which vLLM keeps int(total * (1 - q)) = ``kept`` tokens: the doubles nearest to 1 - kept/total."""
    rate = 1 - kept / total
    while int(total * (1 - rate)) < kept:
        rate = math.nextafter(rate, 0)
    return rate
