# SPDX-License-Identifier: MIT
"""GleanVID: Complementary Token Selection for Efficient Video Large Language Models (arXiv 2609.37042)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from ..budget import Budget
from ..compress import CompressedVideo
from .common import STEP, is_finite, keep, largest_remainder, rooms, steps, top

UNIFORM = (0.2, 0.6)  # alpha_min and alpha_max, the share of the budget that all frames get alike
SHARPNESS = 4.0  # tau of the local representativeness
TOLERANCE = 1e-4  # eps_orth
CELL = 2  # tokens on a side of a neighbourhood
DIRECTIONS = 1024  # at most that the span of the kept tokens has
AT_A_TIME = 4096  # tokens that are in memory as doubles
HISTORY = 64  # frames that novelty looks back: the paper's videos have no more
KRYLOV = 64  # steps at most towards the direction that all tokens share
ROUNDING = 1e-6  # of a token's length: less that is left of it is nothing
EPS = torch.finfo(torch.float64).tiny


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Keep more tokens of frames with something new; in each those that stand for their surroundings, and that what
    is kept of the frames before does not span.

    Budget (TNB, Sec. 3.2): the direction that all tokens share is taken off (Eq. 3). A frame's novelty is the sum,
    over its 2 x 2 cells, of what the same cell of the frames before does not span (Eq. 4, 11); its share is in part
    the same for all and in part by novelty, the more the less even that is (Gini coefficient, Eq. 5 to 7), rounded by
    largest remainders. Selection (CTS, Sec. 3.3): frame by frame, the tokens of the highest sum of two scores, each
    scaled to [0, 1] in its frame: softplus of how much more alike a token is to its cell than to its frame (Eq. 8),
    and what is left of it beside the span of all tokens kept before (Eq. 9, 12, 13). The others are dropped.

    Differs from the paper: the size of the grid is not at hand, so cells are 2 x 2 where N is a square, and four
    tokens in a row elsewhere; novelty looks back 64 frames, as its cost grows with the square; it is worked out in
    doubles, what they leave of a token's length below 1e-6 counts as 0, scores within 1e-6 tie, and ties go to the
    lowest index; the directions of Eq. 13 are told by singular values, not by the diagonal of a QR decomposition
    without pivots, which loses some; there are 1024 at most, of the tokens kept first, as each costs all later tokens;
    a token that is not finite is kept last.

    Args:
        features: [T, N, D], contiguous.
        attention: not read.
        budget: says B.
        backend: not used.
    """
    n, finite = budget.tokens_per_frame, is_finite(features)
    cell = cells(n, features.device)
    nothing = torch.zeros(features.shape[2], dtype=torch.float64, device=features.device)
    sums = [_known(x, known, nothing).sum(0) for x, known in zip(features, finite, strict=True)]
    mean = torch.stack(sums).sum(0) / finite.sum().clamp(min=1)
    shared = _shared_direction(features, finite, mean)

    def debiased(t: int) -> Tensor:
        x = _known(features[t], finite[t], mean)
        return x - (x - mean) @ shared[:, None] * shared

    novelty = _novelty(debiased, len(features), cell)
    counts = largest_remainder(_wanted(novelty, budget.tokens), budget.tokens, rooms(finite, budget.tokens))

    kept, basis = [], mean.new_zeros(len(mean), 0)
    for t, count in enumerate(counts):
        x = debiased(t)
        left = _beside(x, basis)
        raw = _known(features[t], finite[t], mean)
        local = cosine_similarity(raw, _cell_means(raw, cell)[cell], dim=1)
        local = softplus(SHARPNESS * (local - cosine_similarity(raw, raw.mean(0)[None], dim=1))) / SHARPNESS
        score = _scaled(local, finite[t]) + _scaled(left.norm(dim=1), finite[t])
        chosen = top(steps(score).masked_fill(~finite[t], -torch.inf), count)
        kept.append(t * n + chosen)
        if count and (room := DIRECTIONS - basis.shape[1]) > 0:
            basis = torch.cat([basis, _new_directions(left[chosen[:room]])], dim=1)
    return keep(features, torch.cat(kept))


def cells(n: int, device: torch.device) -> Tensor:
    """[n] int64: the neighbourhood, from 0, that each token of a frame is in."""
    place, side = torch.arange(n, device=device), math.isqrt(n)
    if side * side != n:
        return place // CELL**2
    return place // side // CELL * -(-side // CELL) + place % side // CELL


def _known(x: Tensor, known: Tensor, mean: Tensor) -> Tensor:
    """The tokens [..., D] as doubles, with ``mean`` [D] in the place of those that are not finite."""
    return torch.where(known[..., None], x.double(), mean)


