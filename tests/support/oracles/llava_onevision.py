# SPDX-License-Identifier: MIT
"""The oracle of LLaVA-OneVision: transformers on the same weights, one newline token after the whole video."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from ..engine import Clip
from .llava import LlavaOracle, SeenAttention


class Oracle(LlavaOracle):
    """The same weights in transformers."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.processor = AutoProcessor.from_pretrained(directory)
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.config = self.model.config
        self.tokenizer = self.processor.tokenizer
        self.language_model = self.model.model.language_model
        self.lm_head = self.model.lm_head
        self.newline = self.model.model.image_newline.detach()

    @torch.inference_mode()
    def video(self, clip: Clip) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """Features [T, N, D] after projector and pooling, received attention [T, N] after the same pooling."""
        pixels = self.processor.video_processor(
            videos=[clip.frames()], do_sample_frames=False, return_tensors="pt"
        ).pixel_values_videos
        model = self.model.model
        layers = model.vision_tower.encoder.layers
        selected = self.config.vision_feature_layer
        # hidden state i is what layer i - 1 returns, and of the last layer -1
        last = layers[selected if selected < 0 else selected - 1]
        with SeenAttention(last.self_attn) as seen:
            out = model.get_video_features(pixels.to(self.model.dtype)).pooler_output[0]
        received = seen.received()
        if self.config.vision_feature_select_strategy == "default":  # the class token
            received = received[:, 1:]
        attention = model.apply_pooling(received[..., None])[..., 0]
        frames, tokens = attention.shape
        side = int(tokens**0.5)
        return out[:-1].unflatten(0, (frames, tokens)), attention, (frames, side, side)  # the last row is the newline

    @torch.inference_mode()
    def image(self, image: np.ndarray) -> Tensor:
        """Rows [n, D]: the whole image, then its tiles at their best resolution with a newline a row."""
        inputs = self.processor.image_processor(images=[image], return_tensors="pt")
        rows: Tensor = self.model.model.get_image_features(
            inputs["pixel_values"].to(self.model.dtype), inputs["image_sizes"]
        ).pooler_output[0]
        return rows

    def lay_out(self, rows: Tensor, where: list[int], grid: tuple[int, int, int]) -> list[Tensor]:
        """One newline token behind all of it."""
        return [*rows, self.newline]
