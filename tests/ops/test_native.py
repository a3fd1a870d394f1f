# SPDX-License-Identifier: MIT
"""The native ops on a CPU: the golden vectors, the reference by ALGORITHM.md's exactness rule, and their bits."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashvid_vllm
from flashvid_vllm import CompressedVideo, FlashVidConfig
from flashvid_vllm.core.budget import plan
from flashvid_vllm.ops import native, reference
from tests.core.test_compress import FIELDS, SELECTIONS, assert_sound, configs
from tests.ops.conftest import ISAS
from tests.ops.test_golden import config_of
from tests.ops.test_reference import half_mask, op_inputs, tensors
from tests.support.cases import DTYPES, GOLDEN, SHAPES, VIDEOS, assert_close, golden, video
from tests.support.exactness import assert_clustered, assert_linked, assert_selected

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "built")
KINDS = ("scene", "noise", "letterbox", "static", "zeros", "nan", "infinite")

SETTINGS = ("attention_diversity_event", "tree", 0.8, 0.9, 2)
OPS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "segment_frames": lambda v: native.segment_frames(v["features"][:, 0], 0.5, 3),
    "event_relevance": lambda v: native.event_relevance(v["features"], v["segment_id"]),
    "select_tokens": lambda v: native.select_tokens(v["features"], v["weight"], 6),
    "match_tokens": lambda v: native.match_tokens(v["features"], v["member"], v["segment_id"], 0.5),
    "match_position": lambda v: native.match_tokens(v["features"], v["member"], v["segment_id"], 0.5, "position"),
    "tree_roots": lambda v: native.tree_roots(v["parent"]),
    "pool_trees": lambda v: native.pool_trees(v["features"], v["root"], v["member"]),
    "cluster_tokens": lambda v: native.cluster_tokens(v["features"][1], 5, 7),
    "explain_tokens": lambda v: native.explain_tokens(v["features"], 10, 0.7),
    "received_attention": lambda v: native.received_attention(v["query"], v["key"]),
    "compress": lambda v: native.compress_on_device(v["features"], v["weight"], 3, 5, *SETTINGS),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as what no op writes."""

    def like(beside: Tensor, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else -(2**40), dtype=dtype)

    monkeypatch.setattr(native, "_like", like)


def compress(features: Tensor, attention: Tensor | None, config: FlashVidConfig) -> CompressedVideo:
    budget = plan(features.shape[0], features.shape[1], config)
    return CompressedVideo(
        *native.compress_on_device(
            features,
            attention,
            budget.selected_per_frame,
            budget.merged,
            config.selection,
            config.matching,
            config.merge_threshold,
            config.segment_threshold,
            config.min_segments,
        )
    )


# Golden vectors


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(isa: str, name: str) -> None:
    vector = golden(name)
    config, features, weight = config_of(vector), vector["features"], vector["attention"]
    segment_id = native.segment_frames(features.mean(1), config.segment_threshold, config.min_segments)
    assert torch.equal(segment_id, vector.segment_id)
    if config.selection == "attention_diversity_event":
        weight = weight * native.event_relevance(features, segment_id)
    k = int(vector["num_selected"])
    assert torch.equal(native.select_tokens(features, weight, k), vector["selected"])
    assert torch.equal(native.select_tokens(features, None, k), vector["selected_diversity_only"])
    similarity, parent = native.match_tokens(features, vector.candidate, segment_id, config.merge_threshold)
    assert_close(similarity, vector["similarity"])
    assert torch.equal(parent, vector["parent"])
    assert torch.equal(native.tree_roots(parent).masked_fill(~vector.candidate, -1), vector["root"])
    index, mean, size = native.pool_trees(features, vector["root"], vector.candidate)
    assert torch.equal(index, vector["tree_index"])
    assert torch.equal(size, vector["tree_size"])
    assert_close(mean, vector["tree_mean"])
    num_clusters = int(vector["dpc_num_clusters"])
    centers, assignment = native.cluster_tokens(features[0], num_clusters, min(num_clusters, 7))
    assert torch.equal(centers, vector["dpc_centers"])
    assert torch.equal(assignment, vector["dpc_clusters"])
    assert_close(native.received_attention(vector["query"], vector["key"]), vector["received_attention"])

    got = compress(features, vector["attention"], config)
    expected = flashvid_vllm.compress(features, vector["attention"], FlashVidConfig(**_torch(config)))
    for field in FIELDS[1:]:
        assert torch.equal(getattr(got, field), getattr(expected, field))
    assert_close(got.tokens, expected.tokens)


