# SPDX-License-Identifier: MIT
"""Hugging Face transformers as the oracle: the compressed prompt of Qwen2.5-VL put together by hand.

Nothing of the plugin but `flashvid_vllm.compress` (whose own oracles are the golden vectors and brute
force) is used: features, received attention, placement and positions are worked out here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.video_utils import VideoMetadata

from flashvid_vllm import FlashVidConfig, compress

from ..engine import Clip

QWEN: dict[str, Any] = {"min_segments": 4, "selection": "attention_diversity"}


class Oracle:
    """The same weights in transformers."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.processor = AutoProcessor.from_pretrained(directory)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.config = self.model.config

    def assemble(
        self, text: str, clips: list[Clip], images: list[np.ndarray], settings: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """The prompt as the language model must receive it.

        Returns:
            embeddings [L', D] and positions [3, L'] (those of the full prompt, for what is kept).
        """
        ids = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        embed = self.model.get_input_embeddings()
        clips, images = list(clips), list(images)
        rows: list[Tensor] = []
        positions: list[list[int]] = []
        next_position = 0
        for token in ids:
            if token == self.config.video_token_id:
                clip = clips.pop(0)
                features, attention, grid = self.video(clip)
                kept, where = _compress(features, attention, settings)
                step = 2 * clip.seconds_per_frame * self.config.vision_config.tokens_per_second
            elif token == self.config.image_token_id:
                kept, grid = self.image(images.pop(0))
                where, step = range(len(kept)), 1.0
            else:
                rows.append(embed(torch.tensor([token]))[0])
                positions.append([next_position] * 3)
                next_position += 1
                continue
            _, height, width = grid
            full = [
                [int(t * step), y, x] for t in range(grid[0]) for y in range(height) for x in range(width)
            ]  # fmt: skip
            rows += list(kept)
            positions += [[next_position + p for p in full[i]] for i in where]
            next_position += max(max(p) for p in full) + 1
        self.next_position = next_position
        return torch.stack(rows), torch.tensor(positions).T

    def video(self, clip: Clip) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """features [T, N, D], received attention [T, N] and the grid of output tokens."""
        inputs = self.processor.video_processor(
            videos=[clip.frames()],
            video_metadata=[VideoMetadata(**{k: v for k, v in clip.metadata().items() if k != "do_sample_frames"})],
            do_sample_frames=False,
            return_tensors="pt",
        )
        return self._encode(inputs["pixel_values_videos"], inputs["video_grid_thw"])

    def image(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int, int]]:
        inputs = self.processor.image_processor(images=[image], return_tensors="pt")
        features, _, grid = self._encode(inputs["pixel_values"], inputs["image_grid_thw"])
        return features.flatten(0, 1), grid

    @torch.inference_mode()
    def _encode(self, pixels: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        visual = self.model.model.visual
        frames, height, width = grid_thw[0].tolist()
        seen = {}
        block = visual.blocks[visual.config.fullatt_block_indexes[-1]].attn

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            seen["hidden"] = args[0] if args else kwargs["hidden_states"]
            seen["rotary"] = kwargs["position_embeddings"]

        hook = block.register_forward_pre_hook(keep, with_kwargs=True)
        features = visual(pixels.to(visual.dtype), grid_thw=grid_thw).pooler_output
        hook.remove()
        q, k, _ = block.qkv(seen["hidden"]).unflatten(1, (3, block.num_heads, -1)).unbind(1)
        q, k = (x.float() for x in apply_rotary_pos_emb_vision(q, k, *seen["rotary"]))
        q, k = (x.unflatten(0, (frames, -1)).transpose(1, 2) for x in (q, k))
        weights = (q @ k.transpose(-1, -2) * block.scaling).softmax(-1)
        received = weights.mean((1, 2)).flatten()  # over heads and queries; patches in window order
        merged = received.unflatten(0, (-1, 4)).mean(1)
        cells_y, cells_x = height // 2, width // 2
        order = _window_order(
            frames, cells_y, cells_x, cells=visual.config.window_size // 2 // visual.config.patch_size
        )
        attention = torch.empty_like(merged)
        attention[order] = merged
        grid = (frames, cells_y, cells_x)
        return features.unflatten(0, (frames, -1)), attention.unflatten(0, (frames, -1)), grid

    @torch.inference_mode()
    def greedy(self, embeddings: Tensor, positions: Tensor, max_tokens: int) -> tuple[list[int], list[Tensor]]:
        """Chosen ids and log-probabilities [vocabulary] of every step; no cache, the whole sequence again."""
        embed = self.model.get_input_embeddings()
        next_position, chosen, logprobs = self.next_position, [], []
        for _ in range(max_tokens):
            out = self.model.model.language_model(
                inputs_embeds=embeddings[None], position_ids=positions[:, None], use_cache=False
            ).last_hidden_state[0, -1]
            step = self.model.lm_head(out).float().log_softmax(-1)
            chosen.append(int(step.argmax()))
            logprobs.append(step)
            embeddings = torch.cat([embeddings, embed(torch.tensor([chosen[-1]]))])
            positions = torch.cat([positions, torch.full((3, 1), next_position)], dim=1)
            next_position += 1
        return chosen, logprobs


def _compress(features: Tensor, attention: Tensor, settings: dict[str, Any] | None) -> tuple[Tensor, Any]:
    if settings is None:
        return features.flatten(0, 1), range(features.shape[0] * features.shape[1])
    video = compress(features, attention, FlashVidConfig(**(QWEN | settings)))
    return video.tokens, video.source_index.tolist()


def _window_order(frames: int, cells_y: int, cells_x: int, cells: int) -> list[int]:
    """Raster index of every output token in the tower's window order, by brute force."""
    return [
        (t * cells_y + y) * cells_x + x
        for t in range(frames)
        for wy in range(0, cells_y, cells)
        for wx in range(0, cells_x, cells)
        for y in range(wy, min(wy + cells, cells_y))
        for x in range(wx, min(wx + cells, cells_x))
    ]
