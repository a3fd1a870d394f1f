# SPDX-License-Identifier: MIT
"""A video's pixels by the rows that its encoder computes, in 256 levels: what is looked at to choose among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POOL = 4  # pixels along a side, at the most, of which only the mean is compared: noise, and time


def frame_rows(frames: Tensor, side: int) -> Tensor:
    """Frames [T, 3, height, width] by patches, of which each is a row: [T, P, 1, 3, 1, side, side].

    Pixels that a convolution of this stride leaves over are not in it.
    """
    patches = frames.unfold(2, side, side).unfold(3, side, side)  # [T, 3, h, w, p, p]
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[:, :, None, :, None]


def merged_rows(patches: Tensor, grid: tuple[int, int], merged: int, frames_each: int, side: int) -> Tensor:
    """Patches [T * P * merged, 3 * frames_each * side * side], of which ``merged`` in succession make a row:
    [T, P, merged, 3, frames_each, side, side].

    Args:
        grid: (T, P), temporal positions and rows of each.
    """
    return patches.unflatten(1, (-1, frames_each, side, side)).unflatten(0, (*grid, merged))


@dataclass(frozen=True)
class PixelScale:
    """How a family's processor has normalised pixels: level = (value * std + mean) * 255, by channel."""

    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, processor: Any) -> "PixelScale":
        """Of transformers' image or video ``processor``."""
        rescaled = 1.0 if processor.do_rescale else 1 / 255
        if not processor.do_normalize:
            return cls([0.0] * 3, [rescaled] * 3)
        return cls([x * rescaled for x in processor.image_mean], [x * rescaled for x in processor.image_std])

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
