# SPDX-License-Identifier: MIT
"""Frames of more tokens than a program holds at a time: what the other tests' small frames never reach.

Tiles are made so small that a few dozen tokens are several blocks in every loop.
"""

from typing import Any

import pytest
import torch

from flashvid_vllm import FlashVidConfig, ops
from flashvid_vllm.ops import forest, guarantee, launch
from tests.ops.interpreted.conftest import FULL
from tests.ops.interpreted.test_pipeline import check
from tests.support.cases import video
from tests.support.exactness import assert_clustered, assert_selected

TRITON: Any = {"backend": "triton"}
TORCH: Any = {"backend": "torch"}
N = 21

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TILES", launch.Tiles(tokens=8, rows=8, columns=8))


@pytest.mark.parametrize("kind", ["letterbox", "nan"] if FULL else ["letterbox"])
def test_choices(kind: str) -> None:
    features, attention = video(kind, 2, N, 40)
    expected = ops.select_tokens(features, attention, 7, **TORCH)
    assert_selected(features, attention, ops.select_tokens(features, attention, 7, **TRITON), expected)
    expected = ops.cluster_tokens(features[1], 5, 7, **TORCH)
    assert_clustered(features[1], 7, ops.cluster_tokens(features[1], 5, 7, **TRITON), expected)


def test_ties_go_to_the_lowest_index_of_the_first_block() -> None:
    axes = torch.eye(8).repeat(1, 3, 1)  # the same 8 tokens in each block
    assert ops.select_tokens(axes, None, 3, **TRITON).tolist() == [[0, 1, 2]]
    centers, assignment = ops.cluster_tokens(axes[0], 8, 5, **TRITON)
    expected = ops.cluster_tokens(axes[0], 8, 5, **TORCH)
    assert torch.equal(centers, expected[0])
    assert torch.equal(assignment, expected[1])
    centers, assignment = ops.cluster_tokens(torch.zeros(12, 3), 10, 7, **TRITON)
    assert centers.tolist() == list(range(10))
    assert assignment.tolist() == [*range(10), 0, 0]


def test_trees() -> None:
    generator = torch.Generator().manual_seed(0)
    parent = torch.randint(-1, N, (4, N), generator=generator)
    parent[0] = -1
    parent[3, :] = torch.tensor([N - 1] * N)  # all members far from the root's block, and one block without any
    root = ops.tree_roots(parent, **TORCH)
    assert torch.equal(ops.tree_roots(parent, **TRITON), root)
    features, member = torch.randn(4, N, 40, generator=generator), torch.ones(4, N, dtype=torch.bool)
    got, expected = (ops.pool_trees(features, root, member, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    assert torch.equal(got[2], expected[2])


def test_only_trees_of_one_token_are_copied() -> None:
    """Whether a tree is alone is told before its mean is taken: nothing is searched for its other members."""
    parent = torch.full((2, N), -1)
    parent[1, [3, 20]] = torch.tensor([N - 1, 2])
    candidate = torch.ones(2, N, dtype=torch.uint8)
    root, linked, slot = torch.empty(2, N, dtype=torch.int64), candidate.clone(), torch.empty(2, N, dtype=torch.int32)
    count, clusters, row_base = (torch.empty(3, dtype=kind) for kind in (torch.int32, torch.int32, torch.int64))
    links = (parent, torch.ones(2, N), candidate, torch.zeros(2, dtype=torch.int64))
    guarantee.guarantee(*links, 0, N, root, linked, count[:2], clusters[:2], row_base)
    slot_token, size = torch.empty(2, N, dtype=torch.int32), torch.empty(2, N, dtype=torch.int32)
    forest.roots(root, candidate, linked, slot, slot_token, size)
    assert count[:2].tolist() == [N, N - 2]
    assert [int(i) for i in (size[0] != 1).nonzero()] == [2, N - 1]
    assert (size[1, : N - 2] == 1).all()


WHOLE: dict[str, dict[str, Any]] = {
    "usual": {"retention_ratio": 0.3, "min_segments": 2},
    "links to drop": {"retention_ratio": 0.6, "alpha": 0.1, "min_segments": 1, "merge_threshold": -1},
    "attention": {
        "retention_ratio": 0.3, "selection": "attention", "matching": "position", "merge_threshold": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE if FULL else ["usual"])
def test_the_whole_pipeline(name: str) -> None:
    check(*video("scene", 3, N, 40), FlashVidConfig(**WHOLE[name]))


def test_equal_links_are_dropped_from_the_last_block() -> None:
    axes = torch.eye(N).repeat(3, 1, 1)
    config = FlashVidConfig(token_budget=2 * N - 3, alpha=0, min_segments=1, segment_threshold=-1)
    check(axes, torch.ones(3, N), config)
