# SPDX-License-Identifier: MIT
"""The public ops on Triton kernels. Arguments are validated in ``flashvid_vllm.ops``, which documents them.

Every op is registered with ``torch.library`` as ``flashvid::<op>``, so that ``torch.compile`` traces through
it. Sizes that depend on the data (``pool_trees``) wait for the device; the whole pipeline never does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from . import attention, cluster, explain, farthest, forest, gram, match, means, pipeline, segment, select
from .launch import Launch, record

UNREGISTERED: dict[str, Callable[..., Any]] = {}  # the function behind each op, which runs on meta tensors too


def _op(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    def register(function: Callable[..., Any]) -> CustomOpDef:
        UNREGISTERED[name] = function
        return torch.library.custom_op(f"flashvid::{name}", function, mutates_args=())

    return register


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@_op("segment_frames")
def segment_frames(frames: Tensor, threshold: float, min_segments: int) -> Tensor:
    t, d = frames.shape
    mean = _empty(frames, t, d)
    transitions = _empty(frames, segment.num_parts(d), 2, t)
    segment_id = _empty(frames, t, dtype=torch.int64)
    segment.frame_statistics(frames[:, None], mean, None, transitions)
    segment.segment(mean, transitions, segment_id, None, threshold, min_segments)
    return segment_id


@segment_frames.register_fake
def _(frames: Tensor, threshold: float, min_segments: int) -> Tensor:
    return _empty(frames, len(frames), dtype=torch.int64)


@_op("event_relevance")
def event_relevance(features: Tensor, segment_id: Tensor) -> Tensor:
    t, n, d = features.shape
    frames, events, relevance = _empty(features, t, d), _empty(features, t, d), _empty(features, t, n)
    segment_id = segment_id.contiguous()
    segment.frame_statistics(features, frames, None, None)
    segment.segment(frames, None, segment_id, events)
    segment.relevance(features, segment_id, events, None, relevance)
    return relevance


@event_relevance.register_fake
def _(features: Tensor, segment_id: Tensor) -> Tensor:
    return _empty(features, *features.shape[:2])


@_op("select_tokens")
def select_tokens(features: Tensor, weight: Tensor | None, k: int) -> Tensor:
    t, n, _ = features.shape
    index = _empty(features, t, k, dtype=torch.int64)
    if k:
        products = _empty(features, t, n, n)
        squares, nearest, inverse = (_empty(features, t, n) for _ in range(3))
        gram.gram(features, products, squares)
        select.nearest_others(products, squares, nearest, inverse)
        select.select(products, inverse, nearest, weight, k, None, index)
    return index


@select_tokens.register_fake
def _(features: Tensor, weight: Tensor | None, k: int) -> Tensor:
    return _empty(features, len(features), k, dtype=torch.int64)


@_op("match_tokens")
def match_tokens(
    features: Tensor, candidate: Tensor, segment_id: Tensor, threshold: float, matching: str = "tree"
) -> tuple[Tensor, Tensor]:
    t, n, d = features.shape
    squares = _empty(features, segment.num_parts(d), t, n)
    segment.frame_statistics(features, _empty(features, t, d), squares, None)
    similarity, parent = _empty(features, t, n), _empty(features, t, n, dtype=torch.int64)
    usable = candidate.contiguous().view(torch.uint8)
    match.match(features, squares, usable, segment_id.contiguous(), threshold, matching, similarity, parent)
    return similarity, parent


@match_tokens.register_fake
def _(
    features: Tensor, candidate: Tensor, segment_id: Tensor, threshold: float, matching: str = "tree"
) -> tuple[Tensor, Tensor]:
    t, n, _ = features.shape
    return _empty(features, t, n), _empty(features, t, n, dtype=torch.int64)


@_op("tree_roots")
def tree_roots(parent: Tensor) -> Tensor:
    t, n = parent.shape
    own = torch.arange(t * n, device=parent.device).view(t, n)
    before = n * (torch.arange(t, device=parent.device)[:, None] - 1)
    root = torch.where(parent < 0, own, before + parent).contiguous()
    forest.roots(root)
    return root


@tree_roots.register_fake
def _(parent: Tensor) -> Tensor:
    return _empty(parent, *parent.shape, dtype=torch.int64)


@_op("pool_trees")
def pool_trees(features: Tensor, root: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t, n = root.shape
    label = torch.where(member, root, -1).contiguous()
    index, tree = root[member].unique(return_inverse=True)
    size = _empty(features, 1, len(index), dtype=torch.int32)
    mean = _empty(features, 1, len(index), features.shape[2])
    if len(index):
        count = torch.full((1,), len(index), dtype=torch.int32, device=features.device)
        # In a forest every tree fills consecutive frames from its root's; then far fewer are searched.
        frame = torch.arange(t, device=root.device)[:, None].expand(t, n)[member]
        frames = torch.stack([tree, frame]).unique(dim=1)
        last = index // n + frames[0].bincount() - 1
        is_forest = bool(((frames[1] >= (index // n)[frames[0]]) & (frames[1] <= last[frames[0]])).all())
        lists = (index.int()[None], count, mean, size)
        means.tree_means(features, label, *lists, known=False, forest=is_forest)
    return index, mean[0], size[0].long()


@pool_trees.register_fake
def _(features: Tensor, root: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    trees = torch.library.get_ctx().new_dynamic_size()
    index = torch.empty((trees,), dtype=torch.int64, device=features.device)
    mean = torch.empty((trees, features.shape[2]), dtype=torch.float32, device=features.device)
    return index, mean, torch.empty_like(index)


@_op("cluster_tokens")
def cluster_tokens(x: Tensor, num_clusters: int, k: int) -> tuple[Tensor, Tensor]:
    n, d = x.shape
    center, products, squares = _empty(x, 1, d), _empty(x, 1, n, n), _empty(x, 1, n)
    sizes = torch.empty((2, 1), dtype=torch.int32, device=x.device)
    sizes[0], sizes[1] = n, num_clusters
    centers = _empty(x, num_clusters, dtype=torch.int64)
    assignment = _empty(x, n, dtype=torch.int64)
    tokens = x.float()[None]
    segment.frame_statistics(tokens, center, None, None)
    gram.gram(tokens, products, squares, center)
    scores = cluster.Scores.empty(1, n, x.device)
    cluster.cluster(products, squares, scores, sizes[0], sizes[1], d, k, assignment, centers)
    return centers, assignment


@cluster_tokens.register_fake
def _(x: Tensor, num_clusters: int, k: int) -> tuple[Tensor, Tensor]:
    return _empty(x, num_clusters, dtype=torch.int64), _empty(x, len(x), dtype=torch.int64)


@_op("explain_tokens")
def explain_tokens(features: Tensor, tokens: int, still: float) -> Tensor:
    def first(apart: Tensor, residual: Tensor, picks: int) -> tuple[Tensor, Tensor]:
        t = len(apart)
        at, order = _empty(apart, t, picks), _empty(apart, t, picks, dtype=torch.int64)
        farthest.farthest(apart, residual.contiguous(), at, order)
        return at, order

    def products(unit: Tensor) -> Tensor:  # torch's may be of TF32, where vLLM is told to
        t, n, _ = unit.shape
        out, squares = _empty(unit, t, n, n), _empty(unit, t, n)
        gram.gram(unit, out, squares)
        return out

    return explain.explain_tokens(features, tokens, still, first, products)


@explain_tokens.register_fake
def _(features: Tensor, tokens: int, still: float) -> Tensor:
    return _empty(features, *features.shape[:2], dtype=torch.int64)


@_op("received_attention")
def received_attention(query: Tensor, key: Tensor) -> Tensor:
    t, heads, n, _ = query.shape
    received = _empty(query, t, n)
    logs, sums = _empty(query, t, heads, n), _empty(query, t, heads, n)
    attention.attention(query, key, logs, sums, received)
    return received


@received_attention.register_fake
def _(query: Tensor, key: Tensor) -> Tensor:
    return _empty(query, query.shape[0], query.shape[2])


compress_on_device = _op("compress")(pipeline.compress_video)


@compress_on_device.register_fake
def _(
    features: Tensor, attention: Tensor | None, selected: int, merged: int, *_settings: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, n, d = features.shape
    total = t * selected + merged
    index = _empty(features, total, dtype=torch.int64)
    assignment = _empty(features, t, n, dtype=torch.int64)
    return features.new_empty((total, d)), index, torch.empty_like(index), assignment


def launch_plan(
    num_frames: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    selected: int,
    merged: int,
    head: int = 80,
    hip: bool = False,
) -> list[Launch]:
    """Every kernel in every form that a video of [T, N, D] can make the wrappers launch, nothing run.

    Args:
        selected, merged: the budget: K of each frame, M of the video.
        head: channels of a head of the vision encoder.
        hip: whether for ROCm rather than CUDA.
    """
    x = torch.empty((num_frames, n, d), dtype=dtype, device="meta")
    score, ids = x.new_empty((num_frames, n)), _empty(x, num_frames, dtype=torch.int64)
    index, mask = _empty(x, num_frames, n, dtype=torch.int64), _empty(x, num_frames, n, dtype=torch.bool)
    query = x.new_empty((num_frames, 16, n, head))
    with record(run=False, hip=hip) as launches:
        for selection in ("attention_diversity_event", "attention_diversity", "attention", "diversity"):
            for matching in ("tree", "position"):
                settings = (selection, matching, 0.8, 0.9, 8)
                pipeline.compress_video(x, score, selected, merged, *settings)
        UNREGISTERED["segment_frames"](x[:, 0], 0.9, 8)
        UNREGISTERED["event_relevance"](x, ids)
        UNREGISTERED["select_tokens"](x, score, selected)
        UNREGISTERED["match_tokens"](x, mask, ids, 0.8)
        UNREGISTERED["tree_roots"](index)
        UNREGISTERED["cluster_tokens"](x[0], max(1, selected), 7)
        UNREGISTERED["explain_tokens"](x, max(1, selected), 0.7)
        UNREGISTERED["received_attention"](query, query)
        lists, count = _empty(x, 1, n, dtype=torch.int32), _empty(x, 1, dtype=torch.int32)
        means.tree_means(x, index, lists, count, _empty(x, 1, n, d), lists, known=False, forest=False)
    seen = {(one.name, str(one.signature), str(one.constants), one.aligned): one for one in launches}
    return list(seen.values())
