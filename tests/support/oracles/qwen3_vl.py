# SPDX-License-Identifier: MIT
"""The oracle of Qwen3-VL, dense and mixture of experts: a timestamp before every frame, DeepStack."""

from typing import Any

import torch
from torch import Tensor

from ..engine import Clip
from .mrope import MropeOracle, Prompt


class Oracle(MropeOracle):
    """The same weights in transformers."""

    def channels(self) -> int:
        """C = D * (1 + levels of DeepStack)."""
        return self.width * (1 + len(self.config.vision_config.deepstack_visual_indexes))

    def tower(self, pixels: Tensor, grid_thw: Tensor) -> Tensor:
        """Rows [n, C]: the tower's output, then one level of DeepStack after the other."""
        out = self.model.model.visual(pixels, grid_thw=grid_thw)
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=1)

    def lay_out(self, prompt: Prompt, clip: Clip, grid: tuple[int, int, int], rows: Tensor, where: list[int]) -> None:
        """`<seconds>`, vision start, the frame's tokens, vision end for every two frames of the clip.

        All of it stays for a frame that keeps nothing. A frame is a grid at time 0 of its own, so
        its coordinates start where the text before it ends, and the text after it starts behind
        the larger side of the full grid.
        """
        frames, height, width = grid
        size = height * width
        full = [(0, y, x) for y in range(height) for x in range(width)]
        for t in range(frames):
            pair = [2 * t, min(2 * t + 1, clip.num_frames - 1)]  # an odd clip's last frame is doubled
            seconds = sum(i / clip.metadata()["fps"] for i in pair) / 2
            start = self.processor.tokenizer(f"<{seconds:.1f} seconds>", add_special_tokens=False).input_ids
            start.append(self.config.vision_start_token_id)
            prompt.text(start, self.embed(start))
            inside = [i for i, source in enumerate(where) if source // size == t]
            prompt.grid(self.config.video_token_id, rows[inside], [where[i] % size for i in inside], full)
            end = [self.config.vision_end_token_id]
            prompt.text(end, self.embed(end))

    def deepstack(self, extra: Tensor) -> dict[str, Any]:
        """What each of the first layers' outputs gets added, and where: text has rows of zeros."""
        visual = (extra != 0).any(1)
        levels = [extra[visual, start : start + self.width] for start in range(0, extra.shape[1], self.width)]
        return {"visual_pos_masks": visual[None], "deepstack_visual_embeds": levels}
