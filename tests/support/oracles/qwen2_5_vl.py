# SPDX-License-Identifier: MIT
"""The oracle of Qwen2.5-VL: windowed tower, one block of tokens a video, time in the positions."""

from typing import Any

from torch import Tensor

from ..engine import Clip
from .mrope import MropeOracle, Prompt


class Oracle(MropeOracle):
    """The same weights in transformers."""

    def tower(self, pixels: Tensor, grid_thw: Tensor) -> Tensor:
        """Rows [n, D]: transformers brings them from window into raster order itself."""
        return self.model.model.visual(pixels, grid_thw=grid_thw).pooler_output

    def last_full_block(self) -> Any:
        """The last of the few blocks without windows."""
        visual = self.model.model.visual
        return visual.blocks[visual.config.fullatt_block_indexes[-1]]

    def raster_index(self, grid: tuple[int, int, int]) -> list[int]:
        """Raster index of every output token in the tower's window order, by brute force."""
        frames, cells_y, cells_x = grid
        vision = self.config.vision_config
        cells = vision.window_size // 2 // vision.patch_size
        return [
            (t * cells_y + y) * cells_x + x
            for t in range(frames)
            for wy in range(0, cells_y, cells)
            for wx in range(0, cells_x, cells)
            for y in range(wy, min(wy + cells, cells_y))
            for x in range(wx, min(wx + cells, cells_x))
        ]

    def lay_out(self, prompt: Prompt, clip: Clip, grid: tuple[int, int, int], rows: Tensor, where: list[int]) -> None:
        """All tokens in a row; a frame's time in seconds sets its first coordinate."""
        step = 2 * clip.seconds_per_frame * self.config.vision_config.tokens_per_second
        full = [(int(t * step), y, x) for t in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
        prompt.grid(self.config.video_token_id, rows, where, full)
