# SPDX-License-Identifier: MIT
"""A processed video without the pixels that its encoder will not look at.

What is chosen and what it stands for (``core.reuse.Reuse``) goes to the model in two fields beside the pixels, on the
CPU: ``ROWS`` [M] and ``SOURCE`` [T * P], int64. The pixels of a video that has them are those of its M rows, in the
order of ``ROWS``: for Qwen [M * 4, C * 2 * 14 * 14], as the processor has patches, for LLaVA patches [M, 3, p, p]
instead of frames [T, 3, H, W].
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

from ..core.choice import choose
from ..core.config import ENCODER_SETTINGS, FlashVidConfig
from . import counting

PIXELS = "pixel_values_videos"
ROWS = "flashvid_rows"
SOURCE = "flashvid_source"
_POOL = 4  # pixels along a side, at the most, of which only the mean is compared: noise, and time


@dataclass(frozen=True)
class PixelScale:
    """How a family's processor has normalised pixels: level = (value * std + mean) * 255, by channel."""

    mean: Sequence[float]
    std: Sequence[float]

    def levels(self, rows: Tensor) -> Tensor:
        """[T, P, U, channels, K, S, S] pixels, normalised or uint8 -> [T, P, C] uint8: means over squares of pixels.

        Rounded before they are added up, and by one operation after the other: the same on every machine.
        """
        shape = (-1, 1, 1, 1)
        scale = (torch.tensor(self.std, dtype=torch.float64) * 255).float().view(shape)
        offset = (torch.tensor(self.mean, dtype=torch.float64) * 255).float().view(shape)
        side = rows.shape[-1]
        pool = next(n for n in range(min(_POOL, side), 0, -1) if side % n == 0)
        frames = []
        for frame in rows:
            if frame.dtype != torch.uint8:  # else it is normalised on the device, later
                frame = (frame.float() * scale).add_(offset).round_().clamp_(0, 255).to(torch.uint8)
            frames.append(_pooled(frame, pool).flatten(1))
        return torch.stack(frames)


def _pooled(level: Tensor, pool: int) -> Tensor:
    """Means over ``pool`` x ``pool`` of the last two axes, half goes up."""
    if pool == 1:
        return level
    lines = level[..., 0::pool].short()
    for i in range(1, pool):
        lines += level[..., i::pool]
    total = lines[..., 0::pool, :].clone()
    for i in range(1, pool):
        total += lines[..., i::pool, :]
    return total.add_(pool * pool // 2).div_(pool * pool, rounding_mode="floor").to(torch.uint8)


def encode_less(
    item: MultiModalKwargsItem, rows: Tensor, scale: PixelScale, blocks: Sequence[int], config: FlashVidConfig
) -> MultiModalKwargsItem:
    """A processed video whose pixels are those that are computed: a new item.

    Args:
        item: the video as the processor has it.
        rows: [T, P, U, channels, K, S, S], its pixels by rows of U patches.
        scale: of these pixels.
        blocks: as for `flashvid_vllm.core.choice.choose`.
        config: what the request asks for.
    """
    with counting.time_choice():
        reuse = choose(scale.levels(rows), blocks, config)
    computed = rows.flatten(0, 1)[reuse.rows]
    patches = computed.flatten(0, 1)  # [M * U, channels, K, S, S]
    given = item[PIXELS]
    pixels = patches.flatten(1) if given.data.dim() == 2 else patches.squeeze(2)
    cpu = MultiModalBatchedField(keep_on_cpu=True)
    return MultiModalKwargsItem(
        {
            **item,
            PIXELS: MultiModalFieldElem(data=pixels, field=given.field),
            ROWS: MultiModalFieldElem(data=reuse.rows, field=cpu),
            SOURCE: MultiModalFieldElem(data=reuse.source, field=cpu),
        }
    )


def name_of_pixels(video: str, config: FlashVidConfig, piece: Sequence[int]) -> str:
    """What a video's chosen pixels are called in the caches of processed videos, from vLLM's hash of the video, what
    the choice was asked for, and what its blocks were made from."""
    asked = json.dumps([*(getattr(config, name) for name in ENCODER_SETTINGS), *piece])
    return f"{video}-encoder-{hashlib.sha256(asked.encode()).hexdigest()}"
