# SPDX-License-Identifier: MIT
"""ALGORITHM.md's exactness rule: a backend's own choice may differ only where it is as good within 1e-5."""

import torch
from torch import Tensor

from flashvid_vllm.ops import explain, reference
from flashvid_vllm.ops.cosines import inner

NEAR = 1e-5


def assert_selected(features: Tensor, weight: Tensor | None, got: Tensor, expected: Tensor) -> None:
    """Replay the picks of ``got`` in greedy order: each must be within NEAR of the best of all tokens."""
    if torch.equal(got, expected):
        return
    assert got.shape == expected.shape
    assert (got.diff() > 0).all()
    for t, picks in enumerate(got.tolist()):
        distance = reference._cosine_distance(features[t : t + 1])[0]
        w = torch.ones(len(distance)) if weight is None else weight[t].float()
        scale = w[w.isfinite()].abs().max().clamp(min=1e-30)
        nearest, left, done = distance.amin(-1), set(picks), torch.zeros(len(distance), dtype=torch.bool)
        for step in range(len(picks)):
            score = reference._finite_or(w * nearest / scale, reference.LOWEST_SCORE).masked_fill(done, -torch.inf)
            choice = max(left, key=lambda j: (float(score[j]), -j))
            assert score[choice] >= score.max() - NEAR, (t, step, choice)
            left.remove(choice)
            done[choice] = True
            nearest = distance[choice] if step == 0 else torch.minimum(nearest, distance[choice])


def assert_linked(
    features: Tensor, threshold: float, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> None:
    """Similarities agree within NEAR; a differing parent is as similar; a differing link is at the threshold."""
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=NEAR)
    unit = reference.unit_rows(features)
    for t, i in (got[1] != expected[1]).nonzero().tolist():
        mine, other = int(got[1][t, i]), int(expected[1][t, i])
        if mine < 0 or other < 0:
            assert abs(float(expected[0][t, i]) - threshold) <= NEAR
        else:
            assert unit[t, i] @ unit[t - 1, mine] >= expected[0][t, i] - NEAR


def assert_clustered(x: Tensor, k: int, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Each centre of ``got`` could have the best score of those left, each token's home could be its nearest centre.

    Could: every squared distance may be off by NEAR of the largest squared norm, as it is where they come from inner
    products. In flat regions the order of distances, and so of densities, is rounding alone.
    """
    if torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]):
        return
    rows, index = x.double(), torch.arange(len(x))
    finite = rows.isfinite().all(-1)
    norms = rows[finite].square().sum(-1) / x.shape[1]
    off = NEAR * float(norms.max()) if len(norms) else 0.0
    squared = (rows[:, None] - rows[None]).square().mean(-1)
    squared = torch.where(finite[:, None] & finite[None], squared, torch.inf).fill_diagonal_(0)
    low, high = (squared - off).clamp(min=0).sqrt(), (squared + off).sqrt()
    m = squared.sort(-1).values[:, :k].mean(-1)
    others = index[None] != index[:, None]
    surely = others & (m[None] < m[:, None] - 2 * off)  # [i, j]: is j denser than i
    perhaps = others & (m[None] <= m[:, None] + 2 * off)
    at_most = torch.where(surely.any(-1), torch.where(surely, high, torch.inf).amin(-1), high.max())
    at_least = torch.where(perhaps.any(-1), torch.where(perhaps, low, torch.inf).amin(-1), low.max())
    best, worst = (torch.nan_to_num(delta.log() - m, nan=-torch.inf) for delta in (at_most + 1e-30, at_least))
    left = torch.ones(len(x), dtype=torch.bool)
    for center in got[0].tolist():
        assert left[center]
        assert best[center] >= worst[left].max() - NEAR * (1 + abs(float(best[center]))) - 2 * off
        left[center] = False
    home = got[0][got[1]]
    assert (~left | (low[index, home] <= high[:, got[0]].amin(-1))).all()
    assert torch.equal(got[1][got[0]], torch.arange(len(got[0])))


def assert_explained(features: Tensor, tokens: int, still: float, got: Tensor, expected: Tensor) -> None:
    """Replay the picks that ``got`` keeps: each could be its frame's farthest, none that is left is above the last, and
    what stands for each token could be what explains it best. Could: every distance may be off by a step."""
    if torch.equal(got, expected):
        return
    off = 2.0  # steps between two distances
    num_frames, n = got.shape
    finite = explain.is_finite(features)
    unit = explain.directions(features, finite)
    apart = explain.distances(inner(unit, unit))
    news = explain.through_time(unit, None, apart)
    begin = explain.at_least(apart, finite, still)[:, None].maximum(news).where(finite, explain.LAST)
    kept = got == torch.arange(got.numel()).view_as(got)
    assert int(kept.sum()) == tokens
    last, left = torch.inf, -torch.inf
    for t in range(num_frames):
        residual, picks = begin[t].clone(), set(kept[t].nonzero().flatten().tolist())
        for step in range(len(picks)):
            pick = max(picks, key=lambda j: (float(residual[j]), -j))
            assert residual[pick] >= residual.max() - off, (t, step, pick)
            last = min(last, float(residual[pick])) if t or step else last
            residual = residual.minimum(apart[t, pick])
            residual[pick] = explain.PICKED
            picks.remove(pick)
        left = max(left, float(residual.max()))
    assert last >= left - off
    to_kept = apart.masked_fill(~(kept & finite)[:, None], torch.inf)
    nearest = to_kept.amin(2)
    for t, i in (~kept).nonzero().tolist():
        source, stays = int(got[t, i]), t > 0 and bool(news[t, i] <= nearest[t, i] + off)
        if source // n == t:
            assert to_kept[t, i, source % n] <= nearest[t, i] + off
            assert t == 0 or to_kept[t, i, source % n] <= news[t, i] + off
        else:
            assert source == int(got[t - 1, i]) and stays if t else source == -1 and nearest[t, i] == torch.inf
