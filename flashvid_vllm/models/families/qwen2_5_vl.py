# SPDX-License-Identifier: MIT
"""Qwen2.5-VL: a tower with windowed attention in most layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.reuse import Reuse
from ..processor import FlashVidInfo
from ..upload import upload
from .mrope import MRopeModel, MRopeProcessor
from .mrope_rows import RowsTower, in_window_order


class ProcessingInfo(FlashVidInfo, upstream.Qwen2_5_VLProcessingInfo):
    pass


class Processor(MRopeProcessor, upstream.Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=ProcessingInfo, dummy_inputs=upstream.Qwen2_5_VLDummyInputsBuilder
)
class Qwen2_5_VLForConditionalGeneration(MRopeModel, upstream.Qwen2_5_VLForConditionalGeneration):
    def scoring_block(self) -> Any:
        return self.visual.blocks[max(self.visual.fullatt_block_indexes)]

    def raster_order(self, scores: Tensor, thw: Sequence[int]) -> Tensor:
        # the tower works in window order: row i of it is output token window_index[i]
        window_index = self.visual.get_rope_by_thw(*thw)[2]
        return torch.empty_like(scores).index_copy_(0, upload(window_index, scores.device), scores)

    def rows_tower(self, reuse: Reuse, thw: list[int]) -> RowsTower:
        return in_window_order(self.visual, thw, reuse)
