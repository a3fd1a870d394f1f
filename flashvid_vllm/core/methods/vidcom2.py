# SPDX-License-Identifier: MIT
"""Video Compression Commander: Plug-and-Play Inference Acceleration for Video LLMs (VidCom2, arXiv 2505.14454)."""

import torch
from torch import Tensor
from torch.nn import functional

from ..budget import Budget
from ..compress import CompressedVideo
from .common import is_finite, keep, vllms_own


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Keep the tokens least like their video and their frame, more of them in frames of their own kind.

    The scores are vLLM's own (Gaussian similarity, where the paper's text has cosines; share of channels;
    temperature; in the features' dtype, as in serving), and so are the steps: channels of low variance; similarity
    to the centres (Eq. 3, 7); a share for each frame by how unlike the video it is (Eq. 5, 6); the best of each
    frame (Eq. 9, 10); then the globally best or without the worst, so that exactly B are left. The others are
    dropped.

    Differs from vLLM: ties go to the lowest index, where ``topk`` there leaves them open; B may be below T, where
    vLLM keeps T; and a token that is not finite is kept last.

    Args:
        features: [T, N, D], contiguous.
        attention: not read.
        budget: says B.
        backend: not used.

    Raises:
        ValueError: vLLM is not installed.
    """
    with vllms_own("vidcom2"):
        from vllm.multimodal.video_prune import vidcom2

    n, finite = budget.tokens_per_frame, is_finite(features)
    x = features if finite.all() else features.masked_fill(~finite[..., None], 0)
    rows = x.flatten(0, 1)
    channels = rows.var(dim=0, unbiased=False).argsort(stable=True)
    low = channels[: max(1, int(len(channels) * vidcom2._LOW_VAR_CHANNEL_RATIO))]
    unit = functional.normalize(rows.index_select(-1, low).view(*x.shape[:2], -1), dim=-1)
    to_video = vidcom2._multi_scale_gaussian(unit, unit.mean(dim=(0, 1), keepdim=True))
    to_frame = vidcom2._multi_scale_gaussian(unit, unit.mean(dim=1, keepdim=True))
    similarity = (to_video + to_frame).masked_fill(~finite, torch.inf)

    unlike = -to_video.mean(dim=-1)
    share = functional.softmax((unlike - unlike.max()) / vidcom2._SOFTMAX_TEMPERATURE, dim=0)
    scale = (budget.tokens / budget.total * (1 + share - share.mean())).clamp(max=1)
    per_frame = (scale * n).round().long().clamp(min=1, max=n)

    rank = similarity.argsort(dim=1, stable=True).argsort(dim=1)
    beyond = (rank >= per_frame[:, None]).flatten()
    best_first = similarity.flatten().argsort(stable=True)
    best_first = best_first[beyond[best_first].byte().argsort(stable=True)]
    return keep(features, best_first[: budget.tokens].sort().values)
