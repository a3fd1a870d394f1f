# SPDX-License-Identifier: MIT
"""Videos of which the encoder computes some rows, and what transformers makes of them.

The oracle computes all rows of every layer. In front of each layer, and of what follows the tower, a copied row is
overwritten with the row that stands for it: it has that one's keys and values, and so whatever is computed sees what
it shall see. Copied rows have pixels of their own here, which must not matter.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flashvid_vllm.core.reuse import Reuse
from flashvid_vllm.models.encode_less import PIXELS, ROWS, SOURCE

GRID = (8, 12)  # patches of a Qwen video: 24 tokens; windows of 4 x 4 patches do not fill it


def random_reuse(num_frames: int, per_frame: int, share: float, seed: int = 0) -> Reuse:
    """Rows at random, each of the others a copy of any that is computed at its place, later ones too."""
    generator = torch.Generator().manual_seed(seed)
    computed = torch.rand(num_frames, per_frame, generator=generator) < share
    computed[torch.randint(num_frames, (per_frame,), generator=generator), torch.arange(per_frame)] = True
    frame = (torch.rand(num_frames, num_frames, per_frame, generator=generator) * computed).argmax(1)
    frame = torch.where(computed, torch.arange(num_frames)[:, None], frame)
    rows = computed.flatten().nonzero().flatten()
    stands = (frame * per_frame + torch.arange(per_frame)).flatten()
    return Reuse(rows, torch.searchsorted(rows, stands))


def frame_reuse(frames: list[int], per_frame: int) -> Reuse:
    """Whole temporal positions: of each the one that it is a copy of."""
    computed = sorted(set(frames))
    inside = torch.arange(per_frame)
    rows = torch.cat([t * per_frame + inside for t in computed])
    return Reuse(rows, torch.cat([computed.index(t) * per_frame + inside for t in frames]))


@dataclass(frozen=True)
class Video:
    """A video for a family's model: of Qwen [T * patches, C] pixels, of LLaVA frames [T, 3, side, side]."""

    model: Any
    pixels: Tensor
    num_frames: int

    @property
    def per_frame(self) -> int:
        """Rows of a temporal position."""
        return math.prod(GRID) // 4 if hasattr(self.model, "visual") else int(self.model.patches_per_frame())

    def computed(self, reuse: Reuse) -> Tensor:
        """The pixels of the computed rows, as the processor sends them."""
        if hasattr(self.model, "visual"):
            return self.pixels.unflatten(0, (-1, 4))[reuse.rows].flatten(0, 1)
        size, side = self.model.config.vision_config.patch_size, math.isqrt(self.per_frame)
        patches = nn.functional.unfold(self.pixels[..., : side * size, : side * size], size, stride=size)
        return patches.transpose(1, 2).reshape(-1, 3, size, size)[reuse.rows]

    def fields(self, reuse: Reuse | None) -> dict[str, Any]:
        """Arguments of `embed_multimodal`, FlashVID's settings excepted."""
        pixels = self.pixels if reuse is None else self.computed(reuse)
        tables = {} if reuse is None else {ROWS: [reuse.rows], SOURCE: [reuse.source]}
        if hasattr(self.model, "visual"):
            stamps = [[float(t) for t in range(self.num_frames)]]
            grid = torch.tensor([[self.num_frames, *GRID]])
            fields = {"video_grid_thw": grid, "second_per_grid_ts": torch.ones(1), "timestamps": stamps}
            return {"pixel_values_videos": pixels, **fields, **tables}
        return {PIXELS: [pixels], **tables}

    @torch.inference_mode()
    def encoded(self, reuse: Reuse | None = None) -> tuple[Tensor, Tensor]:
        """Features [T, N, D] and received attention [T, N] of our model."""
        pixels = self.pixels if reuse is None else self.computed(reuse)
        if not hasattr(self.model, "visual"):
            return self.model._encode(pixels, True, reuse)
        features, scores = self.model._encode(pixels, [self.num_frames, *GRID], True, reuse)
        return features.unflatten(0, (self.num_frames, -1)), scores.unflatten(0, (self.num_frames, -1))

    @torch.inference_mode()
    def expected(self, oracle: Any, reuse: Reuse) -> tuple[Tensor, Tensor]:
        """The same of transformers."""
        stands = reuse.rows[reuse.source]
        if hasattr(self.model, "visual"):
            grid = torch.tensor([[self.num_frames, *GRID]])
            order = torch.tensor(oracle.raster_index((self.num_frames, GRID[0] // 2, GRID[1] // 2)))
            units = order.argsort()[stands[order]]
            patches = (units[:, None] * 4 + torch.arange(4)).flatten()
            with _overwritten(oracle.model.model.visual.blocks, patches):
                pixels = self.model.visual.input_norm(self.pixels, torch.float32)  # which our tower does itself
                features, scores, _ = oracle._encode(pixels, grid)
            return features.flatten(0, 1)[stands].view_as(features), scores
        model = oracle.model.model
        layers, per_frame = model.vision_tower.encoder.layers, self.per_frame
        inside = stands
        if oracle.config.vision_feature_select_strategy == "default":  # class tokens stand for themselves
            length = per_frame + 1
            classes = torch.arange(self.num_frames)[:, None] * length
            inside = torch.cat([classes, (stands + stands // per_frame + 1).view(-1, per_frame)], 1).flatten()
        given, processor = SimpleNamespace(pixel_values_videos=self.pixels[None]), oracle.processor
        oracle.processor = SimpleNamespace(video_processor=lambda **_: given)
        try:
            with _overwritten(layers, inside), _overwritten([model.multi_modal_projector], stands):
                features, scores, _ = oracle.video(SimpleNamespace(frames=lambda: None))
        finally:
            oracle.processor = processor
        return features, scores


def noise(model: Any, num_frames: int, seed: int = 0) -> Video:
    """A video no two rows of which are alike."""
    generator, vision = torch.Generator().manual_seed(seed), model.config.vision_config
    if hasattr(model, "visual"):
        channels = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = 255 * torch.rand(num_frames * math.prod(GRID), channels, generator=generator)
    else:
        pixels = torch.randn(num_frames, 3, vision.image_size, vision.image_size, generator=generator)
    return Video(model, pixels, num_frames)


def still(model: Any, num_frames: int) -> Video:
    """A video of one picture."""
    one = noise(model, 1)
    return Video(model, one.pixels.repeat(num_frames, *(1,) * (one.pixels.dim() - 1)), num_frames)


@contextmanager
def _overwritten(modules: Iterable[nn.Module], stands: Tensor) -> Iterator[None]:
    """In front of each module, rows [..., D] are overwritten with those that stand for them."""

    def overwrite(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        args = (kwargs.pop("hidden_states"), *args) if "hidden_states" in kwargs else args
        return (args[0].flatten(0, -2)[stands].view_as(args[0]), *args[1:]), kwargs

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(overwrite, with_kwargs=True).remove)
        yield
