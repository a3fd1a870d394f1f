# SPDX-License-Identifier: MIT
"""The reference ops against brute force in plain Python, on awkward shapes and values."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvid_vllm import ops
from tests.support.cases import DTYPES, SHAPES, VIDEOS, assert_close, video

pytestmark = pytest.mark.usefixtures("torch_backend")

Vector = list[float]
WORKSPACE = "flashvid_vllm.ops.reference.WORKSPACE_BYTES"


def cosine(u: Vector, v: Vector) -> float:
    lengths = math.sqrt(sum(a * a for a in u)) * math.sqrt(sum(b * b for b in v))
    return sum(a * b for a, b in zip(u, v, strict=True)) / lengths if lengths else 0.0


def first_argmax(values: dict[int, float]) -> int:
    return min(values, key=lambda i: (-values[i], i))


def slow_segments(frames: list[Vector], threshold: float, min_segments: int) -> list[int]:
    similarity = [cosine(u, v) for u, v in itertools.pairwise(frames)]
    num_cuts = max(sum(s < threshold for s in similarity), min(min_segments - 1, len(frames) - 1))
    cuts = sorted(range(len(similarity)), key=lambda i: (similarity[i], i))[:num_cuts]
    return [sum(cut < t for cut in cuts) for t in range(len(frames))]


def slow_relevance(features: list[list[Vector]], segment_id: list[int]) -> list[Vector]:
    means = [[sum(column) / len(frame) for column in zip(*frame, strict=True)] for frame in features]
    out = []
    for t, frame in enumerate(features):
        events = [mean for s, mean in zip(segment_id, means, strict=True) if s == segment_id[t]]
        products = [[sum(a * b for a, b in zip(x, e, strict=True)) for e in events] for x in frame]
        out.append([max(0.0, sum(row) / len(row)) for row in products])
    return out


def slow_select(frame: list[Vector], weight: Vector, k: int) -> list[int]:
    n = len(frame)
    distance = [[1 - cosine(u, v) for v in frame] for u in frame]
    distance = [[0.0 if d < 1e-5 else d for d in row] for row in distance]
    picked: list[int] = []
    for _ in range(k):
        others = {j: picked or [i for i in range(n) if i != j] for j in range(n) if j not in picked}
        score = {j: weight[j] * min((distance[i][j] for i in near), default=0) for j, near in others.items()}
        picked.append(first_argmax(score))
    return sorted(picked)


def slow_match(
    features: list[list[Vector]],
    candidate: list[list[bool]],
    segment_id: list[int],
    threshold: float,
    matching: str,
) -> tuple[list[Vector], list[list[int]]]:
    shape = range(len(features)), range(len(features[0]))
    similarity, parent = (
        [[-1.0 for _ in shape[1]] for _ in shape[0]],
        [[-1 for _ in shape[1]] for _ in shape[0]],
    )
    for t in shape[0][1:]:
        for i in shape[1]:
            previous = {
                j: cosine(features[t][i], features[t - 1][j])
                for j in (shape[1] if matching == "tree" else [i])
                if candidate[t - 1][j]
            }
            if candidate[t][i] and previous and segment_id[t] == segment_id[t - 1]:
                best = first_argmax(previous)
                similarity[t][i] = previous[best]
                parent[t][i] = best if previous[best] > threshold else -1
    return similarity, parent


def slow_root(parent: list[list[int]], t: int, i: int) -> int:
    return t * len(parent[0]) + i if parent[t][i] < 0 else slow_root(parent, t - 1, parent[t][i])


def slow_cluster(x: list[Vector], num_clusters: int, k: int) -> tuple[list[int], list[int]]:
    n = range(len(x))
    distance = [[math.dist(u, v) / math.sqrt(len(u)) for v in x] for u in x]
    sparsity = [sum(sorted(d * d for d in row)[:k]) / k for row in distance]
    score = {}
    for i in n:
        denser = [j for j in n if (sparsity[j], j) < (sparsity[i], i)]
        delta = min(distance[i][j] for j in denser) if denser else max(map(max, distance))
        score[i] = (math.log(delta) if delta else -math.inf) - sparsity[i]
    centers = sorted(n, key=lambda i: (-score[i], i))[:num_clusters]
    nearest = [i if i in centers else min(centers, key=lambda c: (distance[i][c], c)) for i in n]
    return centers, [centers.index(c) for c in nearest]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


def half_mask(num_frames: int, n: int) -> Tensor:
    return torch.arange(num_frames * n).view(num_frames, n) % 2 == 0


# Each op against brute force


@pytest.mark.parametrize("kind", ["scene", "noise", "static", "zeros"])
@pytest.mark.parametrize("min_segments", [1, 3, 9])
def test_segment_frames(shape: tuple[int, int, int], kind: str, min_segments: int) -> None:
    frames = video(kind, *shape)[0].mean(1)
    assert ops.segment_frames(frames, 0.9, min_segments).tolist() == slow_segments(frames.tolist(), 0.9, min_segments)


def test_event_relevance(shape: tuple[int, int, int]) -> None:
    features, _ = video("scene", *shape)
    segment_id = torch.arange(shape[0]) // 2
    relevance = ops.event_relevance(features, segment_id)
    expected = torch.tensor(slow_relevance(features.tolist(), segment_id.tolist()))
    assert_close(relevance, expected)


@pytest.mark.parametrize("kind", ["scene", "noise", "letterbox", "zeros"])
@pytest.mark.parametrize("weighted", [True, False])
def test_select_tokens(shape: tuple[int, int, int], kind: str, weighted: bool) -> None:
    features, attention = video(kind, *shape)
    for k in {0, 1, shape[1] // 3, shape[1]}:
        index = ops.select_tokens(features, attention if weighted else None, k)
        weights = (attention if weighted else torch.ones_like(attention)).tolist()
        assert index.shape == (shape[0], k)
        for t, frame in enumerate(features.tolist()):
            assert index[t].tolist() == slow_select(frame, weights[t], k)


@pytest.mark.parametrize("kind", ["scene", "noise", "zeros"])
@pytest.mark.parametrize("matching", ["tree", "position"])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.8])
def test_match_tokens(shape: tuple[int, int, int], kind: str, matching: str, threshold: float) -> None:
    features, _ = video(kind, *shape)
    candidate = half_mask(*shape[:2])
    segment_id = torch.arange(shape[0]) // 3
    similarity, parent = ops.match_tokens(features, candidate, segment_id, threshold, matching)
    slow = slow_match(features.tolist(), candidate.tolist(), segment_id.tolist(), threshold, matching)
    assert_close(similarity, torch.tensor(slow[0]))
    assert parent.tolist() == slow[1]


@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_of_frames_change_nothing(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    features, attention = video("scene", 5, 63, 65)
    candidate, segment_id = half_mask(5, 63), torch.zeros(5, dtype=torch.int64)

    def run() -> tuple[Tensor, ...]:
        return (
            ops.select_tokens(features, attention, 9),
            *ops.match_tokens(features, candidate, segment_id, 0.5),
            ops.pool_trees(features, torch.zeros(5, 63, dtype=torch.int64), candidate)[1],
        )

    whole = run()
    monkeypatch.setattr(WORKSPACE, blocks * 4 * 63 * (63 + 65))
    for got, expected in zip(run(), whole, strict=True):
        assert_close(got, expected)


def test_tree_roots(shape: tuple[int, int, int]) -> None:
    num_frames, n, _ = shape
    parent = torch.randint(-1, n, (num_frames, n), generator=torch.Generator().manual_seed(0))
    parent[0] = -1
    expected = [[slow_root(parent.tolist(), t, i) for i in range(n)] for t in range(num_frames)]
    assert ops.tree_roots(parent).tolist() == expected


def test_pool_trees(shape: tuple[int, int, int]) -> None:
    features, _ = video("noise", *shape)
    root = torch.arange(shape[0] * shape[1]).view(shape[:2]) // 3 * 3
    member = half_mask(*shape[:2])
    index, mean, size = ops.pool_trees(features, root, member)
    groups: dict[int, list[int]] = {}
    for token in member.flatten().nonzero().flatten().tolist():
        groups.setdefault(token // 3 * 3, []).append(token)
    flat = features.flatten(0, 1)
    assert index.tolist() == sorted(groups)
    assert size.tolist() == [len(groups[i]) for i in sorted(groups)]
    expected = [flat[groups[i]].double().mean(0) for i in sorted(groups)]
    assert_close(mean, torch.stack(expected).float())


def test_pool_trees_without_members() -> None:
    empty = ops.pool_trees(torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3).bool())
    assert [tuple(x.shape) for x in empty] == [(0,), (0, 4), (0,)]


def test_a_tree_of_one_token_is_that_token() -> None:
    features, _ = video("noise", 2, 7, 33)
    _, mean, _ = ops.pool_trees(features, torch.arange(14).view(2, 7), torch.ones(2, 7).bool())
    assert torch.equal(mean, features.flatten(0, 1))


@pytest.mark.parametrize("n", [1, 2, 7, 63, 65])
@pytest.mark.parametrize("kind", ["noise", "letterbox", "zeros"])
def test_cluster_tokens(n: int, kind: str) -> None:
    x = video(kind, 1, n, 33)[0][0]
    for num_clusters in {1, (n + 1) // 2, n}:
        for k in {1, min(7, n)}:
            centers, assignment = ops.cluster_tokens(x, num_clusters, k)
            assert (centers.tolist(), assignment.tolist()) == slow_cluster(x.tolist(), num_clusters, k)


def test_density_of_large_features_does_not_underflow() -> None:
    x = 1e3 * video("noise", 1, 20, 16)[0][0]  # exp(-m) would be 0 for all
    centers, assignment = ops.cluster_tokens(x, 5, 7)
    assert (centers.tolist(), assignment.tolist()) == slow_cluster(x.tolist(), 5, 7)


@pytest.mark.parametrize("n", [1, 7, 63, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_received_attention(monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 2, 3, n, 65, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = query.double() @ key.double().transpose(2, 3) / math.sqrt(65)
    expected = logits.softmax(-1).mean((1, 2)).float()
    assert_close(ops.received_attention(query, key), expected)
    monkeypatch.setattr(WORKSPACE, 3 * 4 * 3 * n * 5)  # five queries at a time
    assert_close(ops.received_attention(query, key), expected)


# Ties and flat regions


def test_ties_go_to_the_lowest_index() -> None:
    axes = torch.eye(4).repeat(2, 2, 1)  # tokens 0..3 and again 4..7, orthogonal to each other
    everyone, one_segment = torch.ones(2, 8).bool(), torch.zeros(2, dtype=torch.int64)
    assert ops.select_tokens(axes, None, 3).tolist() == [[0, 1, 2]] * 2
    assert ops.match_tokens(axes, everyone, one_segment, 0.8)[1][1].tolist() == [0, 1, 2, 3] * 2
    assert ops.cluster_tokens(axes[0], 4, 7)[1].tolist() == [0, 1, 2, 3] * 2
    assert ops.segment_frames(torch.eye(5), -1.0, 3).tolist() == [0, 1, 2, 2, 2]


def test_flat_regions_do_not_cascade() -> None:
    # Copies of one token: their distances are rounding only, and greedy selection would pick the largest.
    frame = torch.randn(1, 1, 96, generator=torch.Generator().manual_seed(1)).repeat(1, 40, 1)
    frame += 1e-4 * torch.randn(1, 40, 96, generator=torch.Generator().manual_seed(2))
    assert ops.select_tokens(frame, None, 6).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_the_densest_of_duplicates_is_the_first_center() -> None:
    x = torch.zeros(5, 3)
    assert [r.tolist() for r in ops.cluster_tokens(x, 3, 5)] == [[0, 1, 2], [0, 1, 2, 0, 0]]


# Values that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_disturbs_no_other(value: float) -> None:
    features, attention = video("noise", 3, 12, 16)
    keep = torch.arange(12) != 5
    everyone, one_segment = torch.ones(3, 12).bool(), torch.zeros(3, dtype=torch.int64)
    bad = features.clone()
    bad[:, 5, 3] = value

    index = ops.select_tokens(features[:, keep], attention[:, keep], 6)
    assert torch.equal(ops.select_tokens(bad, attention, 6), index + (index >= 5))

    similarity, parent = ops.match_tokens(bad, everyone, one_segment, -1.0)
    assert similarity[:, 5].tolist() == [-1] * 3
    assert parent[:, 5].tolist() == [-1] * 3
    expected = ops.match_tokens(features, everyone & keep, one_segment, -1.0)
    assert torch.equal(similarity[:, keep], expected[0][:, keep])
    assert torch.equal(parent[:, keep], expected[1][:, keep])

    centers, _ = ops.cluster_tokens(features[0, keep], 4, 7)
    assert torch.equal(ops.cluster_tokens(bad[0], 4, 7)[0][1:], (centers + (centers >= 5))[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_but_bad_values(value: float) -> None:
    features = torch.full((2, 9, 4), value)
    assert ops.select_tokens(features, None, 4).tolist() == [[0, 1, 2, 3]] * 2
    assert ops.segment_frames(features.mean(1), -1.0, 1).tolist() == [0, 1]
    assert (ops.match_tokens(features, torch.ones(2, 9).bool(), torch.zeros(2).long(), -1.0)[1] == -1).all()
    for k in (1, 7):
        assert ops.cluster_tokens(features[0], 3, k)[0].tolist() == [0, 1, 2]


def test_a_bad_token_is_the_least_dense() -> None:
    x = video("noise", 1, 6, 8)[0][0]
    x[0] = torch.nan
    assert ops.cluster_tokens(x, 1, 1)[0].tolist() == [1]  # k = 1: a token's only neighbour is itself


def test_bad_weights_come_last() -> None:
    features, attention = video("noise", 1, 6, 8)
    attention[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    assert ops.select_tokens(features, attention, 4).tolist() == [[0, 1, 4, 5]]


# Every op alike: inputs, layouts, threads

Run = Callable[[dict[str, Tensor]], Any]
OPS: dict[str, Run] = {
    "segment_frames": lambda v: ops.segment_frames(v["features"][:, 0], 0.5, 3),
    "event_relevance": lambda v: ops.event_relevance(v["features"], v["segment_id"]),
    "select_tokens": lambda v: ops.select_tokens(v["features"], v["weight"], 6),
    "match_tokens": lambda v: ops.match_tokens(v["features"], v["member"], v["segment_id"], 0.5),
    "match_position": lambda v: ops.match_tokens(v["features"], v["member"], v["segment_id"], 0.5, "position"),
    "tree_roots": lambda v: ops.tree_roots(v["parent"]),
    "pool_trees": lambda v: ops.pool_trees(v["features"], v["root"], v["member"]),
    "cluster_tokens": lambda v: ops.cluster_tokens(v["features"][1], 5, 7),
    "explain_tokens": lambda v: ops.explain_tokens(v["features"], 10, 0.7),
    "received_attention": lambda v: ops.received_attention(v["query"], v["key"]),
}


def op_inputs(dtype: torch.dtype, num_frames: int = 5, n: int = 65, d: int = 257) -> dict[str, Tensor]:
    features, attention = video("scene", num_frames, n, d, dtype)
    parent = torch.arange(n).repeat(num_frames, 1)
    parent[0] = -1
    return {
        "features": features,
        "weight": attention,
        "member": half_mask(num_frames, n),
        "segment_id": torch.tensor([0, 0, 1, 1, 1])[:num_frames],
        "parent": parent,
        "root": torch.arange(num_frames * n).view(num_frames, n) // 4 * 4,
        "query": video("noise", 2 * num_frames, n, 80, dtype, seed=1)[0].view(num_frames, 2, n, 80),
        "key": video("noise", 2 * num_frames, n, 80, dtype, seed=2)[0].view(num_frames, 2, n, 80),
    }


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_not_modified(op: str, dtype: torch.dtype) -> None:
    given = op_inputs(dtype)
    kept = {name: tensor.clone() for name, tensor in given.items()}
    OPS[op](given)
    assert all(torch.equal(given[name], kept[name]) for name in given)


@pytest.mark.parametrize("op", OPS)
def test_any_strides(op: str) -> None:
    given = op_inputs(torch.float32)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in given.items()}
    backwards = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in given.items()}
    for layout in (strided, backwards):
        assert not layout["features"].is_contiguous()
        assert same(OPS[op](layout), OPS[op](given))


@pytest.mark.parametrize("op", OPS)
def test_expanded(op: str) -> None:
    given = op_inputs(torch.float32)
    first = {name: t[:1].expand_as(t) for name, t in given.items() if name != "parent"}
    first["parent"] = given["parent"]
    assert same(OPS[op](first), OPS[op]({name: t.contiguous() for name, t in first.items()}))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [7, 49, 65, 196])
@pytest.mark.parametrize("num_frames", [2, 5])
def test_threads_change_no_bit(op: str, n: int, num_frames: int, threads: Callable[[int], None]) -> None:
    given = op_inputs(torch.float32, num_frames, n, d=1001)
    threads(1)
    alone = OPS[op](given)
    for count in (2, 8):
        threads(count)
        assert same(OPS[op](given), alone)


@pytest.mark.parametrize("kind", VIDEOS)
def test_runs_change_no_bit(kind: str) -> None:
    given = op_inputs(torch.float32) | {"features": video(kind, 5, 65, 257)[0]}
    for run in OPS.values():
        for one, other in zip(tensors(run(given)), tensors(run(given)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_exactly(dtype: torch.dtype) -> None:
    given = op_inputs(dtype)
    for run in OPS.values():
        assert same(run(given), run({name: t.float() if t.is_floating_point() else t for name, t in given.items()}))


# What is refused

X = torch.ones(2, 3, 4)
MASK, INDEX, IDS = torch.ones(2, 3).bool(), torch.zeros(2, 3).long(), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.segment_frames(X, 0.9, 8), r"frames must have shape \[T, D\].*got \[2, 3, 4\]"),
        (lambda: ops.segment_frames(X[0].long(), 0.9, 8), "frames must be torch.float32 or .*int64"),
        (lambda: ops.segment_frames(X[0], 0.9, 0), "min_segments must be >= 1, got 0"),
        (lambda: ops.event_relevance(X, torch.zeros(3).long()), r"segment_id must have shape \[T=2\]"),
        (lambda: ops.event_relevance(X, torch.zeros(2)), "segment_id must be torch.int64, got torch.float32"),
        (lambda: ops.select_tokens(X, X[:, :2, 0], 1), r"weight must have shape \[T=2, N=3\].*\[2, 2\]"),
        (lambda: ops.select_tokens(X, None, 4), "k must be between 0 and N=3, got 4"),
        (lambda: ops.select_tokens(X, None, -1), "k must be between 0 and N=3, got -1"),
        (lambda: ops.select_tokens(X.double(), None, 1), "features must be .* got torch.float64"),
        (lambda: ops.select_tokens(X[:, :0], None, 0), "none of them 0; got"),
        (lambda: ops.select_tokens([1.0], None, 1), r"features must be a tensor \[T N D\], got list"),
        (lambda: ops.match_tokens(X, MASK.int(), IDS, 0.8), "candidate must be torch.bool, got torch.int32"),
        (
            lambda: ops.match_tokens(X, MASK, IDS, 0.8, "ring"),
            "matching must be tree or position, got 'ring'",
        ),
        (lambda: ops.match_tokens(X, MASK.to("meta"), IDS, 0.8), "candidate must be on cpu, got meta"),
        (lambda: ops.tree_roots(INDEX.int()), "parent must be torch.int64, got torch.int32"),
        (lambda: ops.pool_trees(X, INDEX[:1], MASK), r"root must have shape \[T=2, N=3\]"),
        (lambda: ops.cluster_tokens(X[0], 0, 1), "num_clusters must be between 1 and n=3, got 0"),
        (lambda: ops.cluster_tokens(X[0], 4, 1), "num_clusters must be between 1 and n=3, got 4"),
        (lambda: ops.cluster_tokens(X[0], 1, 7), "k must be between 1 and n=3, got 7"),
        (
            lambda: ops.received_attention(X[None], X[None].half()),
            "key must be torch.float32, got torch.float16",
        ),
        (lambda: ops.received_attention(X[None], X[None, :1]), r"key must have shape \[T=1, H=2, N=3, d=4\]"),
        (
            lambda: ops.select_tokens(X, None, 1, backend="nonsense"),
            r"this build has no backend 'nonsense'; available: torch, native, triton",
        ),
    ],
)
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
