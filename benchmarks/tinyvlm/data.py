# SPDX-License-Identifier: MIT
"""The videos and questions of a split, from a seed: nothing is stored, the same number gives the same video."""

import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from .backgrounds import Split, base_of, is_wide
from .questions import FAMILIES, Question, ask
from .scenes import Video, render
from .scripts import Script, write

SEED = 0
SIZES: dict[Split, int] = {"train": 3200, "validation": 200, "test": 320, "long": 64}  # videos
# kinds of script and their shares of a split's videos: in the test, questions of each family are about as many
KINDS = {"move": 0.32, "sequence": 0.26, "count": 0.24, "event": 0.18}
TEST_KINDS = {"move": 0.24, "sequence": 0.18, "count": 0.34, "event": 0.24}
WIDE_SIZES: dict[Split, int] = {"wide-train": 3000, "wide-validation": 200, "wide-test": 320}
WIDE_KINDS = {"move": 0.18, "sequence": 0.2, "count": 0.2, "event": 0.22, "crowd": 0.2}
LONG_FRAMES = 80
EVENT_FRAMES = 11  # of a training video of the kind event; training holds its still frames to make it long


def generator(split: Split, number: int, purpose: str) -> np.random.Generator:
    """The random numbers of one purpose for one video."""
    return np.random.default_rng([SEED, zlib.crc32(f"{split} {purpose}".encode()), number])


@lru_cache(maxsize=8192)
def script(split: Split, number: int) -> Script:
    """Video ``number`` of a split, and what it was meant to show."""
    rng = generator(split, number, "video")
    shares = WIDE_KINDS if is_wide(split) else TEST_KINDS if base_of(split) == "test" else KINDS
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    frames = LONG_FRAMES if split == "long" else None
    if kind == "event" and base_of(split) == "train":
        frames = EVENT_FRAMES
    elif kind == "event" and is_wide(split):
        kind = "timed"
    return write(rng, split, kind, frames)


def video(split: Split, number: int) -> Video:
    """Video ``number`` of a split."""
    return script(split, number).video


def questions(split: Split, number: int) -> list[Question]:
    """All questions about a video as it is."""
    return ask(video(split, number), generator(split, number, "questions"), split)


def statistics(split: Split, count: int) -> dict[str, float | dict[str, float]]:
    """Videos, frames, questions by family, and how often the best answer blind to the video is right, by family.

    That answer is the place of the choice, or the choice itself, that is right most often in the family.
    """
    frames = sum(len(video(split, number)) for number in range(count))
    asked = [question for number in range(count) for question in questions(split, number)]
    blind: dict[str, float] = {}
    for family in FAMILIES:
        of_it = [question for question in asked if question.family == family]
        places = Counter(question.choices.index(question.answer) for question in of_it)
        blind[family] = max(places.values(), default=0) / max(len(of_it), 1)
    by_family = Counter(question.family for question in asked)
    return {
        "videos": count,
        "frames": frames,
        "questions": len(asked),
        "by family": {family: by_family[family] for family in FAMILIES},
        "most frequent place of the answer": blind,
    }


def sheet(split: Split, numbers: range, path: Path, columns: int = 10) -> None:
    """Draw some videos, a row each, with their questions below, for looking at."""
    rows = []
    for number in numbers:
        frames = render(video(split, number))
        chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
        row = np.concatenate([cv2.resize(f, (160, 160), interpolation=cv2.INTER_AREA) for f in chosen], axis=1)
        asked = questions(split, number)
        text = np.full((16 * len(asked) + 6, row.shape[1], 3), 255, np.uint8)
        for line, q in enumerate(asked):
            label = f"{number} ({len(frames)} frames) {q.family}: {q.prompt()} -> {q.answer}"
            cv2.putText(text, label, (4, 14 + 16 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [row, text]
    if not cv2.imwrite(str(path), np.concatenate(rows)[..., ::-1]):
        raise ValueError(f"not a place that an image can be written to: {path}")