def _shared_direction(features: Tensor, finite: Tensor, mean: Tensor) -> Tensor:
    """The first right singular vector [D] of the centred tokens, by Lanczos steps from the longest of them."""
    frames = max(1, AT_A_TIME // features.shape[1])
    parts = list(zip(features.split(frames), finite.split(frames), strict=True))

    def centred(x: Tensor, known: Tensor) -> Tensor:
        return _known(x, known, mean).flatten(0, 1) - mean

    def spread(v: Tensor) -> Tensor:
        return torch.stack([(x @ v) @ x for x in (centred(*part) for part in parts)]).sum(0)

    lengths = torch.cat([centred(*part).norm(dim=1) for part in parts])
    longest = int((lengths / lengths.max().clamp(min=EPS) / STEP).round().argmax())
    v = _known(features.flatten(0, 1)[longest], finite.flatten()[longest], mean) - mean
    if not float(v.norm()):
        return v
    directions, projected = v[None] / v.norm(), v.new_zeros(0, 0)
    while True:
        w = spread(directions[-1])
        row = directions @ w
        projected = torch.nn.functional.pad(projected, (0, 1, 0, 1))
        projected[-1], projected[:, -1] = row, row
        for _ in range(2):  # twice is enough to keep them orthogonal
            w = w - (directions @ w) @ directions
        value, vector = torch.linalg.eigh(projected)
        unknown = w.norm() * vector[-1, -1].abs()  # of the direction that is nearest so far
        if len(directions) >= min(KRYLOV, len(v)) or unknown <= STEP * value[-1]:
            shared: Tensor = vector[:, -1] @ directions
            return shared / shared.norm()
        directions = torch.cat([directions, w[None] / w.norm()])


def _novelty(debiased: Callable[[int], Tensor], num_frames: int, cell: Tensor) -> Tensor:
    """R [T]: the lengths of what the frames before leave of each cell's mean, summed over the tokens (Eq. 4, 11)."""
    size = torch.bincount(cell)
    history, out = None, []
    for t in range(num_frames):
        z = _cell_means(debiased(t), cell)  # [cells, D]
        own = z.square().sum(1)
        unexplained = own
        if history is not None:
            gram = history @ history.mT
            diagonal = gram.diagonal(dim1=1, dim2=2)
            damping = (TOLERANCE * diagonal.mean(1)).clamp(min=EPS)
            gram = gram + torch.diag_embed(damping[:, None].expand_as(diagonal))
            seen = history @ z[:, :, None]
            unexplained = own - (seen * torch.linalg.solve(gram, seen)).sum((1, 2))
        unexplained = unexplained.where(unexplained > ROUNDING**2 * own, 0)
        out.append((unexplained.sqrt() * size).sum())
        history = z[:, None] if history is None else torch.cat([history, z[:, None]], dim=1)[:, -HISTORY:]
    return torch.stack(out)


def _wanted(novelty: Tensor, tokens: int) -> list[float]:
    """Each frame's share of the budget, not rounded (Eq. 5 to 7)."""
    count, total = len(novelty), float(novelty.sum())
    if not total:
        return [tokens / count] * count
    rank = torch.arange(1, count + 1, device=novelty.device)
    gini = float(2 * (rank * novelty.sort().values).sum()) / (count * total) - (count + 1) / count
    alike = UNIFORM[1] - (UNIFORM[1] - UNIFORM[0]) * gini
    return [alike * tokens / count + (1 - alike) * tokens * value / total for value in novelty.tolist()]


def _cell_means(x: Tensor, cell: Tensor) -> Tensor:
    """[cells, D]: the mean of the tokens [N, D] of each cell."""
    size = torch.bincount(cell)
    return x.new_zeros(len(size), x.shape[1]).index_add_(0, cell, x) / size[:, None]


def _beside(x: Tensor, basis: Tensor) -> Tensor:
    """What the orthonormal columns [D, q] leave of the tokens [N, D]; nothing where that is rounding."""
    left = x - (x @ basis) @ basis.T
    return left.where(left.norm(dim=1, keepdim=True) > ROUNDING * x.norm(dim=1, keepdim=True), 0)


def _new_directions(left: Tensor) -> Tensor:
    """Orthonormal columns [D, q] that span the rows [k, D], but for directions that rounding makes (Eq. 13)."""
    _, size, rows = torch.linalg.svd(left, full_matrices=False)
    return rows[size > TOLERANCE * size.max()].T if size.numel() else left.T


def _scaled(value: Tensor, known: Tensor) -> Tensor:
    """``value`` [N] on [0, 1] over the tokens that are ``known`` [N] bool; 0 where all are alike."""
    if not known.any():
        return torch.zeros_like(value)
    least, most = value[known].aminmax()
    apart = most - least
    return (value - least) / apart if apart > ROUNDING * most.abs() else torch.zeros_like(value)
