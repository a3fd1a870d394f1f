# SPDX-License-Identifier: MIT
"""The oracle of LLaVA-Video: a forward pass of its own over a checkpoint with the original names.

transformers has no class for it. The tower and the language model are transformers', between them is
plain torch as LLaVA-NeXT describes it: the tower without its last layer and without the norm behind it,
two linear layers with a GELU, pooling, newline tokens.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    LlavaOnevisionImageProcessor,
    Qwen2Config,
    Qwen2Model,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

from ..engine import Clip
from .llava import LlavaOracle, SeenAttention

TOWER, PROJECTOR = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."


class Oracle(LlavaOracle):
    """The same weights, loaded by their original names. `config` is config.json, and may be changed."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.dtype = dtype
        weights = {name: weight.to(dtype) for name, weight in load_file(directory / "model.safetensors").items()}

        def take(prefix: str) -> dict[str, Tensor]:
            names = [name for name in weights if name.startswith(prefix)]
            return {name.removeprefix(prefix): weights.pop(name) for name in names}

        vision = dict(self.config["vision_config"])
        vision["num_hidden_layers"] += self.config["mm_vision_select_layer"] + 1  # -2: all but the last one run
        self.tower = SiglipVisionModel(
            SiglipVisionConfig(**vision, vision_use_head=False, attn_implementation="eager")
        ).eval()
        self.tower.to(dtype).load_state_dict(take(TOWER))
        width = self.config["hidden_size"]
        self.projector = nn.Sequential(
            nn.Linear(self.config["mm_hidden_size"], width), nn.GELU(), nn.Linear(width, width)
        )
        self.projector.to(dtype).load_state_dict(take(PROJECTOR))
        self.newline = weights.pop("model.image_newline")
        self.lm_head = nn.Linear(width, self.config["vocab_size"], bias=False)
        self.lm_head.to(dtype).load_state_dict(take("lm_head."))
        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        names += " max_position_embeddings rms_norm_eps hidden_act"
        text = {name: self.config[name] for name in names.split()}
        rope = {"rope_type": "default", "rope_theta": self.config["rope_theta"]}
        self.language_model = Qwen2Model(Qwen2Config(**text, rope_parameters=rope, attn_implementation="eager")).eval()
        self.language_model.to(dtype).load_state_dict(take("model."))
        assert not weights, f"weights that nothing uses: {list(weights)}"

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        # a frame is stretched to the tower's square, as a still is before it is cut into tiles
        self.frame_processor = SiglipImageProcessor.from_pretrained(directory)
        pixels = json.loads((directory / "preprocessor_config.json").read_text())
        self.image_processor = LlavaOnevisionImageProcessor(
            image_grid_pinpoints=self.config["image_grid_pinpoints"],
            **{name: pixels[name] for name in ("size", "image_mean", "image_std", "resample", "rescale_factor")},
        )

    @property
    def side(self) -> int:
        """Patches along a side of the tower's square."""
        vision = self.config["vision_config"]
        return int(vision["image_size"]) // int(vision["patch_size"])

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[F, 3, height, width] -> features [F, patches, D] of the projector, received attention [F, patches]."""
        with SeenAttention(self.tower.encoder.layers[-1].self_attn) as seen:
            out = self.tower(pixels.to(self.dtype), output_hidden_states=True)
        features: Tensor = self.projector(out.hidden_states[-1])  # before the tower's last norm
        return features, seen.received()

    def pool(self, patches: Tensor) -> Tensor:
        """[F, patches, C] -> [F, height, width, C]."""
        mode, stride = self.config["mm_spatial_pool_mode"], self.config.get("mm_spatial_pool_stride", 2)
        maps = patches.unflatten(1, (self.side, self.side)).movedim(-1, 1)
        if mode == "bilinear":
            maps = functional.interpolate(maps, size=[math.ceil(self.side / stride)] * 2, mode="bilinear")
        elif mode == "average":  # without the last row and column of an odd grid
            maps = functional.avg_pool2d(maps, stride)
        else:
            raise ValueError(f"mm_spatial_pool_mode={mode!r}")
        return maps.movedim(1, -1)

    @torch.inference_mode()
    def video(self, clip: Clip) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """Features [T, N, D] after projector and pooling, received attention [T, N] after the same pooling."""
        features, received = self.encode(self.frame_processor(list(clip.frames()), return_tensors="pt").pixel_values)
        pooled = self.pool(features)
        frames, height, width, _ = pooled.shape
        return pooled.flatten(1, 2), self.pool(received[..., None])[..., 0].flatten(1), (frames, height, width)

    @torch.inference_mode()
    def image(self, image: np.ndarray) -> Tensor:
        """Rows [n, D]: the whole image, then its tiles at their best resolution with a newline a row."""
        inputs = self.image_processor(images=[image], return_tensors="pt")
        whole, *tiles = self.encode(inputs["pixel_values"][0])[0]
        size = self.config["vision_config"]["image_size"]
        down, across = get_anyres_image_grid_shape(image.shape[:2], self.config["image_grid_pinpoints"], size)
        lines = [
            torch.cat([tile.unflatten(0, (self.side, self.side)) for tile in tiles[y * across : (y + 1) * across]], 1)
            for y in range(down)
        ]
        maps = unpad_image(torch.cat(lines).movedim(-1, 0), image.shape[:2])  # [D, height, width]
        most = int(self.config["image_aspect_ratio"].removeprefix("anyres_max_"))
        ratio = math.sqrt(maps[0].numel() / (most * self.side**2))
        if ratio > 1.1:
            smaller = [int(maps.shape[1] // ratio), int(maps.shape[2] // ratio)]
            maps = functional.interpolate(maps[None], smaller, mode="bilinear")[0]
        rows = [row for line in maps.permute(1, 2, 0) for row in [*line, self.newline]]
        return torch.stack([*whole, *rows])

    def lay_out(self, rows: Tensor, where: list[int], grid: tuple[int, int, int]) -> list[Tensor]:
        """Newlines by ``mm_newline_position``: of a whole video as in the plain model, else one a frame at most.

        "grid" ends every row of a frame with one and "frame" every frame. Once tokens are dropped there
        are no rows any more: both then end every frame's kept tokens with one, also of a frame that keeps
        none. "one_token" ends the video with one, "no_token" has none.
        """
        position = self.config["mm_newline_position"]
        frames, height, width = grid
        whole = len(where) == frames * height * width
        every = {"grid": width if whole else height * width, "frame": height * width, "one_token": math.prod(grid)}
        if position not in every:
            assert position == "no_token", position
            return list(rows)
        laid_out: list[Tensor] = []
        for start in range(0, math.prod(grid), every[position]):
            laid_out += [
                row for row, source in zip(rows, where, strict=True) if start <= source < start + every[position]
            ]
            laid_out.append(self.newline)
        return laid_out
