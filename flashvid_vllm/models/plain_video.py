# SPDX-License-Identifier: MIT
"""What is known of a video before its settings are: how many tokens it has, and what becomes of their number."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.processing import PromptUpdateDetails

from ..core.budget import Budget, plan
from ..core.config import FlashVidConfig


@dataclass
class PlainVideo(PromptUpdateDetails):
    """What stands for a video in an uncompressed prompt, and what it takes to shorten it: ``num_frames`` temporal
    positions of ``tokens_per_frame`` visual tokens, the item's small ``fields`` without its pixels, and how many of its
    ids are ``embeds``. vLLM keeps it beside the video wherever that is cached."""

    num_frames: int = 0
    tokens_per_frame: int = 0
    fields: MultiModalKwargsItem = field(default_factory=MultiModalKwargsItem)
    embeds: int = 0

    def is_compressed_by(self, config: FlashVidConfig | None) -> bool:
        """Whether anything is dropped or merged."""
        return config is not None and not plan(self.num_frames, self.tokens_per_frame, config).is_identity


def plain_video_of(updates: Sequence[Any]) -> PlainVideo:
    """What vLLM has cached beside a video: of its prompt updates the one there is."""
    (update,) = updates
    assert isinstance(update.content, PlainVideo)
    return update.content


def count_tokens(config: FlashVidConfig | None, num_frames: int, tokens_per_frame: int) -> int:
    """Placeholders of a video of ``num_frames`` x ``tokens_per_frame`` visual tokens; None: it stays as it is."""
    budget: Budget | None = plan(num_frames, tokens_per_frame, config) if config else None
    return budget.tokens if budget else num_frames * tokens_per_frame
