# SPDX-License-Identifier: MIT
"""What `benchmarks.fidelity` measures of a compressed video, and the statistics over clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from flashvid_vllm import ops
from flashvid_vllm.core.compress import CompressedVideo

from ..common.clip_model import Encoded, heads, run_layer, tower

# --- functional fidelity -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Groups of tokens that attend among themselves, padded to the largest.

    Attributes:
        x: [G, n, D], the patch tokens of each group.
        size: [G, n] float32, the number of original tokens that each stands for; 0 is padding.
    """

    x: Tensor
    size: Tensor


def by_frame(x: Tensor, size: Tensor, frame: Tensor, num_frames: int) -> Tokens:
    """One group per frame: token i, x [B, D], of ``size`` [B], is in the group ``frame`` [B] (ascending)."""
    count = torch.bincount(frame, minlength=num_frames)
    row = torch.arange(len(frame)) - (count.cumsum(0) - count)[frame]
    groups = Tokens(x.new_zeros(num_frames, int(count.max()), x.shape[-1]), x.new_zeros(num_frames, int(count.max())))
    groups.x[frame, row], groups.size[frame, row] = x, size.to(x.dtype)
    return groups


def by_assignment(video: CompressedVideo) -> Tokens:
    """One group per frame: the tokens that stand for any of its tokens, each as often as it does so in this frame."""
    num_frames = len(video.assignment)
    frame = torch.arange(num_frames)[:, None].expand_as(video.assignment)
    given = video.assignment >= 0
    pair, count = (frame[given] * len(video.tokens) + video.assignment[given]).unique(return_counts=True)
    return by_frame(video.tokens[pair % len(video.tokens)], count, pair // len(video.tokens), num_frames)


@torch.no_grad()
def embed(model: Any, tokens: Tokens, class_token: Tensor, class_size: float, depth: int) -> Tensor:
    """The projected class embedding [G, 512] after the layers from ``depth`` (their number so far) to the end.

    Attention is weighted by size: log(size) is added to a key's logits, so that a token of size k counts as k equal
    ones. class_token is [G, D]; it counts as ``class_size`` tokens.
    """
    vision = tower(model)
    hidden = torch.cat([class_token[:, None], tokens.x], 1)
    size = torch.cat([tokens.size.new_full((len(class_token), 1), class_size), tokens.size], 1)
    bias = size.log()[:, None, None]  # [G, 1, 1, 1 + n]; log 0 = -inf: padding is never attended to
    for layer in vision.encoder.layers[depth:-1]:
        hidden = run_layer(layer, hidden, bias)
    return project(model, last_layer(vision.encoder.layers[-1], hidden, bias))


def last_layer(layer: Any, hidden: Tensor, bias: Tensor) -> Tensor:
    """What ``run_layer`` makes of the first token alone [G, D]: nothing else is asked of the last layer."""
    x = layer.layer_norm1(hidden)
    query = heads(layer, layer.self_attn.q_proj(x[:, :1]))
    key, value = heads(layer, layer.self_attn.k_proj(x)), heads(layer, layer.self_attn.v_proj(x))
    seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    first = hidden[:, :1] + layer.self_attn.out_proj(seen.transpose(-2, -3).flatten(-2))
    return (first + layer.mlp(layer.layer_norm2(first)))[:, 0]


def project(model: Any, class_token: Tensor) -> Tensor:
    """CLIP's embedding [G, 512] of the class token [G, D]."""
    embedding: Tensor = model.visual_projection(tower(model).post_layernorm(class_token))
    return embedding


@dataclass(frozen=True)
class Views:
    """The class embeddings in the ways that the tokens of a video may attend to each other.

    Attributes:
        frame: [T, 512]; every frame by itself: its class token, and the tokens whose position lies in it.
        frame_assigned: every frame by itself: its class token, and the tokens that stand for any of its tokens.
        clip: [1, 512]; all tokens of the clip, and the mean of the class tokens, which counts T times.
        clip_unweighted: the same, every patch token counting once, as in an LLM, which knows no sizes.
        clip_even: the same, every patch token counting T*N/B times: the class token keeps its share.
    """

    frame: Tensor
    frame_assigned: Tensor
    clip: Tensor
    clip_unweighted: Tensor
    clip_even: Tensor


VIEWS = tuple(Views.__dataclass_fields__)


def views(model: Any, video: CompressedVideo, class_token: Tensor, depth: int) -> Views:
    """Run the encoder's remaining layers on a compressed video; class_token is [T, D]."""
    num_frames, n = video.assignment.shape
    frame, x = video.source_index // n, video.tokens
    one, size = torch.ones_like(video.size), video.size.float()
    mean = class_token.mean(0, keepdim=True)

    def of_frames(groups: Tokens) -> Tensor:
        return embed(model, groups, class_token, 1, depth)

    def of_clip(size: Tensor) -> Tensor:
        return embed(model, Tokens(x[None], size[None].to(x.dtype)), mean, num_frames, depth)

    in_frame, in_clip = of_frames(by_frame(x, size, frame, num_frames)), of_clip(size)
    own = torch.arange(num_frames)[:, None].expand_as(video.assignment)
    given = video.assignment >= 0
    across = bool((own[given] != frame[video.assignment[given]]).any())  # else both groupings are one
    return Views(
        frame=in_frame,
        frame_assigned=of_frames(by_assignment(video)) if across else in_frame,
        clip=in_clip,
        clip_unweighted=of_clip(one) if bool((size > 1).any()) else in_clip,
        clip_even=of_clip(one * (num_frames * n / max(1, len(x)))),
    )


def whole(encoded: Encoded) -> CompressedVideo:
    """A video of which every token is kept."""
    num_frames, n, _ = encoded.features.shape
    position = torch.arange(num_frames * n)
    return CompressedVideo(
        encoded.features.flatten(0, 1), position, torch.ones_like(position), position.view(num_frames, n)
    )


def nothing(encoded: Encoded) -> CompressedVideo:
    """A video of which no token is kept: the class tokens are all that is left."""
    num_frames, n, d = encoded.features.shape
    none = torch.empty(0, dtype=torch.int64)
    return CompressedVideo(encoded.features.new_empty(0, d), none, none, torch.full((num_frames, n), -1))


def fidelity(found: Views, full: Views) -> dict[str, float]:
    """The mean cosine of the embeddings to those of the full run, by view."""
    return {
        name: float(torch.cosine_similarity(getattr(found, name), getattr(full, name), dim=-1).mean()) for name in VIEWS
    }


# --- density -------------------------------------------------------------------------------------------------------


def density(features: Tensor, video: CompressedVideo) -> tuple[float, float]:
    """Mean cosine of each token to the token that stands for it, and the mean of the worst 5 %.

    Features [T, N, D] and tokens are centred by the mean of the features. A token that no token was assigned is
    held against the nearest one. It rewards tokens that are many where the video is dense: it is not quality.
    """
    mean = features.flatten(0, 1).mean(0)
    x, y = normalize(features.flatten(0, 1) - mean, dim=-1), normalize(video.tokens - mean, dim=-1)
    row = video.assignment.flatten()
    similarity = torch.where(row >= 0, (x * y[row.clamp(min=0)]).sum(-1), (x @ y.T).max(-1).values)
    worst = similarity.sort().values[: max(1, len(similarity) // 20)]
    return float(similarity.mean()), float(worst.mean())


# --- TSTM against TTM ----------------------------------------------------------------------------------------------


def linking(
    features: Tensor,
    matching: str,
    threshold: float,
    segment_threshold: float,
    segments: int,
    most: float = 1.0,
) -> list[float]:
    """How far linking through time goes, on all tokens of features [T, N, D].

    Only the strongest links are made, to ``most`` (a share) of the tokens.

    Returns:
        the share of tokens that are merged into another one; the mean cosine of a merged token to its parent; and
        of a merged token to the mean of its tree.
    """
    num_frames, n, _ = features.shape
    segment_id = ops.segment_frames(features.mean(1), segment_threshold, segments)
    candidate = torch.ones(num_frames, n, dtype=torch.bool)
    similarity, parent = ops.match_tokens(features, candidate, segment_id, threshold, matching)
    strength = torch.where(parent >= 0, similarity, -torch.inf).flatten()
    weak = strength.argsort(descending=True, stable=True)[round(most * len(strength)) :]
    parent = parent.flatten().index_fill(0, weak, -1).view(num_frames, n)
    root = ops.tree_roots(parent).flatten()
    index, mean, _ = ops.pool_trees(features, root.view_as(parent), candidate)
    row = torch.full((num_frames * n,), -1)
    row[index] = torch.arange(len(index))
    merged = parent.flatten() >= 0
    to_tree = torch.cosine_similarity(features.flatten(0, 1), mean[row[root]].to(features.dtype), dim=-1)
    return [
        float(merged.float().mean()),
        float(similarity.flatten()[merged].mean()),
        float(to_tree[merged].mean()),
    ]


# --- statistics ----------------------------------------------------------------------------------------------------


def bootstrap(values: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """The mean of ``values`` (one a clip) and the 95 % percentile interval of the mean over resampled clips."""
    sample = np.asarray(values, dtype=np.float64)
    index = np.random.default_rng(seed).integers(0, len(sample), (draws, len(sample)))
    low, high = np.percentile(sample[index].mean(1), [2.5, 97.5])
    return float(sample.mean()), float(low), float(high)
