# SPDX-License-Identifier: MIT
"""Budgets that follow the video: what is explained worst stays, whichever frame it is in. A method of this project."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..budget import Budget
from ..compress import CompressedVideo
from .common import is_finite, merge, steps

STEP = 1e-5  # of cosine distances, which are counted in steps: what is less is rounding, and ties
STILL = 0.7  # of what is still, in its frame's spread
PAIRS_AT_A_TIME = 2**22  # of tokens of one frame, whose distances are in memory: 16 MiB
LAST, PICKED = -1.0, -2.0  # below any distance: tokens that are not finite, and those that are picked


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Keep the B tokens that what is kept explains worst, wherever in the video they are, and merge the others.

    1. A token's residual is its cosine distance to its place one frame before, and STILL of its frame's spread at
       least, the mean of the cosine distances between the frame's tokens. So what stays where it is comes behind all
       that is clearly new; then frames are told again as a whole, those that show most first. In the first frame
       nothing is before it; the token that is most like its frame goes first, and stays.
    2. In every frame the token of the largest residual is picked. It explains the others as well as they are like it,
       their residuals fall to their distance from it, and the next is picked: farthest first. So a frame's residuals
       fall from pick to pick.
    3. The B largest residuals of the whole video stay. A frame has as many tokens as it has news, segments are not
       set, and the least residual that stays is the threshold between kept and merged, from the video itself.
    4. Every other token goes to what explains it best: the nearest that is kept in its frame, or whatever stands for
       its place in the frame before. A kept token becomes the mean of all that went to it, at its own place.

    Distances are counted in steps of 1e-5; ties go to the earlier frame, then to the earlier pick, then to the lowest
    index; a token that is not finite is kept last. Time grows with T * N * N * D, and memory with T * N
    and, for one frame, with N * N.

    Args:
        features: [T, N, D], contiguous.
        attention: not read: as a weight of the residuals it made answers worse.
        budget: says B.
        backend: of ``ops.pool_trees``.
    """
    num_frames, n = budget.num_frames, budget.tokens_per_frame
    finite = is_finite(features)
    together = max(1, PAIRS_AT_A_TIME // n**2)
    parts = [slice(t, min(t + together, num_frames)) for t in range(0, num_frames, together)]

    picks = min(n, budget.tokens)
    news = features.new_empty(num_frames, n, dtype=torch.float32)
    residual = features.new_empty(num_frames, picks, dtype=torch.float32)
    order = torch.empty(num_frames, picks, dtype=torch.int64, device=features.device)
    before = None
    for part in parts:
        unit = directions(features[part], finite[part])
        news[part] = unexplained(unit, before)
        apart, least = distances(unit), at_least(unit, finite[part])[:, None].maximum(news[part])
        residual[part], order[part] = farthest_first(apart, least.where(finite[part], LAST), picks)
        before = unit[-1]

    residual[0, 0] = torch.where(residual[0, 0] < 0, residual[0, 0], torch.inf)  # so that every token goes somewhere
    stays = torch.zeros(residual.numel(), dtype=torch.bool, device=features.device)
    stays[residual.flatten().argsort(descending=True, stable=True)[: budget.tokens]] = True
    kept = torch.zeros(num_frames, n, dtype=torch.bool, device=features.device)
    kept.scatter_(1, order, stays.view(num_frames, picks))

    to_kept = torch.empty_like(news)
    source = torch.empty(num_frames, n, dtype=torch.int64, device=features.device)
    for part in parts:
        if len(parts) > 1:
            apart = distances(directions(features[part], finite[part]))
        to_kept[part], source[part] = apart.masked_fill(~(kept & finite)[part, None], torch.inf).min(2)
    frame = torch.arange(num_frames, device=features.device)[:, None]
    own = torch.arange(n, device=features.device)
    source = frame * n + torch.where(kept, own, source)
    source = source.where(kept | to_kept.isfinite(), -1)  # nothing is kept in its frame
    stayed = (news <= to_kept) & ~kept
    source = source.gather(0, frame.where(~stayed, 0).cummax(0).values)  # of the last frame in which it did not stay
    return merge(features, source, backend)


def directions(features: Tensor, finite: Tensor) -> Tensor:
    """The tokens [T, N, D] as float32 of unit length; 0 where they are not finite."""
    return normalize(features.float().masked_fill(~finite[..., None], 0), dim=-1)


def distances(unit: Tensor) -> Tensor:
    """[T, N, N]: how far the tokens of each frame are apart, in steps."""
    return steps(1 - unit @ unit.mT, STEP)


def unexplained(unit: Tensor, before: Tensor | None) -> Tensor:
    """1. The residuals [T, N], in steps, of tokens [T, N, D] behind the frame ``before`` [N, D], None at the start."""
    earlier = torch.cat([unit[:1] if before is None else before[None], unit[:-1]])
    apart = steps(1 - (unit * earlier).sum(-1), STEP)
    if before is None:
        apart[0] = steps(1 + unit[0] @ unit[0].mean(0), STEP)
    return apart


def at_least(unit: Tensor, finite: Tensor) -> Tensor:
    """1. The least residuals [T], in steps, of the tokens [T, N, D] of each frame, by those that are ``finite``."""
    mean = unit.sum(1) / finite.sum(1, keepdim=True).clamp(min=1)
    return steps(STILL * (1 - mean.square().sum(-1)), STEP)


def farthest_first(apart: Tensor, residual: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """2. The residuals [T, picks] at which the tokens of each frame are picked, and their order, int64.

    ``apart`` [T, N, N]: their `distances`; ``residual`` [T, N]: what they begin with.
    """
    frame = torch.arange(len(apart), device=apart.device)
    at, order = [], []
    for _ in range(picks):
        most, pick = residual.max(1)
        at.append(most)
        order.append(pick)
        residual = residual.minimum(apart[frame, pick])
        residual[frame, pick] = PICKED
    return torch.stack(at, dim=1), torch.stack(order, dim=1)
