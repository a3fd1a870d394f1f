# SPDX-License-Identifier: MIT
"""PruneVid: Visual Token Pruning for Efficient Video Large Language Models (arXiv 2412.16117)."""

from itertools import groupby

import torch
from torch import Tensor

import flashvid_vllm.ops as ops

from ..budget import Budget
from ..compress import CompressedVideo
from .common import merge

SEGMENTS = (1, 4)  # gamma, clusters of frames for each frame
STATIC = 0.8  # tau, mean similarity through a segment above which a position is static


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Merge what stands still through time, then everything in space: the stage before the LLM (Sec. 3.2).

    Frames are clustered (DPC-kNN on their means) into segments. A position whose tokens are similar throughout a
    segment is static, and becomes the mean over it, at the segment's first frame (Eq. 2 to 4). The static
    positions of a segment, and the other tokens of each frame, are clustered by DPC-kNN; a cluster becomes its mean.

    Left out: the stage inside the LLM, which prunes by the question's attention, and the compressed KV cache.
    Differs: clusters are as many as B allows, in proportion to each group's size, where the paper keeps half of
    each group; where the merging through time leaves fewer than B, the least similar static positions are not
    merged; and ties go to the lowest index, where the code adds noise.

    Args:
        features: [T, N, D], contiguous.
        attention: not read.
        budget: says B.
        backend: of the ops.
    """
    num_frames, n, _ = features.shape
    frames = torch.stack([frame.float().mean(0) for frame in features])
    wanted = max(1, num_frames * SEGMENTS[0] // SEGMENTS[1])
    _, cluster = ops.cluster_tokens(frames, wanted, min(ops.DPC_NEIGHBOURS, num_frames), backend)
    lengths = segments(cluster.tolist())
    static = _static(features, lengths, budget.tokens)

    # Groups of tokens to cluster, each with its segment's length if static, else 1
    groups: list[tuple[int, Tensor, Tensor, int]] = []
    start = 0
    for length, is_static in zip(lengths, static, strict=True):
        still, moving = is_static.nonzero().flatten(), (~is_static).nonzero().flatten()
        if len(still):
            mean = sum(features[t, still].float() for t in range(start, start + length)) / length
            assert isinstance(mean, Tensor)
            groups.append((start, still, mean, length))
        if len(moving):
            groups += [(t, moving, features[t, moving], 1) for t in range(start, start + length)]
        start += length
    entries = sum(len(place) for _, place, _, _ in groups)

    source = torch.full((num_frames, n), -1, dtype=torch.int64, device=features.device)
    before = 0
    for t, place, x, length in groups:
        after = before + len(place)
        num_clusters = budget.tokens * after // entries - budget.tokens * before // entries
        before = after
        if num_clusters:
            center = place
            if num_clusters < len(place):
                centers, nearest = ops.cluster_tokens(x, num_clusters, min(ops.DPC_NEIGHBOURS, len(place)), backend)
                center = place[centers[nearest]]
            source[t : t + length, place] = t * n + center
    return merge(features, source, backend)


def segments(label: list[int]) -> list[int]:
    """Lengths of the segments that clusters of frames make: each cluster keeps its longest run if that is more
    than one frame; what lies between joins the longer of its neighbours, the earlier if they are as long."""
    runs = [(value, len(list(run))) for value, run in groupby(label)]
    longest = {value: max(length for other, length in runs if other == value) for value, _ in runs}
    kept: list[int | None] = []
    for value, length in runs:
        kept += [value if length == longest[value] > 1 else None] * length
    start = 0
    for is_open, gap in groupby(list(kept), lambda value: value is None):
        stop = start + len(list(gap))
        if is_open:
            left = _run(kept[:start][::-1])
            right = _run(kept[stop:])
            joins = kept[start - 1] if left >= right and left else kept[stop] if right else 0
            kept[start:stop] = [joins] * (stop - start)
        start = stop
    return [len(list(run)) for _, run in groupby(kept)]


def _run(values: list[int | None]) -> int:
    """How many of ``values`` are like the first, from it on."""
    return len(list(next(groupby(values))[1])) if values else 0


def _static(features: Tensor, lengths: list[int], tokens: int) -> list[Tensor]:
    """[N] bool for every segment: the positions that become one token, so that at least ``tokens`` are left."""
    n, start = features.shape[1], 0
    similarity = []
    for length in lengths:
        total = torch.zeros_like(features[0], dtype=torch.float32)
        own = total.new_zeros(n)
        for frame in features[start : start + length]:
            unit = torch.nn.functional.normalize(frame.float(), dim=-1)
            total += unit
            own += unit.square().sum(-1)
        pairs = (total.square().sum(-1) - own) / max(1, length * (length - 1))  # Eq. 3, all pairs of frames
        similarity.append(pairs if length > 1 else torch.full_like(pairs, -torch.inf))
        start += length
    value = torch.stack(similarity)
    is_static = value > STATIC
    fewer = torch.tensor(lengths, device=value.device)[:, None] - 1  # what one static position saves
    least_first = torch.where(is_static, value, torch.inf).flatten().argsort(stable=True)
    saved = torch.where(is_static, fewer, 0).flatten()[least_first]
    missing = tokens - (len(features) * n - saved.sum())
    undone = saved.cumsum(0) - saved < missing  # until what they give back makes up for it
    is_static.view(-1)[least_first[undone]] = False
    return list(is_static)
