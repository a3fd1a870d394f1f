# SPDX-License-Identifier: MIT
"""V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video LLMs (arXiv 2603.27650)."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..budget import Budget
from ..compress import CompressedVideo
from .common import is_finite, keep, largest_remainder, rooms, steps, top

TEMPERATURE = 0.7  # of the softmax over the frames' curvatures
EPS = 1e-6  # least length that is divided by


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Keep more tokens of the frames where the video's path turns; in each those unlike their frame, and long ones.

    The frames' mean tokens, of unit length, are a path. Its curvature at a frame is 1 - cosine of the step to it and
    the step from it, 1 at both ends. A frame gets one token, and of the others a share by the softmax of the
    curvatures. In it the tokens of the highest score stay: 1 - cosine to the frame's mean, plus their length, scaled
    to [0, 1] in the frame. The others are dropped.

    From the published code; the method's section of the paper could not be read. Differs from the code: what rounding
    leaves over goes to the frames of the largest remainders, one token each, where the code gives all of it to one
    frame; B may be below T, and then no frame has a token for certain; a video of one frame is compressed too; scores
    within 1e-6 tie, and ties go to the lowest index; a token that is not finite is kept last.

    Args:
        features: [T, N, D], contiguous.
        attention: not read.
        budget: says B.
        backend: not used.
    """
    finite = is_finite(features)
    # In doubles, frame by frame: where nothing moves, steps of rounding noise have no direction.
    path, scores = [], []
    for frame, known in zip(features, finite, strict=True):
        x = frame.double().masked_fill(~known[:, None], 0)
        mean = normalize(x.sum(0) / known.sum().clamp(min=1), dim=0, eps=EPS)
        length = x.norm(dim=1)
        least, most = length[known].aminmax() if known.any() else (length.min(), length.max())
        score = 1 - cosine_similarity(x, mean[None], dim=1, eps=EPS) + (length - least) / (most - least + EPS)
        path.append(mean)
        scores.append(steps(score).masked_fill(~known, -torch.inf))

    step = torch.stack(path).diff(dim=0)
    curvature = torch.ones(len(features), dtype=torch.float64, device=features.device)
    if len(step) > 1:
        curvature[1:-1] = 1 - cosine_similarity(step[:-1], step[1:], dim=1, eps=EPS)
    share = (curvature / TEMPERATURE).softmax(0)
    least_each = 1 if budget.tokens >= budget.num_frames else 0
    wanted = least_each + share * (budget.tokens - least_each * budget.num_frames)
    counts = largest_remainder(wanted.tolist(), budget.tokens, rooms(finite, budget.tokens))
    n = budget.tokens_per_frame
    return keep(features, torch.cat([t * n + top(scores[t], count) for t, count in enumerate(counts)]))
