# SPDX-License-Identifier: MIT
"""FastVID: Dynamic Density Pruning for Fast Video Large Language Models (arXiv 2503.11187)."""

import torch
from torch import Tensor

import flashvid_vllm.ops as ops

from ..budget import Budget
from ..compress import CompressedVideo
from .common import frame_shares, is_finite, merge, most_similar, spread, top

MIN_SEGMENTS, SEGMENT_THRESHOLD = 8, 0.9  # c and tau of DySeg
CONTEXT = (2, 5)  # d, share of the budget that goes to DTM
ANCHOR_EVERY = 4  # p, frames from one anchor frame to the next
OWN = 0.6  # beta, share of the anchor in what it becomes
NEIGHBOURS = 4  # of the density


def compress(features: Tensor, attention: Tensor | None, budget: Budget, backend: str) -> CompressedVideo:
    """Dynamic temporal segments; in each, tokens kept by attention (ATS) and merged around density peaks (DTM).

    DySeg (Sec. 3.2): cuts where neighbouring frames are less similar than tau, and at least c segments. STPrune
    (Sec. 3.3): three fifths of every frame's share are its most attended tokens, as they are. The rest of a
    segment's share are anchors: the density peaks (DPC-kNN) among the other tokens of every fourth frame, counted
    from its last. In each of these frames every other token of the segment goes to its most similar anchor, and an
    anchor becomes beta * anchor + (1 - beta) * mean of what has gone to it. So a token is in one mean of every
    anchor frame; ``assignment`` and ``size`` count it where it is most alike.

    Left out: the pretrained head for class attention; received attention takes its place, and the means of frames
    the place of its output. Differs: ties go to the lowest index, where the published code adds noise; and where
    anchor frames have too few tokens for the budget (above R = 0.45), other frames of the segment have anchors.

    Args:
        features: [T, N, D], contiguous.
        attention: [T, N].
        budget: says B; the frames' shares differ by at most one.
        backend: of the ops.
    """
    assert attention is not None
    n = budget.tokens_per_frame
    finite = is_finite(features)
    attention = attention.masked_fill(~finite, -torch.inf)
    frames = torch.stack([frame.float().mean(0) for frame in features])
    segment_id = ops.segment_frames(frames, SEGMENT_THRESHOLD, MIN_SEGMENTS, backend)
    shares = frame_shares(budget)
    context = [tokens * CONTEXT[0] // CONTEXT[1] for tokens in shares]

    flat = features.flatten(0, 1)
    source = torch.full((len(flat),), -1, dtype=torch.int64, device=features.device)
    for t in range(len(features)):
        salient = t * n + top(attention[t], shares[t] - context[t])
        source[salient] = salient
    is_left = source < 0
    anchors, merged = [source[:0]], [features.new_empty(0, features.shape[2])]
    stop = 0
    for length in torch.bincount(segment_id).tolist():
        start, stop = stop, stop + length
        part, first, last = features[start:stop], start * n, stop * n
        others = [t * n + is_left[t * n : (t + 1) * n].nonzero().flatten() for t in range(start, stop)]
        highest = torch.full((length, n), -torch.inf, device=features.device)
        for tokens, count in zip(others, _anchors(sum(context[start:stop]), list(map(len, others))), strict=True):
            if not count:
                continue
            peaks, _ = ops.cluster_tokens(flat[tokens], count, min(NEIGHBOURS, len(tokens)), backend)
            anchor = tokens[peaks.sort().values]
            similarity, nearest = most_similar(part, flat[anchor], backend)
            goes_to = torch.where(nearest >= 0, anchor[nearest], -1)
            goes_to.view(-1)[anchor - first] = anchor
            better = (is_left[first:last].view(length, n) & (similarity > highest)).flatten()
            source[first:last][better] = goes_to.flatten()[better]
            highest = torch.maximum(highest, similarity)

            member = is_left[first:last].view(length, n) & (goes_to >= 0) & finite[start:stop]
            member.view(-1)[anchor - first] = True
            _, mean, _ = ops.pool_trees(part, (goes_to - first).clamp(min=0), member, backend)
            anchors.append(anchor)
            merged.append((OWN * flat[anchor].float() + (1 - OWN) * mean).to(features.dtype))
    anchor = torch.cat(anchors)
    source[anchor] = anchor
    video = merge(features, source.view(features.shape[:2]), backend)
    video.tokens[video.assignment.view(-1)[anchor]] = torch.cat(merged)
    return video


def _anchors(total: int, room: list[int]) -> list[int]:
    """How many anchors each frame of a segment has, of ``total``: in anchor frames as far as there is room."""
    chosen = [t for t in range(len(room)) if (len(room) - 1 - t) % ANCHOR_EVERY == 0]
    out = [0] * len(room)
    for some in (chosen, [t for t in range(len(room)) if t not in chosen]):
        space = [room[t] for t in some]
        for t, count in zip(some, spread(min(total - sum(out), sum(space)), space), strict=True):
            out[t] = count
    return out
