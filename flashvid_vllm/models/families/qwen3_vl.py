# SPDX-License-Identifier: MIT
"""Qwen3-VL, dense and mixture of experts: DeepStack, a time stamp before each frame, interleaved M-RoPE."""

from collections.abc import Sequence
from typing import Any

from vllm.model_executor.models import qwen3_vl as upstream
from vllm.model_executor.models import qwen3_vl_moe as upstream_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.reuse import Reuse
from ..processor import FlashVidInfo
from .mrope import MRopeModel, MRopeProcessor
from .mrope_rows import RowsTower, in_raster_order


def stamped_frames(config: Any, tokenizer: Any, item: Any, per_frame: Sequence[int]) -> list[int]:
    """Ids of a video: for every frame its time stamp, then its ``per_frame[t]`` tokens between vision marks."""
    layout = upstream.Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=list(per_frame),
        timestamps=item["timestamps"].data,
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
    )
    return list(layout.full)


class Processor(MRopeProcessor, upstream.Qwen3VLMultiModalProcessor):
    def video_layout(self, item: Any, per_frame: Sequence[int]) -> list[int]:
        return stamped_frames(self.info.get_hf_config(), self.info.get_tokenizer(), item, per_frame)


class StampedModel(MRopeModel):
    """Mixin: the model of a family whose frames have time stamps."""

    _tokenizer: Any

    def full_layout(self, item: Any) -> list[int]:
        num_frames, n = self._video_grid(item["video_grid_thw"].data.tolist())
        return stamped_frames(self.config, self._tokenizer, item, [n] * num_frames)

    def rows_tower(self, reuse: Reuse, thw: list[int]) -> RowsTower:
        return in_raster_order(self.visual, thw, reuse)


class ProcessingInfo(FlashVidInfo, upstream.Qwen3VLProcessingInfo):
    pass


class MoeProcessingInfo(FlashVidInfo, upstream_moe.Qwen3VLMoeProcessingInfo):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=upstream.Qwen3VLDummyInputsBuilder)
class Qwen3VLForConditionalGeneration(StampedModel, upstream.Qwen3VLForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=MoeProcessingInfo, dummy_inputs=upstream.Qwen3VLDummyInputsBuilder
)
class Qwen3VLMoeForConditionalGeneration(StampedModel, upstream_moe.Qwen3VLMoeForConditionalGeneration):
    pass
