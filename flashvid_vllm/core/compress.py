# SPDX-License-Identifier: MIT
"""FlashVID on one page: the numbered steps are the sections of ALGORITHM.md. Its peers are in ``methods``."""

from dataclasses import dataclass

import torch
from torch import Tensor

import flashvid_vllm.ops as ops
from flashvid_vllm.core.budget import Budget, plan
from flashvid_vllm.core.config import FlashVidConfig
from flashvid_vllm.core.methods import PEERS, load

DEFAULT_CONFIG = FlashVidConfig()


@dataclass(frozen=True)
class CompressedVideo:
    """The B tokens that stand for a video, in the order of their position in it.

    Attributes:
        tokens: [B, D], the dtype of the features.
        source_index: [B] int64, position in [0, T*N), ascending.
        size: [B] int64, number of original tokens that each stands for.
        assignment: [T, N] int64, row of ``tokens`` that each original token went to, or -1.
    """

    tokens: Tensor
    source_index: Tensor
    size: Tensor
    assignment: Tensor


@torch.no_grad()
def compress(
    features: Tensor,
    attention: Tensor | None,
    config: FlashVidConfig = DEFAULT_CONFIG,
    check: bool = False,
    *,
    keeps_positions: bool = True,
) -> CompressedVideo:
    """Compress the visual tokens of one video to exactly the planned number (FlashVID, arXiv 2602.08024, or a peer).

    Args:
        features: [T, N, D] fp32, fp16 or bf16; not modified.
        attention: [T, N] fp32, fp16 or bf16, the attention that each token receives in the vision encoder;
            None only if ``config.needs_attention`` is false.
        config: the settings.
        check: raise on NaN or infinity in the inputs. Without it they take part as the lowest score, and the
            result still has exactly B tokens.
        keeps_positions: whether the LLM will see the kept tokens at their positions in the whole video, as M-RoPE
            models do, and not numbered anew, as LLaVA does unless told. `adaptive` alone reads it.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, attention missing, ``check`` failed, or a method
            that calls vLLM's functions without vLLM.
    """
    _validate(features, attention, config, check)
    num_frames, n, _ = features.shape

    if config.suppress_sinks and config.needs_attention:
        assert attention is not None  # _validate has seen to it
        attention = without_sinks(attention)

    # 0. Budget: B tokens, K of every frame selected by ADTS, M merged by TSTM.
    budget = plan(num_frames, n, config)
    is_peer = config.method in PEERS
    on_device = None if budget.is_identity or is_peer else ops.device_pipeline(config.backend, features)
    if on_device is not None:  # the same steps as below, without waiting for the device
        selection = config.selection if config.needs_attention else "diversity"  # what selects nothing reads nothing
        sizes = (budget.selected_per_frame, budget.merged, selection, config.matching)
        thresholds = (config.merge_threshold, config.segment_threshold, config.min_segments)
        return CompressedVideo(*on_device(features, attention, *sizes, *thresholds))

    position = torch.arange(num_frames * n, device=features.device)
    features = features.contiguous()  # sums follow the strides: one layout, one result
    flat = features.flatten(0, 1)
    if budget.is_identity:
        return CompressedVideo(flat, position, torch.ones_like(position), position.view(num_frames, n))
    if is_peer:
        asked = {"keeps_positions": keeps_positions} if PEERS[config.method].asks_positions else {}
        peer: CompressedVideo = load(config.method)(features, attention, budget, config.backend, **asked)
        return peer

    # 1. Segments (DySeg). Frame by frame: mean(1, dtype=float32) takes three times as long on bf16.
    frames = torch.stack([frame.float().mean(0) for frame in features])
    segment_id = segments_of(frames, config)

    # 2. ADTS: K tokens of every frame stay as they are.
    selected = _select(features, attention, segment_id, budget.selected_per_frame, config)
    candidate = torch.ones(num_frames, n, dtype=torch.bool, device=features.device)
    candidate.scatter_(1, selected, False)

    # 3. TSTM: link the others through time, and collapse every tree into its mean.
    quota = _segment_sum(_frame_shares(budget, features.device), segment_id)
    similarity, parent = ops.match_tokens(
        features, candidate, segment_id, config.merge_threshold, config.matching, config.backend
    )
    parent = _keep_strongest(parent, similarity, candidate, segment_id, quota)
    root = ops.tree_roots(parent, config.backend)
    tree_root, tree_mean, _ = ops.pool_trees(features, root, candidate, config.backend)

    # 4. DPC-kNN: merge the trees that begin in the same frame until M are left.
    roots_per_frame = torch.bincount(tree_root // n, minlength=num_frames)
    clusters_per_frame = _cluster_shares(roots_per_frame, segment_id, quota)
    center = _cluster_frames(tree_mean, roots_per_frame, clusters_per_frame, config)
    center_tree, merged, _ = ops.pool_trees(tree_mean[None], center[None], center[None] >= 0, config.backend)

    # 5. Output: `source` is the token that stands for each original one; kept tokens stand for themselves.
    stands_for = torch.full_like(position, -1)
    stands_for[tree_root] = torch.where(center >= 0, tree_root[center], -1)
    source = torch.where(candidate, stands_for[root], position.view(num_frames, n))
    kept = source.flatten() == position
    source_index = position[kept]
    row = kept.cumsum(0) - 1
    assignment = torch.where(source >= 0, row[source], -1)
    tokens = flat[source_index]
    tokens[row[tree_root[center_tree]]] = merged.to(features.dtype)
    size = torch.bincount(assignment[assignment >= 0], minlength=budget.tokens)
    return CompressedVideo(tokens, source_index, size, assignment)


def segments_of(frames: Tensor, config: FlashVidConfig) -> Tensor:
    """Sec. 1: the segment [T] that each frame is in, from the frames' embeddings [T, D]."""
    return ops.segment_frames(frames, config.segment_threshold, config.min_segments, config.backend)


def without_sinks(attention: Tensor) -> Tensor:
    """The attention [T, N] float32 without what a place draws in every frame, whatever they show.

    A_tn / max(1, min over t of A_tn / median over n of A_tn): what is above the median in all frames falls, in the
    one where it is least, to the median (the mean has the sinks in it); what stands out in some frames alone stays.
    One frame has no sinks.
    """
    a = attention.float().contiguous()
    if len(a) == 1:
        return a
    above = a / a.where(a.isfinite(), torch.nan).nanmedian(1, keepdim=True).values
    least = above.where(above.isfinite(), torch.inf).amin(0)
    return a / least.where(least.isfinite(), 1).clamp(min=1)


def _select(features: Tensor, attention: Tensor | None, segment_id: Tensor, k: int, config: FlashVidConfig) -> Tensor:
    """Sec. 2: index [T, k] of the tokens that ADTS selects."""
    if k == 0:
        return torch.empty(len(features), 0, dtype=torch.int64, device=features.device)
    if config.selection == "diversity":
        return ops.select_tokens(features, None, k, config.backend)
    assert attention is not None  # _validate has seen to it
    if config.selection == "attention":
        score = torch.where(attention.isfinite(), attention, -torch.inf)
        return score.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    weight = attention.float()
    if config.selection == "attention_diversity_event":
        weight = weight * ops.event_relevance(features, segment_id, config.backend)
    return ops.select_tokens(features, weight, k, config.backend)


def _keep_strongest(parent: Tensor, similarity: Tensor, candidate: Tensor, segment_id: Tensor, quota: Tensor) -> Tensor:
    """Sec. 3: remove the weakest edges of a segment that would be left with fewer roots than its quota."""
    num_frames, n = parent.shape
    edge = parent.flatten() >= 0
    segment = segment_id[:, None].expand(num_frames, n).flatten()
    strength = torch.where(edge, similarity.flatten(), -torch.inf)
    by_strength = strength.argsort(descending=True, stable=True)
    by_segment = by_strength[segment[by_strength].argsort(stable=True)]  # and by strength inside each

    # Tokens of a segment are contiguous, before and after the sort: the rank counts from its first position.
    first = torch.searchsorted(segment_id, segment_id)
    position = torch.arange(num_frames * n, device=parent.device).view(num_frames, n)
    rank = torch.empty_like(by_segment)
    rank[by_segment] = (position - n * first[:, None]).flatten()
    most_edges = _segment_sum(candidate.sum(1), segment_id) - quota
    return parent.masked_fill(rank.view(num_frames, n) >= most_edges[:, None], -1)


def _cluster_shares(roots: Tensor, segment_id: Tensor, quota: Tensor) -> Tensor:
    """Sec. 4: clusters [T] of each frame in proportion to its roots [T]; they sum to the segment's quota."""
    before = roots.cumsum(0) - roots
    before = before - before[torch.searchsorted(segment_id, segment_id)]
    in_segment = _segment_sum(roots, segment_id).clamp(min=1)
    return quota * (before + roots) // in_segment - quota * before // in_segment


def _cluster_frames(mean: Tensor, roots: Tensor, clusters: Tensor, config: FlashVidConfig) -> Tensor:
    """Sec. 4: the row in ``mean`` of every tree's cluster center, -1 where its frame has no cluster."""
    center = torch.full((len(mean),), -1, device=mean.device)
    start = 0
    for count, num_clusters in zip(roots.tolist(), clusters.tolist(), strict=True):
        stop = start + count
        if num_clusters == count:  # nothing to merge
            center[start:stop] = torch.arange(start, stop, device=mean.device)
        elif num_clusters:
            centers, cluster = ops.cluster_tokens(
                mean[start:stop], num_clusters, min(ops.DPC_NEIGHBOURS, count), config.backend
            )
            center[start:stop] = start + centers[cluster]
        start = stop
    return center


def _frame_shares(budget: Budget, device: torch.device) -> Tensor:
    """Sec. 0: how many of the M merged tokens fall to each frame [T]."""
    shares = [budget.merged_before(t + 1) - budget.merged_before(t) for t in range(budget.num_frames)]
    return torch.tensor(shares, device=device)


def _segment_sum(per_frame: Tensor, segment_id: Tensor) -> Tensor:
    """Sum integers [T] over each segment; every frame gets its segment's sum [T]."""
    return torch.zeros_like(per_frame).index_add_(0, segment_id, per_frame)[segment_id]


def _validate(features: Tensor, attention: Tensor | None, config: FlashVidConfig, check: bool) -> None:
    sizes = ops.check_tensor("features", features, "T N D", ops.FLOATS)
    if attention is not None:
        ops.check_tensor("attention", attention, "T N", ops.FLOATS, sizes, features)
    elif config.needs_attention:
        reader = "method" if config.method in PEERS else "selection"
        raise ValueError(f"{reader}={getattr(config, reader)!r} needs attention [T, N], got None")
    if check:
        for name, tensor in (("features", features), ("attention", attention)):
            if tensor is not None and (bad := int((~tensor.isfinite()).sum())):
                raise ValueError(f"{name} must be finite, got {bad} values that are NaN or infinite")
