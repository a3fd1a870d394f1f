# SPDX-License-Identifier: MIT
"""Every Triton op against the torch reference, on the reference's own inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashvid_vllm import ops
from flashvid_vllm.ops import reference
from tests.ops.interpreted.conftest import FULL, sampled
from tests.ops.test_golden import config_of
from tests.ops.test_reference import OPS, half_mask, op_inputs, same
from tests.support.cases import DTYPES, GOLDEN, Golden, assert_close, golden, video
from tests.support.exactness import assert_clustered, assert_explained, assert_linked, assert_selected

TRITON: Any = {"backend": "triton"}
# T, N, D: one frame, one token, and sizes beside the powers of two that kernels tile by
SHAPES = [(1, 1, 40), (2, 7, 130), (2, 63, 72), (5, 65, 40), (2, 196, 40)]
SHAPES += [(5, 7, 72), (1, 65, 130), (1, 196, 130)] if FULL else []


def ids_of(num_frames: int) -> Tensor:
    return (torch.arange(num_frames) + 1) // 3  # 0 0 1 1 1 2 2 2


# Shapes and dtypes; every workspace and output is poisoned first.


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "kind", "dtype"), sampled(SHAPES, ["scene", "static", "zeros", "nan"], DTYPES))
def test_segment_frames(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    frames = video(kind, *shape)[0].mean(1).to(dtype)
    for min_segments in (1, 3, 9):
        expected = ops.segment_frames(frames, 0.8, min_segments, backend="torch")
        assert torch.equal(ops.segment_frames(frames, 0.8, min_segments, **TRITON), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), sampled(SHAPES, DTYPES))
def test_event_relevance(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    features, segment_id = video("scene", *shape, dtype)[0], ids_of(shape[0])
    expected = ops.event_relevance(features, segment_id, backend="torch")
    assert_close(ops.event_relevance(features, segment_id, **TRITON), expected)  # sums of D products in fp32


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "kind", "dtype"), sampled(SHAPES, ["scene", "letterbox", "nan"], DTYPES))
def test_select_tokens(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    features, attention = video(kind, *shape, dtype)
    for k, weight in ((max(1, shape[1] // 6), attention.to(dtype)), (min(3, shape[1]), None), (0, None)):
        expected = ops.select_tokens(features, weight, k, backend="torch")
        assert_selected(features, weight, ops.select_tokens(features, weight, k, **TRITON), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "matching", "dtype"), sampled(SHAPES, ["tree", "position"], DTYPES))
def test_match_tokens(shape: tuple[int, int, int], matching: str, dtype: torch.dtype) -> None:
    segment_id = ids_of(shape[0])
    for kind in ("scene", "nan"):
        features, candidate = video(kind, *shape, dtype)[0], half_mask(*shape[:2])
        expected = ops.match_tokens(features, candidate, segment_id, 0.5, matching, backend="torch")
        got = ops.match_tokens(features, candidate, segment_id, 0.5, matching, **TRITON)
        assert_linked(features, 0.5, got, expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "kind", "dtype"), sampled(SHAPES, ["scene", "letterbox", "nan"], DTYPES))
def test_explain_tokens(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    features = video(kind, *shape, dtype)[0]
    for tokens, still in ((-(-shape[0] * shape[1] // 4), 0.7), (1, 0.0)):
        expected = ops.explain_tokens(features, tokens, still, backend="torch")
        assert_explained(features, tokens, still, ops.explain_tokens(features, tokens, still, **TRITON), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tree_roots(shape: tuple[int, int, int]) -> None:
    parent = torch.randint(-1, shape[1], shape[:2], generator=torch.Generator().manual_seed(0))
    parent[0] = -1
    assert torch.equal(ops.tree_roots(parent, **TRITON), ops.tree_roots(parent, backend="torch"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), sampled(SHAPES, DTYPES))
def test_pool_trees(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    features = video("noise", *shape, dtype)[0]
    parent = torch.randint(-1, shape[1], shape[:2], generator=torch.Generator().manual_seed(1))
    parent[0] = -1
    root = reference.tree_roots(parent)
    for member in (half_mask(*shape[:2]), torch.zeros(shape[:2], dtype=torch.bool)):
        got, expected = (ops.pool_trees(features, root, member, backend=b) for b in ("triton", "torch"))
        assert torch.equal(got[0], expected[0])
        assert_close(got[1], expected[1])
        assert torch.equal(got[2], expected[2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("n", "kind", "d", "dtype"), sampled([1, 7, 63, 65], ["noise", "letterbox", "zeros"], [40, 72, 130], DTYPES)
)
def test_cluster_tokens(n: int, d: int, kind: str, dtype: torch.dtype) -> None:
    x = video(kind, 1, n, d, dtype)[0][0]
    for num_clusters, k in {(1, min(7, n)), ((n + 1) // 2, min(7, n)), (n, 1)}:
        expected = ops.cluster_tokens(x, num_clusters, k, backend="torch")
        assert_clustered(x, k, ops.cluster_tokens(x, num_clusters, k, **TRITON), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("n", "channels", "dtype"), sampled([1, 7, 63, 65, 196], [40, 72, 130], DTYPES))
def test_received_attention(n: int, channels: int, dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 2, 3, n, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = ops.received_attention(query, key, backend="torch")
    assert_close(ops.received_attention(query, key, **TRITON), expected)


# Golden vectors: indices are equal.


@pytest.fixture(params=GOLDEN)
def vector(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.mark.skipif(not FULL, reason="make test-full")
def test_golden_vectors(vector: Golden) -> None:
    config, features, k = config_of(vector), vector["features"], int(vector["num_selected"])
    segment_id = ops.segment_frames(features.mean(1), config.segment_threshold, config.min_segments, **TRITON)
    assert torch.equal(segment_id, vector.segment_id)
    weight = vector["attention"]
    if config.selection == "attention_diversity_event":
        weight = weight * ops.event_relevance(features, segment_id, **TRITON)
    assert torch.equal(ops.select_tokens(features, weight, k, **TRITON), vector["selected"])
    assert torch.equal(ops.select_tokens(features, None, k, **TRITON), vector["selected_diversity_only"])
    similarity, parent = ops.match_tokens(features, vector.candidate, segment_id, config.merge_threshold, **TRITON)
    assert_close(similarity, vector["similarity"])
    assert torch.equal(parent, vector["parent"])
    root = ops.tree_roots(parent, **TRITON)
    assert torch.equal(root.masked_fill(~vector.candidate, -1), vector["root"])
    index, mean, size = ops.pool_trees(features, vector["root"], vector.candidate, **TRITON)
    assert torch.equal(index, vector["tree_index"])
    assert torch.equal(size, vector["tree_size"])
    assert_close(mean, vector["tree_mean"])
    num_clusters = int(vector["dpc_num_clusters"])
    centers, assignment = ops.cluster_tokens(features[0], num_clusters, min(num_clusters, 7), **TRITON)
    assert torch.equal(centers, vector["dpc_centers"])
    assert torch.equal(assignment, vector["dpc_clusters"])
    received = ops.received_attention(vector["query"], vector["key"], **TRITON)
    assert_close(received, vector["received_attention"])


# Ties, masks, bad values, layouts


def test_ties_go_to_the_lowest_index() -> None:
    axes = torch.eye(4).repeat(2, 2, 1)
    everyone, one_segment = torch.ones(2, 8).bool(), torch.zeros(2, dtype=torch.int64)
    assert ops.select_tokens(axes, None, 3, **TRITON).tolist() == [[0, 1, 2]] * 2
    assert ops.match_tokens(axes, everyone, one_segment, 0.8, **TRITON)[1][1].tolist() == [0, 1, 2, 3] * 2
    assert ops.cluster_tokens(axes[0], 4, 7, **TRITON)[1].tolist() == [0, 1, 2, 3] * 2
    assert ops.segment_frames(torch.eye(5), -1.0, 3, **TRITON).tolist() == [0, 1, 2, 2, 2]
    x = torch.zeros(5, 3)
    assert [r.tolist() for r in ops.cluster_tokens(x, 3, 5, **TRITON)] == [[0, 1, 2], [0, 1, 2, 0, 0]]


def test_ties_between_tiles_go_to_the_lowest_index() -> None:
    frame = torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(0)).repeat(2, 196, 1)
    everyone, one_segment = torch.ones(2, 196).bool(), torch.zeros(2, dtype=torch.int64)
    assert (ops.match_tokens(frame, everyone, one_segment, 0.8, **TRITON)[1][1] == 0).all()
    assert ops.select_tokens(frame, None, 3, **TRITON).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("matching", ["tree", "position"])
def test_masks_that_leave_no_candidate(matching: str) -> None:
    features = video("static", 3, 7, 40)[0]
    candidate = torch.ones(3, 7).bool()
    candidate[1] = False
    for mask in (candidate, torch.zeros(3, 7).bool()):
        similarity, parent = ops.match_tokens(features, mask, torch.zeros(3).long(), -1.0, matching, **TRITON)
        assert (similarity == -1).all()
        assert (parent == -1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_disturbs_no_other(value: float) -> None:
    bad, attention = video("noise", 3, 12, 40)
    bad[:, 5, 3] = value
    given = {"features": bad, "weight": attention, "member": torch.ones(3, 12).bool()}
    for backend in ("triton",):
        index = ops.select_tokens(bad, attention, 6, backend=backend)
        assert torch.equal(index, ops.select_tokens(bad, attention, 6, backend="torch"))
    one_segment = torch.zeros(3, dtype=torch.int64)
    got = ops.match_tokens(bad, given["member"], one_segment, -1.0, **TRITON)
    assert_linked(bad, -1.0, got, ops.match_tokens(bad, given["member"], one_segment, -1.0, backend="torch"))
    for k in (1, 7):
        assert same(ops.cluster_tokens(bad[0], 4, k, **TRITON), ops.cluster_tokens(bad[0], 4, k, backend="torch"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_but_bad_values(value: float) -> None:
    features = torch.full((2, 9, 4), value)
    assert ops.select_tokens(features, None, 4, **TRITON).tolist() == [[0, 1, 2, 3]] * 2
    assert ops.segment_frames(features.mean(1), -1.0, 1, **TRITON).tolist() == [0, 1]
    assert ops.cluster_tokens(features[0], 3, 7, **TRITON)[0].tolist() == [0, 1, 2]


def test_bad_weights_come_last() -> None:
    features, attention = video("noise", 1, 6, 8)
    attention[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    assert ops.select_tokens(features, attention, 4, **TRITON).tolist() == [[0, 1, 4, 5]]


@pytest.fixture(params=sorted(OPS))
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ops, "choose_backend", lambda _requested, _device: "triton")
    return OPS[request.param]


def test_any_strides(op: Any) -> None:
    given = op_inputs(torch.float32, 3, 33, 72)
    expected = op(given)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in given.items()}
    backwards = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in given.items()}
    for layout in (strided, backwards):
        assert same(op(layout), expected)
    first = {name: t[:1].expand_as(t) for name, t in given.items() if name != "parent"}
    first["parent"] = given["parent"]
    assert same(op(first), op({name: t.contiguous() for name, t in first.items()}))


def test_inputs_are_not_modified(op: Any) -> None:
    given = op_inputs(torch.bfloat16, 3, 33, 72)
    kept = {name: tensor.clone() for name, tensor in given.items()}
    one = op(given)
    assert all(torch.equal(given[name], kept[name]) for name in given)
    assert same(op(given), one)  # and a second run changes no bit
