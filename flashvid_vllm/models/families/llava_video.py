# SPDX-License-Identifier: MIT
"""LLaVA-Video (``LlavaQwenForCausalLM``), which vLLM lacks: on LLaVA-OneVision's parts, plain and compressed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)
from vllm.model_executor.models import llava_onevision as upstream
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.compress import CompressedVideo
from ..processor import FlashVidInfo
from .llava import LlavaModel, LlavaProcessor
from .llava_video_config import LlavaVideoConfig

IMAGE = "<image>"
VIDEO = f"<|endoftext|>{IMAGE}"  # the released tokenizer has no token for a video


def pooled_side(config: Any) -> int:
    """Tokens along a side of a frame."""
    patches = config.vision_config.image_size // config.vision_config.patch_size
    return math.ceil(patches / 2) if config.mm_spatial_pool_mode == "bilinear" else patches // 2


def num_newlines(config: Any, num_frames: int, compressed: bool) -> int:
    """Newline tokens of a video. Once tokens are dropped there are no rows: one after each frame, as the paper's
    code has it."""
    rows = num_frames if compressed else num_frames * pooled_side(config)
    return {"grid": rows, "frame": num_frames, "one_token": 1, "no_token": 0}[config.mm_newline_position]


class PlainInfo(upstream.LlavaOnevisionProcessingInfo):
    def get_hf_config(self) -> Any:
        return self.ctx.get_hf_config(LlavaVideoConfig)

    def get_hf_processor(self, **kwargs: object) -> Any:
        # the checkpoint has SigLIP's own settings only: a frame, and a tile of an image, is stretched to its square
        config = self.get_hf_config()
        vision = config.vision_config
        pixels: dict[str, Any] = {
            "size": {"height": vision.image_size, "width": vision.image_size},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 3,  # bicubic
        }
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=config.image_grid_pinpoints),
            self.get_tokenizer(),
            LlavaOnevisionVideoProcessor(**pixels),
            num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            vision_aspect_ratio=config.vision_aspect_ratio,
        )

    def _get_num_frame_tokens(self, *, image_width: int, image_height: int) -> int:
        return pooled_side(self.get_hf_config()) ** 2

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        tokens = num_frames * self._get_num_frame_tokens(image_width=image_width, image_height=image_height)
        return tokens + num_newlines(self.get_hf_config(), num_frames, compressed=False)


class DummyInputs(upstream.LlavaOnevisionDummyInputsBuilder):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE * mm_counts.get("image", 0) + VIDEO * mm_counts.get("video", 0)


class PlainProcessor(upstream.LlavaOnevisionMultiModalProcessor):
    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        return super().apply(replace(inputs, prompt=self._mark_videos(inputs)), timing_ctx)

    def _mark_videos(self, inputs: Any) -> list[int]:
        """The prompt's ids with one id for each video given, in place of VIDEO. Only if it holds too few of these
        and there are no images, IMAGE will do, as LLaVA-Video's own code writes it; any further one is text."""
        config, tokenizer = self.info.get_hf_config(), self.info.get_tokenizer()
        before, image = tokenizer.encode(VIDEO, add_special_tokens=False)
        ids = list(inputs.prompt)
        given = inputs.mm_data_items.get_count("video", strict=False)
        images = [i for i, token in enumerate(ids) if token == image]
        marked = [i for i in images if ids[max(i - 1, 0)] == before]
        bare = [i for i in images if i not in marked]
        if inputs.mm_data_items.get_count("image", strict=False):
            bare = []
        places = sorted([*marked, *bare[: max(given - len(marked), 0)]])
        if len(places) < given:
            raise ValueError(
                f"the prompt has {len(places)} places for videos ({VIDEO}) and comes with {given} videos; "
                "write one for each"
            )
        for place in reversed(places[:given]):
            ids[place] = config.video_token_index
            if place in marked:
                del ids[place - 1]
        return ids


