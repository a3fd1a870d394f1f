# SPDX-License-Identifier: MIT
"""What is evaluated: settings by name, and the test questions, as many of each family."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashvid_vllm import FlashVidConfig, compress
from flashvid_vllm.core.config import ABLATIONS
from flashvid_vllm.core.methods import PEERS

from . import data
from .answers import Encoded, kept
from .backgrounds import Split
from .questions import FAMILIES, Question

RATIOS = (0.25, 0.20, 0.15, 0.10, 0.05)
ABLATION_RATIOS = (0.25, 0.10)
METHODS = ("flashvid", *ABLATIONS, *PEERS)
PLAIN = "plain"
SPREAD = ", spread"  # ends the names of settings whose tokens stay at their positions in the whole video
QUESTIONS = 120  # of a family
FEWER = 8  # frames of a long video that the plain model gets, for as many tokens as a tenth of all has


@dataclass(frozen=True)
class Cell:
    """One setting.

    ``config`` None: nothing is compressed. ``frames``: how many of the video's frames, None for all. ``function``: what
    compresses in the place of `flashvid_vllm.compress`. ``spread``: tokens stay at their positions in the whole video.
    """

    name: str
    ratio: float
    config: FlashVidConfig | None
    frames: int | None = None
    function: Callable[[Encoded, FlashVidConfig], Tensor] | None = None
    spread: bool = False

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.name}@{self.ratio:g}"

    def shown(self, video: Encoded) -> Encoded:
        """The frames that are not left out."""
        if self.frames is None:
            return video
        index = torch.linspace(0, len(video.tokens) - 1, self.frames).round().long()
        return Encoded(video.tokens[index], video.attention[index])

    def tokens(self, video: Encoded) -> tuple[Tensor, Tensor | None]:
        """The tokens [B, D] that the LLM gets, and with ``spread`` their positions [B] in the whole video."""
        video = self.shown(video)
        if self.config is not None and self.spread:
            compressed = compress(video.tokens, video.attention, self.config)
            return compressed.tokens, compressed.source_index
        if self.config is not None and self.function is not None:
            return self.function(video, self.config), None
        return kept(video, self.config), None


def _cell(name: str, ratio: float, **settings: Any) -> Cell:
    return Cell(name, ratio, FlashVidConfig(retention_ratio=ratio, **settings))


def cells() -> list[Cell]:
    """All settings for the test videos: every method, and the ablations of FlashVID's table."""
    grid = [Cell(PLAIN, 1.0, None)]
    grid += [_cell(method, ratio, method=method) for ratio in RATIOS for method in METHODS]
    for ratio in ABLATION_RATIOS:
        grid += [_cell(f"selection {s}", ratio, selection=s) for s in ("attention", "diversity", "attention_diversity")]
        grid += [_cell(f"alpha {a:g}", ratio, alpha=a) for a in (0.1, 0.3, 0.5, 0.9)]
        grid += [_cell(f"merge_threshold {t:g}", ratio, merge_threshold=t) for t in (0.7, 0.9)]
        grid += [_cell(f"min_segments {n}", ratio, min_segments=n) for n in (1, 4)]
        grid += [
            replace(_cell(method, ratio, method=method), name=f"{method}{SPREAD}", spread=True) for method in METHODS
        ]
        grid.append(replace(_cell(f"min_segments 1{SPREAD}", ratio, min_segments=1), spread=True))
    return grid


def long_cells() -> list[Cell]:
    """Frame expansion: few frames plain, or ten times as many at a tenth."""
    methods = [_cell(method, FEWER / data.LONG_FRAMES, method=method) for method in METHODS]
    spread = [replace(cell, name=f"{cell.name}{SPREAD}", spread=True) for cell in methods]
    return [Cell(f"{FEWER} frames", 1.0, None, FEWER), *methods, *spread, Cell(PLAIN, 1.0, None)]


def chosen(split: Split, videos: int, quota: int = QUESTIONS) -> dict[int, list[Question]]:
    """Video -> its questions: up to ``quota`` of each family, from as many videos as have one."""
    by_family: dict[str, list[tuple[int, int, Question]]] = defaultdict(list)
    for number in range(videos):
        order: dict[str, int] = defaultdict(int)
        for question in data.questions(split, number):
            by_family[question.family].append((order[question.family], number, question))
            order[question.family] += 1
    taken: dict[int, list[Question]] = defaultdict(list)
    for family in FAMILIES:
        for _, number, question in sorted(by_family[family], key=lambda entry: entry[:2])[:quota]:
            taken[number].append(question)
    return dict(sorted(taken.items()))
