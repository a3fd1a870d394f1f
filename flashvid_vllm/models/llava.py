# SPDX-License-Identifier: MIT
"""What the LLaVA families share: a SigLIP or CLIP tower, frames pooled by interpolation, newlines, 1-D positions."""

import math
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.multimodal.inputs import MultiModalKwargsItem

from ..attention import frame_attention, watch_attention
from ..compress import CompressedVideo
from ..config import FlashVidConfig
from ..processor import FlashVidProcessor
from .base import FlashVidModel


class LlavaProcessor(FlashVidProcessor):
    """Mixin for the family's processor; the paper's settings for it are FlashVidConfig's own defaults."""

    def video_token(self) -> int:
        return int(self.info.get_hf_config().video_token_index)

    def video_grid(self, item: MultiModalKwargsItem) -> tuple[int, int]:
        frames = item["pixel_values_videos"].data
        height, width = frames.shape[-2:]
        return len(frames), self.info._get_num_frame_tokens(image_width=width, image_height=height)


class LlavaModel(FlashVidModel):
    """Mixin for the family's model; a family says where its newlines go."""

    config: Any
    vision_tower: Any
    image_newline: Tensor
    _video_pixels_to_features: Any
    apply_pooling: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.flashvid_on:
            # vLLM counts a step of the encoder in compressed tokens: many raw videos would fit into one
            self.requires_sequential_video_encoding = True

    def add_newlines(self, video: CompressedVideo, num_frames: int, tokens_per_frame: int) -> Tensor:
        """The embeddings of a compressed video, newlines included: [B + newlines, D]."""
        raise NotImplementedError

    def tokens_per_frame(self) -> int:
        """Tokens of a frame after pooling."""
        vision = self.config.vision_config
        return math.ceil(vision.image_size // vision.patch_size / 2) ** 2

    def video_grids(self, **kwargs: Any) -> list[tuple[int, int]]:
        return [(len(frames), self.tokens_per_frame()) for frames in kwargs["pixel_values_videos"]]

    def _process_video_pixels(self, inputs: Any) -> Any:
        videos = inputs["pixel_values_videos"]
        if not any(self.flashvid_configs):
            return super()._process_video_pixels(inputs)  # type: ignore[misc]
        out: list[Tensor] = []
        for frames, config in zip(videos, self.flashvid_configs, strict=True):
            if config is None:
                out.extend(super()._process_video_pixels({"pixel_values_videos": frames[None]}))  # type: ignore[misc]
                continue
            features, attention = self._encode(frames, config)
            out.append(self.add_newlines(self.compress_video(features, attention, config), *features.shape[:2]))
        return out

    def _encode(self, frames: Tensor, config: FlashVidConfig) -> tuple[Tensor, Tensor | None]:
        """Pooled features [T, N, D] and received attention [T, N] of one video."""
        attention = self.vision_tower.vision_model.encoder.layers[-1].self_attn.attn
        with watch_attention(attention) if config.needs_attention else nullcontext() as seen:
            features = self._video_pixels_to_features(self.vision_tower, frames)
        if seen is None:
            return features, None
        scores = frame_attention(*seen(), len(frames), self.flashvid_backend)
        if attention.num_heads != self.config.vision_config.num_attention_heads:
            scores = tensor_model_parallel_all_reduce(scores) / get_tensor_model_parallel_world_size()
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        # CLIP's class token comes first: it took part in the softmax, but is no token of the video
        return features, self.apply_pooling(scores[:, -patches:, None].contiguous()).squeeze(-1)
