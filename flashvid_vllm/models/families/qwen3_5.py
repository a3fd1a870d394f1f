# SPDX-License-Identifier: MIT
"""Qwen3.5, dense and mixture of experts: Qwen3-VL's tower and prompt before hybrid attention, no DeepStack."""

from vllm.model_executor.models import qwen3_5 as upstream
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..processor import FlashVidInfo
from .qwen3_vl import Processor, StampedModel


class ProcessingInfo(FlashVidInfo, upstream.Qwen3_5ProcessingInfo):
    pass


class MoeProcessingInfo(FlashVidInfo, upstream.Qwen3_5MoeProcessingInfo):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class Qwen3_5ForConditionalGeneration(StampedModel, upstream.Qwen3_5ForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class Qwen3_5MoeForConditionalGeneration(StampedModel, upstream.Qwen3_5MoeForConditionalGeneration):
    pass
