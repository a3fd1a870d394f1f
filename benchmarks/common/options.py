# SPDX-License-Identifier: MIT
"""Values of options: of our command lines, and of `vllm serve`."""

import argparse
from collections.abc import Callable
from math import ceil
from typing import Any

from .clips import Video


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An argparse type: values above 0, with commas between them."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"expected numbers above 0 such as 1,2,4, got {text!r}")
        return values

    return parse


def prompt_room(video: Video, frames: int) -> int:
    """Tokens that hold the uncompressed video with any supported family, the question and the answer.

    vLLM refuses a video with more placeholders than one step's budget.
    """
    frames = min(frames, video.frames) + 2
    by_size = ceil(frames / 2) * ceil(video.width / 28 + 1) * ceil(video.height / 28 + 1)  # Qwen's: the finest
    fixed = frames * 196  # LLaVA-OneVision, whatever the size
    return ceil((max(by_size, fixed) + 1024) / 1024) * 1024
