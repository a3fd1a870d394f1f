# SPDX-License-Identifier: MIT
"""Changes to FlashVID that its figures suggest, tried on the validation videos: an option needs to win there first.

segment       clusters of a segment's roots together, instead of each frame's: no root is dropped
nearest       roots of a frame that got no cluster join the nearest one of their segment, instead of being dropped
uneven u      frames that differ from the one before get more of ADTS's share: by u + change / mean change
novelty       ADTS weighs a token by how much it differs from the nearest one of the frame before, too
threshold t   links above another cosine; -1 links until each segment has as many trees as it may keep
min_segments  fewer segments at least, so that trees are longer; "T/4": a quarter of the frames, 8 at most
spread        kept tokens stay at their positions in the whole video, as with M-RoPE, instead of being counted anew
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import flashvid_vllm.ops as ops
from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan
from flashvid_vllm.core.compress import (
    _cluster_frames,
    _cluster_shares,
    _frame_shares,
    _keep_strongest,
    _segment_sum,
    _select,
)

from .answers import Encoded, kept
from .grid import PLAIN, SPREAD, Cell

RATIOS = (0.25, 0.10)
CHANGES: dict[str, dict[str, Any]] = {
    "segment": {"by": "segment"},
    "nearest": {"by": "nearest"},
    "uneven 1": {"uneven": 1.0},
    "uneven 0.1": {"uneven": 0.1},
    "novelty": {"novelty": True},
    "uneven 0.1, segment": {"uneven": 0.1, "by": "segment"},
    "uneven 0.1, novelty": {"uneven": 0.1, "novelty": True},
    "uneven 0.1, novelty, segment": {"uneven": 0.1, "novelty": True, "by": "segment"},
}


def variants() -> list[Cell]:
    """FlashVID as it is, every change, some of them together, and two methods to hold them against."""
    cells = [Cell(PLAIN, 1.0, None)]
    for ratio in RATIOS:
        share = partial(FlashVidConfig, ratio)
        cells += [Cell(method, ratio, share(method=method)) for method in ("flashvid", "tstm", "evs")]
        cells += [Cell(f"{m}{SPREAD}", ratio, share(method=m), spread=True) for m in ("flashvid", "tstm", "evs")]
        cells.append(Cell(f"one segment{SPREAD}", ratio, share(min_segments=1), spread=True))
        cells += [Cell(f"threshold {t:g}", ratio, share(merge_threshold=t)) for t in (-1.0, 0.6, 0.7, 0.9)]
        cells += [Cell(f"min_segments {n}", ratio, share(min_segments=n)) for n in (1, 2, 4)]
        cells.append(Cell("min_segments T/4", ratio, share(), function=_a_quarter))
        cells += [Cell(f"alpha {a:g}", ratio, share(alpha=a)) for a in (0.3, 0.5)]
        cells += [Cell(f"alpha {a:g}, one segment", ratio, share(alpha=a, min_segments=1)) for a in (0.3, 0.5)]
        for name, change in CHANGES.items():
            function = partial(changed, **change)
            cells.append(Cell(name, ratio, share(), function=function))
            cells.append(Cell(f"{name}, one segment", ratio, share(min_segments=1), function=function))
    return cells


def _a_quarter(video: Encoded, config: FlashVidConfig) -> Tensor:
    return kept(video, replace(config, min_segments=max(1, min(config.min_segments, len(video.tokens) // 4))))


def changed(
    video: Encoded, config: FlashVidConfig, by: str = "frame", uneven: float | None = None, novelty: bool = False
) -> Tensor:
    """FlashVID with the clusters of a "frame", a "segment", or of a frame and the dropped roots to the "nearest".

    ``uneven``: K of a frame in proportion to this plus what has changed in it. ``novelty``: tokens that the frame
    before did not have weigh more. With none of them it is FlashVID.
    """
    features, attention = video.tokens, video.attention
    num_frames, n, _ = features.shape
    budget = plan(num_frames, n, config)
    position = torch.arange(num_frames * n)
    frames = features.float().mean(1)
    segment_id = ops.segment_frames(frames, config.segment_threshold, config.min_segments, config.backend)
    shares = (
        _uneven(frames, budget.selected, n, uneven) if uneven is not None else [budget.selected_per_frame] * num_frames
    )
    candidate = torch.ones(num_frames, n, dtype=torch.bool)
    if novelty:
        everything, whole = torch.ones_like(attention, dtype=torch.bool), torch.zeros_like(segment_id)
        attention = attention * (1 - ops.match_tokens(features, everything, whole, -1.0)[0]).clamp(0, 1)
    selected = {k: _select(features, attention, segment_id, k, config) for k in set(shares)}
    for t, k in enumerate(shares):
        candidate[t, selected[k][t]] = False
    quota = _segment_sum(_frame_shares(budget, features.device), segment_id)
    quota = quota.minimum(_segment_sum(candidate.sum(1), segment_id))  # uneven may leave fewer candidates
    similarity, parent = ops.match_tokens(features, candidate, segment_id, config.merge_threshold, config.matching)
    parent = _keep_strongest(parent, similarity, candidate, segment_id, quota)
    root = ops.tree_roots(parent)
    tree_root, tree_mean, _ = ops.pool_trees(features, root, candidate)
    center = _centers(tree_mean, tree_root // n, segment_id, quota, config, by)
    center_tree, merged, _ = ops.pool_trees(tree_mean[None], center[None], center[None] >= 0)
    source = torch.cat([position[~candidate.flatten()], tree_root[center_tree]])
    tokens = torch.cat([features.flatten(0, 1)[~candidate.flatten()], merged.to(features.dtype)])
    return tokens[source.argsort()]


def _uneven(frames: Tensor, total: int, most: int, base: float) -> list[int]:
    """``total`` tokens over the frames [T, D], by ``base`` + the change from the frame before over the mean change."""
    change = torch.cat([torch.ones(1), 1 - cosine_similarity(frames[1:], frames[:-1])])
    change[0] = change[1:].max() if len(change) > 1 else 1.0  # the first frame is all new
    weight = base + change / change.mean().clamp(min=1e-6)
    before = (weight.cumsum(0) / weight.sum() * total).floor().long().tolist()
    before[-1] = total
    return [min(b - a, most) for a, b in zip([0, *before], before, strict=False)]


def _centers(mean: Tensor, frame: Tensor, segment_id: Tensor, quota: Tensor, config: FlashVidConfig, by: str) -> Tensor:
    """Each tree's centre, as in `compress`; trees are in the order of frames, so of segments too."""
    roots = torch.bincount(frame, minlength=len(segment_id))
    if by == "segment":
        first = torch.cat([torch.tensor([True]), segment_id[1:] != segment_id[:-1]])
        together = torch.zeros(int(segment_id[-1]) + 1, dtype=torch.int64).index_add_(0, segment_id, roots)
        return _cluster_frames(mean, together, quota[first], config)
    center = _cluster_frames(mean, roots, _cluster_shares(roots, segment_id, quota), config)
    if by == "nearest":
        for tree in (center < 0).nonzero().flatten().tolist():
            same = (segment_id[frame] == segment_id[frame[tree]]) & (center == torch.arange(len(center)))
            if (others := same.nonzero().flatten()).numel():
                center[tree] = others[(mean[others] - mean[tree]).norm(dim=1).argmin()]
    return center
