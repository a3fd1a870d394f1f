# SPDX-License-Identifier: MIT
"""Which real shots lie behind the videos of which split. No frame of a test background is in a training video.

Streets, towers and men are tested on other shots than they are trained on. The rabbit and the Earth have one clip
each, so they are tested on a later stretch of it, some seconds after what is trained on.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .scenes import View

# long: test videos of many frames; the wide ones are those of the second model, with more families of questions
Split = Literal["train", "validation", "test", "long", "wide-train", "wide-validation", "wide-test"]
SCENES = ("street", "towers", "man", "rabbit", "earth")


@dataclass(frozen=True)
class Shot:
    """Frames ``start`` to before ``stop`` of a clip of `benchmarks.common.clips`, and what they show."""

    source: str
    start: int
    stop: int
    scene: str


TRAIN = (
    Shot("bikes", 0, 30, "street"),
    Shot("bikes", 30, 76, "street"),
    Shot("bikes", 137, 187, "street"),
    Shot("city", 0, 116, "towers"),
    Shot("speaker", 0, 173, "man"),
    Shot("bigbuckbunny", 0, 92, "rabbit"),
    Shot("world", 0, 600, "earth"),
)
TEST = (
    Shot("bikes", 76, 137, "street"),
    Shot("bikes", 187, 242, "street"),
    Shot("city", 117, 190, "towers"),
    Shot("carphone", 0, 120, "man"),
    Shot("bigbuckbunny", 104, 132, "rabbit"),
    Shot("world", 700, 901, "earth"),
)


def base_of(split: Split) -> Split:
    """Which of "train", "validation" and "test" a split is one of: it has the words and the backgrounds of that one."""
    bases: tuple[Split, ...] = ("train", "validation", "test")
    return next((base for base in bases if split.endswith(base)), "test")


def is_wide(split: Split) -> bool:
    """Whether it is one of the second model's."""
    return split.startswith("wide-")


def shots(split: Split) -> tuple[Shot, ...]:
    """The shots of a split; validation has the training's, in videos of its own."""
    return TEST if base_of(split) == "test" else TRAIN


def background(rng: np.random.Generator, split: Split, frames: int, still: bool) -> list[tuple[View, str]]:
    """A shot of a random scene as ``frames`` views: still (one frame of it), running, or panned over."""
    scene = SCENES[rng.integers(len(SCENES))]
    choices = [shot for shot in shots(split) if shot.scene == scene]
    shot = choices[rng.integers(len(choices))]
    side = rng.uniform(0.55, 1.0)
    left, top = rng.uniform(0, 1 - side, 2)
    first = View(shot.source, 0, left, top, side, bool(rng.integers(2)), rng.uniform(0.8, 1.15))
    speed = 0 if still else int(rng.integers(1, 4))
    speed = min(speed, (shot.stop - shot.start - 1) // max(frames - 1, 1))
    start = int(rng.integers(shot.start, shot.stop - speed * (frames - 1)))
    end = left if still or rng.random() < 0.6 else rng.uniform(0, 1 - side)
    lefts = np.linspace(left, end, frames)
    return [(replace(first, index=start + speed * t, left=float(lefts[t])), scene) for t in range(frames)]
