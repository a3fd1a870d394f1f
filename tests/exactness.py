# SPDX-License-Identifier: MIT
"""ALGORITHM.md's exactness rule: a backend's own choice may differ only where it is as good within 1e-5."""

import torch
from torch import Tensor

from flashvid_vllm.ops import reference

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
    unit = reference._unit(features)
    for t, i in (got[1] != expected[1]).nonzero().tolist():
        mine, other = int(got[1][t, i]), int(expected[1][t, i])
        if mine < 0 or other < 0:
            assert abs(float(expected[0][t, i]) - threshold) <= NEAR
        else:
            assert unit[t, i] @ unit[t - 1, mine] >= expected[0][t, i] - NEAR
