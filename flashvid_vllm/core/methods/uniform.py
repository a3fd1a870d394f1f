# SPDX-License-Identifier: MIT
"""Uniform sampling: tokens at even distances, whatever they show. The baseline that every method must beat."""

import torch
from torch import Tensor

from ..budget import Budget
from ..compress import CompressedVideo
from .common import keep


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Keep the token in the middle of each of B equal stretches of the flattened video; the others are dropped.

    Args:
        features: [T, N, D], contiguous.
        attention: not read.
        budget: says B.
        backend: not used.
    """
    count, total = budget.tokens, budget.total
    return keep(features, (2 * torch.arange(count, device=features.device) + 1) * total // (2 * count))