def _torch(config: FlashVidConfig) -> dict[str, Any]:
    return config.to_dict() | {"backend": "torch"}


# Op by op against the reference


def check_ops(features: Tensor, attention: Tensor, candidate: Tensor, k: int, threshold: float) -> None:
    num_frames, n, _ = features.shape
    segment_id = torch.arange(num_frames) // 3
    frames = features[:, 0]
    assert torch.equal(native.segment_frames(frames, 0.5, 2), reference.segment_frames(frames, 0.5, 2))
    got = native.event_relevance(features, segment_id)
    torch.testing.assert_close(
        got, reference.event_relevance(features, segment_id), rtol=1e-4, atol=1e-4, equal_nan=True
    )
    for weight in (None, attention):
        expected = reference.select_tokens(features, weight, k)
        assert_selected(features, weight, native.select_tokens(features, weight, k), expected)
    for matching in ("tree", "position"):
        arguments = (features, candidate, segment_id, threshold, matching)
        assert_linked(features, threshold, native.match_tokens(*arguments), reference.match_tokens(*arguments))
    parent = reference.match_tokens(features, candidate, segment_id, threshold)[1]
    root = native.tree_roots(parent)
    assert torch.equal(root, reference.tree_roots(parent))
    pooled, means = native.pool_trees(features, root, candidate), reference.pool_trees(features, root, candidate)
    assert torch.equal(pooled[0], means[0])
    assert torch.equal(pooled[2], means[2])
    torch.testing.assert_close(pooled[1], means[1], rtol=1e-5, atol=1e-5, equal_nan=True)
    for num_clusters in {1, (n + 1) // 2, n}:
        last, k = features[-1], min(7, n)
        clustered = [op.cluster_tokens(last, num_clusters, k) for op in (native, reference)]
        assert_clustered(last, k, *clustered)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ops(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    every_kind = isa in (ISAS[0], ISAS[-1]) or os.environ.get("FLASHVID_TESTS") == "full"
    for kind in KINDS if every_kind else ("scene", "nan"):
        features, attention = video(kind, *shape, dtype)
        check_ops(features, attention, half_mask(*shape[:2]), max(1, shape[1] // 3), 0.8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_beyond_a_block(isa: str, dtype: torch.dtype) -> None:
    """More channels than are multiplied at a time, and more rows."""
    features, attention = video("noise", 3, 101, 1100, dtype)
    check_ops(features, attention, half_mask(3, 101), 12, 0.01)
    for n, k in ((300, 7), (300, 17), (600, 7)):
        x = video("scene", 1, n, 96, dtype)[0][0]
        assert_clustered(x, k, native.cluster_tokens(x, 40, k), reference.cluster_tokens(x, 40, k))


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e-3, 1e3, 1e12, 1e25])
def test_features_of_any_scale(isa: str, scale: float) -> None:
    features, attention = video("scene", 2, 33, 40)
    exact = reference.select_tokens(features, attention, 9)
    for dtype in (torch.float32, torch.bfloat16):
        scaled = (features * scale).to(dtype)
        expected = exact if scale in (1e-12, 1e12) else reference.select_tokens(scaled, attention, 9)
        if dtype == torch.float32 or scale not in (1e-12, 1e12):
            assert_selected(scaled, attention, native.select_tokens(scaled, attention, 9), expected)


@pytest.mark.parametrize("n", [1, 7, 63, 65, 200])
@pytest.mark.parametrize("d", [65, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_received_attention(isa: str, n: int, d: int, dtype: torch.dtype) -> None:
    query, key = (3 * torch.randn(2, 2, 3, n, d, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert_close(native.received_attention(query, key), reference.received_attention(query, key))
    by_token = query.transpose(1, 2).contiguous().transpose(1, 2)  # as an encoder has it: [T, N, H, d]
    assert torch.equal(native.received_attention(by_token, key), native.received_attention(query, key))


def test_received_attention_of_bad_values_is_bad(isa: str) -> None:
    query, key = torch.ones(2, 2, 2, 9, 8)
    query[1, 0, 3, 2] = torch.nan
    received = native.received_attention(query, key)
    assert received[0].isfinite().all()
    assert received[1].isnan().all()


def test_ties_go_to_the_lowest_index(isa: str) -> None:
    axes = torch.eye(4).repeat(2, 20, 1)
    everyone, one_segment = torch.ones(2, 80).bool(), torch.zeros(2, dtype=torch.int64)
    for dtype in DTYPES:
        x = axes.to(dtype)
        assert native.select_tokens(x, None, 3).tolist() == [[0, 1, 2]] * 2
        assert native.match_tokens(x, everyone, one_segment, 0.8)[1][1].tolist() == [0, 1, 2, 3] * 20
        assert native.cluster_tokens(x[0], 4, 7)[1].tolist() == [0, 1, 2, 3] * 20
    assert native.segment_frames(torch.eye(5), -1.0, 3).tolist() == [0, 1, 2, 2, 2]


def test_roots_of_the_deepest_trees() -> None:
    parent = torch.zeros(500, 3, dtype=torch.int64)
    assert native.tree_roots(parent)[1:].eq(0).all()  # parents of the first frame do not count
    with pytest.raises(ValueError, match="parent must be below N=3, got 3"):
        native.tree_roots(torch.full((2, 3), 3))
    with pytest.raises(ValueError, match=r"root must be from 0 to T\*N-1=5, got 6"):
        native.pool_trees(torch.ones(2, 3, 4), torch.full((2, 3), 6), torch.ones(2, 3).bool())


def test_pool_trees_without_members() -> None:
    empty = native.pool_trees(torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3).bool())
    assert [tuple(x.shape) for x in empty] == [(0,), (0, 4), (0,)]


def test_groups_for_cuda() -> None:
    """What the CUDA kernel is told to add up, added up here."""
    features = video("scene", 4, 33, 5)[0].flatten(0, 1)
    root, member = torch.arange(132).view(4, 33) // 5 * 5, half_mask(4, 33)
    index, size, first, members = native._groups(root, member)
    expected = reference.pool_trees(features.view(4, 33, 5), root, member)
    assert torch.equal(index, expected[0])
    assert torch.equal(size, expected[2])
    groups = [members[i:j] for i, j in itertools.pairwise(first.tolist())]
    assert all(group.diff().gt(0).all() for group in groups)
    assert_close(torch.stack([features[group].mean(0) for group in groups]), expected[1])


# Hypothesis: shapes, strides, masks


def layouts(x: Tensor, layout: int) -> Tensor:
    """The same values in memory in another order, between others, or behind an offset."""
    if layout == 1:
        return torch.stack([x, x], dim=-1)[..., 1]
    if layout == 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 3:
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    return x


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 70)),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.sampled_from(ISAS or [""]),
    st.integers(0, 3),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_any_shape_layout_and_mask(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype, isa: str, layout: int, share: float, seed: int
) -> None:
    native.use_isa(isa)
    features, attention = video(kind, *shape, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    candidate = torch.rand(shape[:2], generator=generator) < share
    k = int(torch.randint(0, shape[1] + 1, (), generator=generator))
    segment_id = torch.arange(shape[0]) // 2
    plain = (features, attention, candidate)
    other = tuple(layouts(x, layout) for x in plain)
    calls: list[Callable[..., Any]] = [
        lambda x, w, c: native.select_tokens(x, w, k),
        lambda x, w, c: native.match_tokens(x, c, segment_id, 0.5),
        lambda x, w, c: native.pool_trees(x, torch.arange(c.numel()).view(c.shape) // 2, c),
        lambda x, w, c: native.cluster_tokens(x[0], 1 + k // 2 if k else 1, 1),
        lambda x, w, c: native.event_relevance(x, segment_id),
    ]
    for call in calls:
        for one, two in zip(tensors(call(*plain)), tensors(call(*other)), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    expected = reference.select_tokens(features, attention, k)
    assert_selected(features, attention, native.select_tokens(features, attention, k), expected)
    linked = [op.match_tokens(features, candidate, segment_id, 0.5) for op in (native, reference)]
    assert_linked(features, 0.5, *linked)
    native.use_isa("")


# The whole algorithm


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 6),
    st.integers(1, 20),
    configs,
    st.sampled_from(DTYPES),
    st.sampled_from(VIDEOS),
    st.sampled_from(ISAS or [""]),
    st.integers(0, 99),
)
def test_exactly_the_budget(
    num_frames: int, n: int, config: FlashVidConfig, dtype: torch.dtype, kind: str, isa: str, seed: int
) -> None:
    native.use_isa(isa)
    features, attention = video(kind, num_frames, n, 9, dtype, seed)
    if not plan(num_frames, n, config).is_identity:
        assert_sound(compress(features, attention, config), features, config)
    native.use_isa("")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 6), st.integers(2, 40), configs, st.sampled_from(["scene", "noise"]), st.integers(0, 99))
def test_as_the_reference(num_frames: int, n: int, config: FlashVidConfig, kind: str, seed: int) -> None:
    features, attention = video(kind, num_frames, n, 48, torch.bfloat16, seed=seed)
    if plan(num_frames, n, config).is_identity:
        return
    got = compress(features, attention, config)
    expected = flashvid_vllm.compress(features, attention, FlashVidConfig(**_torch(config)))
    assert torch.equal(got.assignment, expected.assignment)
    assert torch.equal(got.source_index, expected.source_index)
    assert torch.equal(got.size, expected.size)
    # the same sums in the same order, rounded once
    torch.testing.assert_close(got.tokens, expected.tokens, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("matching", ["tree", "position"])
def test_settings(isa: str, selection: Any, matching: Any) -> None:
    features, attention = video("scene", 6, 50, 128, torch.bfloat16)
    for alpha, size in itertools.product((0, 0.5, 1), ({"retention_ratio": 0.2}, {"token_budget": 3})):
        config = FlashVidConfig(alpha=alpha, selection=selection, matching=matching, min_segments=2, **size)  # type: ignore[arg-type]
        got = compress(features, attention if config.needs_attention else None, config)
        expected = flashvid_vllm.compress(features, attention, FlashVidConfig(**_torch(config)))
        assert torch.equal(got.assignment, expected.assignment)
        torch.testing.assert_close(got.tokens, expected.tokens, rtol=2**-7, atol=1e-5)


# Bits


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(isa: str, op: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for num_frames, n, d in ((2, 7, 33), (5, 65, 257)):
            inputs = op_inputs(dtype, num_frames, n, d)
            results = []
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                results.append(tensors(OPS[op](inputs)))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_any_strides(op: str) -> None:
    inputs = op_inputs(torch.bfloat16)
    expected = tensors(OPS[op](inputs))
    for layout in (1, 2, 3):
        moved = {name: layouts(x, layout) for name, x in inputs.items()}
        assert all(torch.equal(a, b) for a, b in zip(tensors(OPS[op](moved)), expected, strict=True))
    expanded = {name: x[:1].expand_as(x) for name, x in inputs.items() if name != "parent"}
    expanded["parent"] = inputs["parent"]
    plain = {name: x.contiguous() for name, x in expanded.items()}
    assert all(torch.equal(a, b) for a, b in zip(tensors(OPS[op](expanded)), tensors(OPS[op](plain)), strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_not_modified(op: str, dtype: torch.dtype) -> None:
    inputs = op_inputs(dtype)
    kept = {name: x.clone() for name, x in inputs.items()}
    OPS[op]({name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()})
    assert all(torch.equal(inputs[name], kept[name]) for name in inputs)


def test_half_precision_is_read_exactly(isa: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype).view(1, 1, -1)
        mean = native.pool_trees(values, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool())[1]
        torch.testing.assert_close(mean[0], values.flatten().float(), rtol=0, atol=0, equal_nan=True)


def test_means_are_rounded_as_torch_does(isa: str) -> None:
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)) * s for s in (1e-8, 1e-5, 1, 1e4)])
    x = torch.cat([x, torch.tensor([0.0, 65519.0, 65519.9, 65504.0, 1e-7, 6e-8])])
    for dtype in (torch.float16, torch.bfloat16):
        pair = torch.stack([x.to(dtype), x.flip(0).to(dtype)]).view(2, 1, -1)
        config = FlashVidConfig(
            token_budget=1, alpha=0, min_segments=1, merge_threshold=-1, segment_threshold=-1, matching="position"
        )
        out = compress(pair, torch.ones(2, 1), config)
        assert out.size.tolist() == [2]
        assert torch.equal(out.tokens[0], pair.float().sum(0).div(2).to(dtype)[0])


# What is refused

X = torch.ones(2, 3, 4)
MASK, INDEX, IDS = torch.ones(2, 3).bool(), torch.zeros(2, 3).long(), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.segment_frames(X, 0.9, 8), r"frames must have shape \[T, D\].*got \[2, 3, 4\]"),
        (lambda: native.segment_frames(X[0].to("meta"), 0.9, 8), "frames must be on cpu .*got meta"),
        (lambda: native.event_relevance(X, IDS[:1]), r"segment_id must have shape \[T=2\]"),
        (lambda: native.select_tokens(X.double(), None, 1), "features must be .* got torch.float64"),
        (lambda: native.select_tokens(X, X[:, :2, 0], 1), r"weight must have shape \[T=2, N=3\]"),
        (lambda: native.select_tokens(X, None, 4), "k must be between 0 and N=3, got 4"),
        (lambda: native.match_tokens(X, MASK.int(), IDS, 0.8), "candidate must be torch.bool"),
        (lambda: native.match_tokens(X, MASK, IDS.int(), 0.8), "segment_id must be torch.int64"),
        (lambda: native.tree_roots(INDEX.to("meta")), "parent must be on cpu .*got meta"),
        (lambda: native.tree_roots(INDEX.float()), "parent must be torch.int64"),
        (lambda: native.pool_trees(X, INDEX[:1], MASK), r"root must have shape \[T=2, N=3\]"),
        (lambda: native.cluster_tokens(X[0], 4, 1), "num_clusters must be between 1 and n=3, got 4"),
        (lambda: native.cluster_tokens(X[0], 1, 7), "k must be between 1 and n=3, got 7"),
        (lambda: native.received_attention(X[None], X[None].half()), "key must be torch.float32"),
        (lambda: native.compress_on_device(X, MASK, 1, 1, *SETTINGS), "attention must be .* got torch.bool"),
        (lambda: native.compress_on_device(X, None, 1, 1, *SETTINGS), "needs attention"),
        (lambda: native.compress_on_device(X, X[..., 0], 4, 0, *SETTINGS), "selected must be between 0 and N=3"),
        (lambda: native.compress_on_device(X, X[..., 0], 1, 5, *SETTINGS), r"merged must be .* T\*\(N-K\)=4, got 5"),
        (lambda: native.use_isa("mmx"), r"FLASHVID_CPU_ISA must be one that this machine runs \(plain.*got 'mmx'"),
    ],
)
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("name", "code"), [("plain", 0), ("mmx", 1)])
def test_the_environment_names_the_instruction_set(name: str, code: int) -> None:
    command = "from flashvid_vllm.ops import native; print(native.isa())"
    environment = os.environ | {"FLASHVID_CPU_ISA": name}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert "ValueError: FLASHVID_CPU_ISA must be" in done.stderr if code else done.stdout.strip() == name
