# SPDX-License-Identifier: MIT
"""LLaVA-OneVision: one newline after the whole video."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_onevision as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.compress import CompressedVideo
from ..processor import FlashVidInfo
from .llava import LlavaModel, LlavaProcessor


class ProcessingInfo(FlashVidInfo, upstream.LlavaOnevisionProcessingInfo):
    pass


class Processor(LlavaProcessor, upstream.LlavaOnevisionMultiModalProcessor):
    def video_layout(self, item: Any, per_frame: Sequence[int]) -> list[int]:
        return [self.video_token()] * (sum(per_frame) + 1)


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=ProcessingInfo, dummy_inputs=upstream.LlavaOnevisionDummyInputsBuilder
)
class LlavaOnevisionForConditionalGeneration(LlavaModel, upstream.LlavaOnevisionForConditionalGeneration):
    def add_newlines(self, video: CompressedVideo, num_frames: int, tokens_per_frame: int) -> Tensor:
        return torch.cat([video.tokens, self.image_newline[None]])

    def token_rows(self, source: Tensor, num_frames: int, tokens_per_frame: int) -> Tensor:
        return torch.arange(len(source), device=source.device)

    def plain_rows(self, features: Tensor) -> Tensor:
        return torch.cat([features.flatten(0, 1), self.image_newline[None]])

    def num_newlines(self, num_frames: int) -> int:
        return 1

    def newline_places(self, num_frames: int, tokens_per_frame: int) -> Tensor:
        return torch.tensor([num_frames * tokens_per_frame])
