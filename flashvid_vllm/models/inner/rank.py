# SPDX-License-Identifier: MIT
"""Which visual tokens of a prompt are kept: those that its last token attends to most in layer K - 1."""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from .plan import Video


def attention_of_last(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The attention of a prompt's last token to all of it, mean over the heads of all ranks: [P] fp32.

    Args:
        query: [H, d] of the last token, this rank's heads, turned by RoPE.
        keys: [P, G, d] of all tokens; H / G heads share one.
        scale: of the products.
    """
    heads = query.float().unflatten(0, (keys.shape[1], -1))  # [G, H / G, d]
    weights = (torch.einsum("ghd,pgd->ghp", heads, keys.float()) * scale).softmax(-1)
    received = weights.flatten(0, 1).sum(0)
    ranks = get_tensor_model_parallel_world_size()
    if ranks > 1:  # gathered, and summed in one order: ranks that choose apart would answer nonsense
        received = tensor_model_parallel_all_gather(received[None].contiguous(), dim=0).sum(0)
    return received / (len(query) * ranks)


def kept_order(attention: Tensor, is_visual: Tensor, videos: Sequence[Video]) -> Tensor:
    """Indices, ascending, of the ``len(is_visual)`` tokens that the later layers have.

    Of each video the ``kept`` visual tokens of most ``attention`` [P], ties to the lowest index, the prompt's last
    token before all others; of all else everything. ``is_visual`` [n >= P] bool. Nothing here waits for the device.
    """
    attention = attention.clone()
    attention[-1] = float("inf")
    keep = ~is_visual
    for video in videos:
        span = slice(video.offset, video.offset + video.length)
        visual = is_visual[span]
        score = torch.where(visual, attention[span], float("-inf"))
        best = score.sort(descending=True, stable=True).indices[: video.kept]
        keep[span] = keep[span].index_fill(0, best, True)
    count = len(is_visual) - sum(video.tokens - video.kept for video in videos)
    return (~keep).to(torch.uint8).sort(stable=True).indices[:count]
