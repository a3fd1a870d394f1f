# SPDX-License-Identifier: MIT
"""Every stage on the golden vectors: indices exactly, floats at fp32 tolerance."""

import pytest
import torch

from flashvid_vllm import compress, ops
from flashvid_vllm.core.budget import plan
from flashvid_vllm.core.config import FlashVidConfig
from tests.support.cases import GOLDEN, Golden, assert_close, golden

pytestmark = pytest.mark.usefixtures("torch_backend")


@pytest.fixture(params=GOLDEN)
def vector(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def config_of(vector: Golden) -> FlashVidConfig:
    return FlashVidConfig(**{key: value for key, value in vector.params.items() if key != "grid"})


def test_all_files_are_there() -> None:
    assert len(GOLDEN) == 6


def test_segments(vector: Golden) -> None:
    config = config_of(vector)
    frames = vector["features"].mean(1)
    segment_id = ops.segment_frames(frames, config.segment_threshold, config.min_segments)
    assert torch.equal(segment_id, vector.segment_id)


def test_selected(vector: Golden) -> None:
    config = config_of(vector)
    weight = vector["attention"]
    if config.selection == "attention_diversity_event":
        weight = weight * ops.event_relevance(vector["features"], vector.segment_id)
    selected = ops.select_tokens(vector["features"], weight, int(vector["num_selected"]))
    assert torch.equal(selected, vector["selected"])


def test_selected_by_diversity_only(vector: Golden) -> None:
    selected = ops.select_tokens(vector["features"], None, int(vector["num_selected"]))
    assert torch.equal(selected, vector["selected_diversity_only"])


def test_matches(vector: Golden) -> None:
    similarity, parent = ops.match_tokens(
        vector["features"], vector.candidate, vector.segment_id, config_of(vector).merge_threshold
    )
    assert_close(similarity, vector["similarity"])
    assert torch.equal(parent, vector["parent"])


def test_roots(vector: Golden) -> None:
    root = ops.tree_roots(vector["parent"])
    assert torch.equal(root.masked_fill(~vector.candidate, -1), vector["root"])


def test_trees(vector: Golden) -> None:
    index, mean, size = ops.pool_trees(vector["features"], vector["root"], vector.candidate)
    assert torch.equal(index, vector["tree_index"])
    assert torch.equal(size, vector["tree_size"])
    assert_close(mean, vector["tree_mean"])


def test_clusters(vector: Golden) -> None:
    num_clusters = int(vector["dpc_num_clusters"])
    centers, assignment = ops.cluster_tokens(vector["features"][0], num_clusters, min(num_clusters, 7))
    assert torch.equal(centers, vector["dpc_centers"])
    assert torch.equal(assignment, vector["dpc_clusters"])


def test_received_attention(vector: Golden) -> None:
    received = ops.received_attention(vector["query"], vector["key"])
    assert_close(received, vector["received_attention"])


def test_budget_is_exact_where_the_published_code_overshoots(vector: Golden) -> None:
    config = config_of(vector)
    num_frames, n, _ = vector["features"].shape
    budget = plan(num_frames, n, config)
    out = compress(vector["features"], vector["attention"], config)
    assert len(out.tokens) == budget.tokens < int(vector["official_count"])
