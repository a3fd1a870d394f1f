# SPDX-License-Identifier: MIT
"""The second model's vision tower: convolutions and two layers of attention, from scratch, on what each token shows.

Where the first model reads CLIP, this one has seen nothing but marks on the training's backgrounds: each of a frame's
49 tokens is told which words describe it (`alignment`). It is frozen then, as CLIP is for the first (`teach`).
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from .scenes import PIXELS

WEIGHTS = Path(__file__).parent / "weights" / "tower.safetensors"
WIDTH, HEADS, LAYERS = 192, 4, 2
CHANNELS = (32, 64, 128, WIDTH)  # behind strides of 4, 2, 2 and 2
TOKENS = (PIXELS // 32) ** 2  # of a frame
BATCH = 32  # frames, when it is used


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        y: Tensor = x + self.body(x)
        return y


class Layer(nn.Module):
    """A layer of attention that says how much each token receives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> the same, and the mean attention [B, N] that each token receives from all, over the heads."""
        query, key, value = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x)), weights.mean((1, 2))


class Tower(nn.Module):
    """Frames [B, 224, 224, 3] uint8 -> tokens [B, 49, WIDTH], and the attention [B, 49] received in the last layer."""

    def __init__(self) -> None:
        super().__init__()
        stem: list[nn.Module] = [nn.Conv2d(3, CHANNELS[0], 4, 4)]
        for before, channels in pairwise(CHANNELS):
            stem += [nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, channels, 3, 2, 1, bias=False)]
            stem += [Residual(channels)]
        self.stem = nn.Sequential(*stem, nn.BatchNorm2d(WIDTH))
        nn.Module.to(self.stem, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.place = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def convolved(self, frames: Tensor) -> Tensor:
        """The tokens in front of the layers of attention."""
        pixels = (frames.float() / 127.5 - 1).permute(0, 3, 1, 2)  # channels last in memory
        x: Tensor = self.stem(pixels).flatten(2).mT
        return x

    def attended(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `convolved` gives -> what the tower gives."""
        x = x + self.place
        received = x.new_empty(0)
        for layer in self.layers:
            x, received = layer(x)
        return self.norm(x), received

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.attended(self.convolved(frames))


def weights(path: Path = WEIGHTS) -> bytes:
    """The file of the trained weights. Raises FileNotFoundError with the remedy."""
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}; python -m benchmarks.tinyvlm wide makes them")
    return path.read_bytes()


def load(path: Path = WEIGHTS) -> Tower:
    """The trained tower, in eval mode. Raises FileNotFoundError with the remedy."""
    tower = Tower()
    tower.load_state_dict(safetensors.torch.load(weights(path)))
    return tower.eval().requires_grad_(False)


@torch.inference_mode()
def encode(
    tower: Tower, frames: np.ndarray, attend: bool, advance: Callable[[int], None] = lambda _: None
) -> list[Tensor]:
    """As `features.encode`: [features [n, 49, WIDTH]], and with ``attend`` the received attention [n, 49]."""
    parts = []
    for start in range(0, len(frames), BATCH):
        parts.append(tower(torch.from_numpy(frames[start : start + BATCH])))
        advance(len(parts[-1][0]))
    features, attention = (torch.cat(part) for part in zip(*parts, strict=True))
    return [features, attention] if attend else [features]
