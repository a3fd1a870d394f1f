# SPDX-License-Identifier: MIT
"""What the peers share: a choice made once, its result put together, and the odds and ends of exact budgets.

A choice is a tensor ``source`` [T, N] int64: for each token the flat index (t*N + n) of the token that stands for
it, -1 if none does; a kept token stands for itself. Ties go to the lowest index, and what is not finite comes last.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

import flashvid_vllm.ops as ops
from flashvid_vllm.ops.explain import is_finite

from ..budget import Budget
from ..compress import CompressedVideo

FRAMES_AT_A_TIME = 16  # whose tokens are laid beside their targets
BELOW_ANY = -2.0  # cosine similarity
STEP = 1e-6  # scores that differ by less tie, as do parts of a token


@contextmanager
def vllms_own(method: str) -> Iterator[None]:
    """For the import of vLLM's module of ``method``: ValueError where vLLM is not installed."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"method={method!r} calls vLLM's own functions; install vllm ({error})") from None


def keep(features: Tensor, index: Tensor) -> CompressedVideo:
    """The video with only the tokens ``index`` [B] int64 (flat, ascending) left, as they are."""
    assignment = torch.full(features.shape[:2], -1, dtype=torch.int64, device=features.device)
    assignment.view(-1)[index] = torch.arange(len(index), device=index.device)
    return CompressedVideo(features.flatten(0, 1)[index], index, torch.ones_like(index), assignment)


def merge(features: Tensor, source: Tensor, backend: str) -> CompressedVideo:
    """The video with every kept token replaced by the mean of the tokens it stands for.

    A token that is not finite joins no mean: it is dropped, unless it is kept itself.

    Args:
        features: [T, N, D], contiguous.
        source: [T, N] int64, the choice.
    """
    index, mean, size = ops.pool_trees(features, source.clamp(min=0), source >= 0, backend)
    if not mean.sum(-1).isfinite().all():  # without another tensor of that size
        position = torch.arange(source.numel(), device=source.device).view_as(source)
        source = torch.where(is_finite(features) | (source == position), source, -1)
        index, mean, size = ops.pool_trees(features, source.clamp(min=0), source >= 0, backend)
    row = torch.full((source.numel() + 1,), -1, dtype=torch.int64, device=source.device)  # the last is of source -1
    row[index] = torch.arange(len(index), device=source.device)
    return CompressedVideo(mean.to(features.dtype), index, size, row[source])


def finite_first(index: Tensor, finite: Tensor, least: int) -> Tensor:
    """Those of ``index`` [n] (ascending) that are ``finite`` [n] bool, and as many others as make ``least`` of them."""
    count = max(least, int(finite.sum()))
    return index[(~finite).byte().argsort(stable=True)[:count].sort().values]


def top(score: Tensor, k: int) -> Tensor:
    """Indices [k] of the highest of ``score`` [n], ascending; a score that is not finite is the lowest."""
    score = torch.where(score.isfinite(), score.float(), -torch.inf)
    return score.argsort(descending=True, stable=True)[:k].sort().values


def steps(score: Tensor, step: float = STEP) -> Tensor:
    """Scores of order 1 in whole steps, so that those which differ by rounding alone tie."""
    return (score / step).round()


def most_similar(x: Tensor, targets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The target of highest cosine similarity for each token.

    Args:
        x: [T, n, D].
        targets: [m, D], the dtype of ``x``; at least one.

    Returns:
        similarity [T, n] float32, and index [T, n] int64 into ``targets``; -1 and -1 where no similarity is finite.
    """
    num_frames, n, d = x.shape
    if num_frames > FRAMES_AT_A_TIME:
        parts = [most_similar(part, targets, backend) for part in x.split(FRAMES_AT_A_TIME)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    segment_id = torch.arange(num_frames, device=x.device).repeat_interleave(2)
    similarity, index = x.new_full((num_frames, n), -torch.inf, dtype=torch.float32), None
    for start in range(0, len(targets), n):
        # Pairs of frames, the targets and then the tokens: links go from the second to the first.
        count = min(n, len(targets) - start)
        pairs = x.new_zeros(num_frames, 2, n, d)
        pairs[:, 0, :count] = targets[start : start + count]
        pairs[:, 1] = x
        candidate = torch.ones(num_frames, 2, n, dtype=torch.bool, device=x.device)
        candidate[:, 0, count:] = False
        found, linked = ops.match_tokens(
            pairs.flatten(0, 1), candidate.flatten(0, 1), segment_id, BELOW_ANY, "tree", backend
        )
        linked = linked[1::2]
        best = torch.where(linked >= 0, found[1::2], -torch.inf)
        better = best > similarity
        similarity = torch.where(better, best, similarity)
        index = torch.where(better, start + linked, -1 if index is None else index)
    assert index is not None
    return torch.where(index >= 0, similarity, -1), index


def frame_shares(budget: Budget) -> list[int]:
    """Tokens of each frame, floor(B*(t+1)/T) - floor(B*t/T): they sum to B and none is above N."""
    return [share(budget, t, t + 1) for t in range(budget.num_frames)]


def share(budget: Budget, start: int, stop: int) -> int:
    """Tokens of the frames from ``start`` to before ``stop`` together."""
    return budget.tokens * stop // budget.num_frames - budget.tokens * start // budget.num_frames


def windows(budget: Budget, most_tokens: int) -> list[tuple[int, int, int]]:
    """(start, stop, tokens to keep) of the equal stretches of frames, each of at most ``most_tokens`` tokens if
    a frame is, as one of which a video is compressed where time and memory grow with the square of its length."""
    t, n = budget.num_frames, budget.tokens_per_frame
    count = -(-t // max(1, most_tokens // n))
    bounds = [t * i // count for i in range(count + 1)]
    return [(a, b, share(budget, a, b)) for a, b in pairwise(bounds)]


def spread(total: int, room: list[int]) -> list[int]:
    """Integers that sum to ``total`` (at most the sum of ``room``), none above its ``room``, as equal as that
    allows; the last of equals get what does not divide."""
    out = [0] * len(room)
    for place, i in enumerate(sorted(range(len(room)), key=room.__getitem__)):  # the smallest first
        out[i] = min(room[i], (total - sum(out)) // (len(room) - place))
    return out


def rooms(finite: Tensor, tokens: int) -> list[int]:
    """How many of ``tokens`` each frame has room for: its ``finite`` ones [T, N] bool, or all if these are too few."""
    count = finite.sum(1)
    enough = int(count.sum()) >= tokens
    return (count if enough else torch.full_like(count, finite.shape[1])).tolist()


def largest_remainder(wanted: list[float], total: int, room: list[int]) -> list[int]:
    """Integers that sum to ``total`` (at most the sum of ``room``), none above its ``room``, nearest to ``wanted``.

    What is ``wanted``, of sum ``total``, is rounded down; the largest remainders, in steps of 1e-6, get one more each,
    the lowest index first; and again from the start while there is room, if some frames had too little.
    """
    whole = [math.floor(share + STEP) for share in wanted]
    out = [min(count, most) for count, most in zip(whole, room, strict=True)]
    order = sorted(range(len(out)), key=lambda t: (-round((wanted[t] - whole[t]) / STEP), t))
    while (missing := total - sum(out)) > 0:
        open_ = [t for t in order if out[t] < room[t]]
        for t in open_[:missing]:
            out[t] += 1
    return out