class PlainModel(upstream.LlavaOnevisionForConditionalGeneration):
    """LLaVA-Video as released, without compression."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.vision_tower.vision_tower.": "vision_tower.",
            "model.mm_projector.0.": "multi_modal_projector.linear_1.",
            "model.mm_projector.2.": "multi_modal_projector.linear_2.",
            "model.image_newline": "image_newline",
            "lm_head.": "language_model.lm_head.",
            "model.": "language_model.model.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return VIDEO if modality.startswith("video") else super().get_placeholder_str(modality, i)

    def apply_pooling(self, image_features: Tensor, stride: int = 2) -> Tensor:
        if self.config.mm_spatial_pool_mode == "bilinear":
            return super().apply_pooling(image_features, stride)
        side = math.isqrt(image_features.shape[1])
        maps = image_features.unflatten(1, (side, side)).movedim(-1, 1)
        return nn.functional.avg_pool2d(maps, stride).movedim(1, -1).flatten(1, 2)

    def _process_video_pixels(self, inputs: Any) -> list[Tensor]:
        videos = inputs["pixel_values_videos"]
        return [self.plain_rows(self._video_pixels_to_features(self.vision_tower, frames)) for frames in videos]

    def plain_rows(self, features: Tensor) -> Tensor:
        """[T, N, D] -> [T * N + newlines, D]."""
        newlines = num_newlines(self.config, len(features), compressed=False)
        tokens = features.flatten(0, 1)
        if newlines == 0:
            return tokens
        after = torch.arange(len(tokens), device=tokens.device) * newlines // len(tokens)
        return insert_newlines(tokens, after, self.image_newline, newlines)


def insert_newlines(tokens: Tensor, line: Tensor, newline: Tensor, num_lines: int) -> Tensor:
    """``tokens`` [B, D] of lines ``line`` [B] (ascending), each of ``num_lines`` lines ended with ``newline`` [D]."""
    rows = newline.to(tokens.dtype).repeat(len(tokens) + num_lines, 1)
    rows[torch.arange(len(tokens), device=tokens.device) + line] = tokens
    return rows


class ProcessingInfo(FlashVidInfo, PlainInfo):
    pass


class Processor(LlavaProcessor, PlainProcessor):
    def video_layout(self, item: Any, per_frame: Sequence[int]) -> list[int]:
        config = self.info.get_hf_config()
        compressed = sum(per_frame) < pooled_side(config) ** 2 * len(per_frame)
        return [self.video_token()] * (sum(per_frame) + num_newlines(config, len(per_frame), compressed))


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class LlavaQwenForCausalLM(LlavaModel, PlainModel):
    plain_rows = PlainModel.plain_rows

    def tokens_per_frame(self) -> int:
        return pooled_side(self.config) ** 2

    def add_newlines(self, video: CompressedVideo, num_frames: int, tokens_per_frame: int) -> Tensor:
        newlines = num_newlines(self.config, num_frames, compressed=True)
        frame = video.source_index // tokens_per_frame
        line = frame if newlines == num_frames else torch.zeros_like(frame)
        return insert_newlines(video.tokens, line, self.image_newline, newlines)

    def token_rows(self, source: Tensor, num_frames: int, tokens_per_frame: int) -> Tensor:
        total = num_frames * tokens_per_frame
        newlines = num_newlines(self.config, num_frames, compressed=len(source) < total)
        row = torch.arange(len(source), device=source.device)
        if newlines == num_frames or len(source) == total:  # one behind each of so many equal parts
            return row + source * newlines // total
        return row

    def num_newlines(self, num_frames: int) -> int:
        return num_newlines(self.config, num_frames, compressed=False)

    def newline_places(self, num_frames: int, tokens_per_frame: int) -> Tensor:
        lines = num_newlines(self.config, num_frames, compressed=True)
        tokens, newlines = num_frames * tokens_per_frame, self.num_newlines(num_frames)
        ends = torch.arange(1, lines + 1)  # of a frame, or of the video
        return (tokens + newlines) * ends // max(lines, 1) - 1
