# SPDX-License-Identifier: MIT
"""Which token stands for each where budgets follow the video (`adaptive`): the largest residuals of the whole video.

In torch, on any device: every backend's oracle. Only whole numbers are compared, so that a choice does not depend on
the order of sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .cosines import inner, unit_rows

STEP = 1e-5  # of cosine distances, which are counted in steps: what is less is rounding, and ties
OPPOSITE = 2 / STEP
PAIRS_AT_A_TIME = 2**22  # of tokens of one frame, whose distances are in memory: 16 MiB
CHANNELS_AT_A_TIME = 2**24  # of tokens, of which there are two or three copies in fp32: 64 MiB each
LAST, PICKED = -1.0, -2.0  # below any distance: tokens that are not finite, and those that are picked


def farthest_first(apart: Tensor, residual: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """2. The residuals [T, picks] at which the tokens of each frame are picked, and their order [T, picks] int64.

    Args:
        apart: [T, N, N], contiguous, distances.
        residual: [T, N], contiguous, what the tokens begin with.
        picks: at most N.
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


def explain_tokens(
    features: Tensor,
    tokens: int,
    still: float,
    farthest_first: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = farthest_first,
    products: Callable[[Tensor], Tensor] = lambda unit: inner(unit, unit),
) -> Tensor:
    """The numbered steps of ``flashvid_vllm.ops.explain_tokens``, with a backend's own for the second, and for the
    ``products`` [T, N, N] of a frame's tokens [T, N, D]."""
    num_frames, n, d = features.shape
    features = features.contiguous()
    finite = is_finite(features)
    together = max(1, min(PAIRS_AT_A_TIME // n**2, CHANNELS_AT_A_TIME // (n * d)))
    parts = [slice(t, min(t + together, num_frames)) for t in range(0, num_frames, together)]

    picks = min(n, tokens)
    news = features.new_empty(num_frames, n, dtype=torch.float32)
    residual = features.new_empty(num_frames, picks, dtype=torch.float32)
    order = torch.empty(num_frames, picks, dtype=torch.int64, device=features.device)
    before = None
    for part in parts:
        unit = directions(features[part], finite[part])
        apart = distances(products(unit))
        news[part] = through_time(unit, before, apart)
        least = at_least(apart, finite[part], still)[:, None].maximum(news[part])
        residual[part], order[part] = farthest_first(apart, least.where(finite[part], LAST), picks)
        before = unit[-1]

    residual[0, 0] = torch.where(residual[0, 0] < 0, residual[0, 0], torch.inf)  # so that every token goes somewhere
    stays = torch.zeros(residual.numel(), dtype=torch.bool, device=features.device)
    stays[residual.flatten().argsort(descending=True, stable=True)[:tokens]] = True
    kept = torch.zeros(num_frames, n, dtype=torch.bool, device=features.device)
    kept.scatter_(1, order, stays.view(num_frames, picks))

    to_kept = torch.empty_like(news)
    source = torch.empty(num_frames, n, dtype=torch.int64, device=features.device)
    for part in parts:
        if len(parts) > 1:
            apart = distances(products(directions(features[part], finite[part])))
        to_kept[part], source[part] = apart.masked_fill(~(kept & finite)[part, None], torch.inf).min(2)
    frame = torch.arange(num_frames, device=features.device)[:, None]
    own = torch.arange(n, device=features.device)
    source = frame * n + torch.where(kept, own, source)
    source = source.where(kept | to_kept.isfinite(), -1)  # nothing is kept in its frame
    stayed = (news <= to_kept) & ~kept
    return source.gather(0, frame.where(~stayed, 0).cummax(0).values)  # of the last frame in which it did not stay


def is_finite(features: Tensor) -> Tensor:
    """[T, N] bool: the tokens of ``features`` [T, N, D] without a NaN or an infinity."""
    # The largest magnitude tells, frame by frame: a third of the time that it takes for all at once.
    return torch.stack([frame.abs().amax(-1) for frame in features]).isfinite()


def directions(features: Tensor, finite: Tensor) -> Tensor:
    """The tokens [T, N, D] as float32 of unit length; 0 where they are not finite."""
    return unit_rows(features.float().masked_fill(~finite[..., None], 0))


def in_steps(cosine: Tensor) -> Tensor:
    """Cosine distances, in steps; none is below 0, and so none below what is picked."""
    return ((1 - cosine) / STEP).round_().clamp_(min=0)


def distances(cosine: Tensor) -> Tensor:
    """[T, N, N]: how far the tokens of each frame are apart, in steps; 0 from each to itself."""
    apart = in_steps(cosine)
    apart.diagonal(dim1=1, dim2=2).zero_()
    return apart


def through_time(unit: Tensor, before: Tensor | None, apart: Tensor) -> Tensor:
    """1. The residuals [T, N] of tokens [T, N, D] behind the frame ``before`` [N, D], None at the start."""
    earlier = torch.cat([unit[:1] if before is None else before[None], unit[:-1]])
    news = in_steps((unit * earlier).sum(-1))
    if before is None:
        news[0] = (OPPOSITE - apart[0].sum(-1, dtype=torch.float64) / apart.shape[1]).round().clamp(min=0)
    return news


def at_least(apart: Tensor, finite: Tensor, still: float) -> Tensor:
    """1. The least residuals [T] of the tokens of each frame, by those that are ``finite`` [T, N] bool."""
    both = finite[:, :, None] & finite[:, None]
    total = apart.where(both, 0).sum((1, 2), dtype=torch.float64)
    return (still * total / both.sum((1, 2)).clamp(min=1)).round().float()
