# SPDX-License-Identifier: MIT
"""What is drawn of a compressed video, the same in every format."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...core.budget import plan
from ...core.choice import CHOICE_FRAMES, choose
from ...core.compress import CompressedVideo, compress, segments_of
from ...core.config import ENCODER_SETTINGS, FLASHVID_SETTINGS, INNER_SETTINGS, FlashVidConfig
from ...core.methods import PEERS
from .features import Encoded
from .video import Frames

# Trees: far from each other, and from white and grey, on a photograph. The first ones go to the largest trees.
PALETTE = (
    "#ff3b6b", "#19c8ff", "#ffd21f", "#3ddc5b", "#b26bff", "#ff8a1f", "#12d9b5",
    "#ff6be6", "#5b8cff", "#c6f02b", "#c98a5a", "#ff9d9d", "#8f7bff", "#5fb38c",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """A compressed video, and what explains it.

    Attributes:
        title, model: the names of the video and of what encoded it.
        facts: (name, value) for the header.
        pictures: [T, height, width, 3] uint8, the first frame of every temporal position.
        labels: [T], when each is seen.
        grid: T, rows and columns of tokens.
        segment: [T], which segment each belongs to; empty for a method that has none.
        attention: [T*N], received attention, 1 for a frame's mean.
        video: what `compress` returned.
        colour: [B], index into PALETTE, -1 for a token that stands for itself alone.
        computed: [T, rows, columns] bool, what the encoder computes of the video's patches (Qwen: units of 2 x 2), the
            others being copies; None if all.
    """

    title: str
    model: str
    facts: list[tuple[str, str]]
    pictures: np.ndarray
    labels: list[str]
    grid: tuple[int, int, int]
    segment: list[int]
    attention: np.ndarray
    video: CompressedVideo
    colour: np.ndarray
    computed: np.ndarray | None = None

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept tokens of each frame [T]: those that stand for themselves alone, and those for several."""
        frame = self.video.source_index.numpy() // (self.grid[1] * self.grid[2])
        alone = (self.video.size == 1).numpy()
        single, several = (np.bincount(frame[mask], minlength=self.grid[0]) for mask in (alone, ~alone))
        return single, several

    def cuts(self) -> list[int]:
        """The frames that begin a segment, but for the first."""
        return [t for t in range(1, len(self.segment)) if self.segment[t] != self.segment[t - 1]]


def make_scene(title: str, model: str, frames: Frames, encoded: Encoded, config: FlashVidConfig) -> Scene:
    """Compress a video and gather what is drawn of it."""
    features, attention = encoded.features.cpu(), encoded.attention.cpu()
    num_frames, n = attention.shape
    video = compress(features, attention, config, keeps_positions=encoded.keeps_positions)
    budget = plan(num_frames, n, config)
    segment: list[int] = []
    computed = _computed(encoded, config) if config.encodes_less else None
    facts = [
        ("tokens", f"{num_frames} × {n} = {budget.total}"),
        ("kept", f"{budget.tokens} ({100 * budget.tokens / budget.total:.1f} %)"),
    ]
    if config.method not in PEERS:
        means = features.float().mean(1)
        segment = segments_of(means, config).tolist()
        facts.append(("budget", f"{budget.selected_per_frame} a frame by ADTS, {budget.merged} in all by TSTM"))
        facts.append(("segments", str(segment[-1] + 1)))
    if computed is not None:
        share = f"{computed.sum()} of {computed.size} patches computed ({100 * computed.mean():.1f} %)"
        facts.append(("encoder", share if encoded.frames_each == 1 else share.replace("patches", "2 × 2 patches")))
    facts += [("tower", model), ("settings", _settings(config))]
    first = [min(t * encoded.frames_each, len(frames.index) - 1) for t in range(num_frames)]
    last = [min(i + encoded.frames_each, len(frames.index)) - 1 for i in first]
    grid = (num_frames, *encoded.grid)
    return Scene(
        title=title,
        model=model,
        facts=facts,
        pictures=frames.pictures[first],
        labels=[frames.label(*ends) for ends in zip(first, last, strict=True)],
        grid=grid,
        segment=segment,
        attention=(attention / attention.mean(1, keepdim=True)).flatten().numpy(),
        video=video,
        colour=_colours(video.assignment.view(grid).numpy(), video.size.numpy()),
        computed=computed,
    )


def _computed(encoded: Encoded, config: FlashVidConfig) -> np.ndarray:
    """What a server's encoder computes of a video that it gets in one piece."""
    num_frames, rows = encoded.levels.shape[:2]
    chosen = torch.zeros(num_frames * rows, dtype=torch.bool)
    chosen[choose(encoded.levels, range(0, num_frames, CHOICE_FRAMES), config).rows] = True
    return chosen.view(num_frames, *encoded.row_grid).numpy()


def _settings(config: FlashVidConfig) -> str:
    hidden = (FLASHVID_SETTINGS if config.method in PEERS else ()) + (() if config.encodes_less else ENCODER_SETTINGS)
    hidden += () if config.inner else INNER_SETTINGS
    shown: dict[str, Any] = {k: v for k, v in config.to_dict().items() if v is not None and k not in hidden}
    return ", ".join(f"{name}={value}" for name, value in shown.items() if (name, value) != ("backend", "auto"))


def _colours(assignment: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A colour for every tree, so that trees that touch, in a frame or from one to the next, differ if possible."""
    pairs = [
        (assignment[:, :, 1:], assignment[:, :, :-1]),
        (assignment[:, 1:], assignment[:, :-1]),
        (assignment[:, 1:, 1:], assignment[:, :-1, :-1]),
        (assignment[:, 1:, :-1], assignment[:, :-1, 1:]),
        (assignment[1:], assignment[:-1]),
    ]
    touching: list[set[int]] = [set() for _ in size]
    for one, other in pairs:
        for a, b in np.unique(np.stack([one.ravel(), other.ravel()], 1), axis=0).tolist():
            if a != b and a >= 0 and b >= 0:
                touching[a].add(b)
                touching[b].add(a)
    colour = np.full(len(size), -1)
    used = np.zeros(len(PALETTE), dtype=int)
    for row in np.argsort(-size, kind="stable"):
        if size[row] < 2:
            break
        near = np.bincount([colour[i] for i in touching[row] if colour[i] >= 0], minlength=len(PALETTE))
        colour[row] = np.lexsort((used, near))[0]
        used[colour[row]] += 1
    return colour
