# SPDX-License-Identifier: MIT
"""`adaptive` with one thing changed, for the ablation on validation videos: what earns its place in it."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flashvid_vllm.core.compress import CompressedVideo, without_sinks
from flashvid_vllm.core.methods.adaptive import STILL
from flashvid_vllm.core.methods.common import keep, merge

BEFORE_ANY = 10.0  # above any residual
PICKED = -2.0

CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "what is still, as for the other `positions`": {"other": True},
    "still at half of the spread": {"still": 0.5},
    "still at the whole spread": {"still": 1.0},
    "still alike in all frames": {"alike": True},
    "the video's mean taken off": {"centre": "video"},
    "each frame's mean taken off": {"centre": "frame"},
    "attention as a weight, sinks suppressed": {"attention_power": 0.5},
    "the others dropped, not merged": {"copies": True},
    "residual to any place of the frame before": {"time": "content"},
    "residual to the two frames before": {"time": "two"},
    "no residual through time": {"time": "none"},
    "one token at least of every frame": {"floor": 1},
    "Euclidean distances": {"euclidean": True},
    "residuals through time halved": {"time_weight": 0.5},
    "residuals through time doubled": {"time_weight": 2.0},
}


def compress(
    features: Tensor,
    attention: Tensor,
    tokens: int,
    keeps_positions: bool,
    centre: Literal["none", "video", "frame"] = "none",
    attention_power: float = 0.0,
    copies: bool = False,
    time: Literal["place", "content", "two", "none"] = "place",
    floor: int = 0,
    euclidean: bool = False,
    time_weight: float = 1.0,
    still: float | None = None,
    other: bool = False,
    alike: bool = False,
) -> CompressedVideo:
    """``tokens`` of the video [T, N, D], chosen as `adaptive` does but for what is changed."""
    num_frames, n, _ = features.shape
    x = features.float()
    if centre != "none":
        x = x - x.mean((0, 1) if centre == "video" else 1, keepdim=True)
    x = x / x.norm(dim=-1).mean() if euclidean else normalize(x, dim=-1)
    apart = torch.cdist(x, x).square() / 2  # of unit vectors 1 - cosine

    def through_time(lag: int) -> Tensor:
        return (x[lag:] - x[:-lag]).square().sum(-1) / 2

    news = torch.full((num_frames, n), 2.0)
    news[0] = 1 + x[0] @ x[0].mean(0)
    if time == "content":
        news[1:] = (torch.cdist(x[1:], x[:-1]).square() / 2).amin(2)
    elif time != "none":
        news[1:] = through_time(1)
        if time == "two":
            news[2:] = news[2:].minimum(through_time(2))
    news[1:] *= time_weight
    weight = torch.ones(num_frames, n)
    if attention_power:
        attention = without_sinks(attention)
        weight = (attention / attention.mean(1, keepdim=True)).pow(attention_power)

    if still is None:
        still = STILL if keeps_positions != other else 0.0
    spread = apart.mean((1, 2))
    least = still * (spread.mean().expand(num_frames) if alike else spread)
    left, frame = news.maximum(least[:, None]), torch.arange(num_frames)
    order, residual = torch.empty(num_frames, n, dtype=torch.int64), torch.empty(num_frames, n)
    for k in range(n):
        residual[:, k], order[:, k] = (left * weight).masked_fill(left == PICKED, PICKED).max(1)
        left = left.minimum(apart[frame, order[:, k]])
        left[frame, order[:, k]] = PICKED
    residual = residual.cummin(1).values
    residual[:, :floor] += BEFORE_ANY
    stays = torch.zeros(num_frames * n, dtype=torch.bool)
    stays[residual.flatten().argsort(descending=True, stable=True)[:tokens]] = True
    kept = torch.zeros(num_frames, n, dtype=torch.bool).scatter_(1, order, stays.view(num_frames, n))
    if copies:
        return keep(features, kept.flatten().nonzero().flatten())
    source = torch.arange(num_frames * n).view(num_frames, n)
    for t in range(num_frames):
        to_kept, nearest = apart[t].masked_fill(~kept[t], torch.inf).min(1)
        goes_to = torch.where(to_kept.isfinite(), t * n + nearest, -1)
        if t:
            goes_to = torch.where((news[t] <= to_kept) & (source[t - 1] >= 0), source[t - 1], goes_to)
        source[t] = torch.where(kept[t], source[t], goes_to)
    return merge(features, source, "auto")
