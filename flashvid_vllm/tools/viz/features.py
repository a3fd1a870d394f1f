# SPDX-License-Identifier: MIT
"""Features and received attention of frames (ALGORITHM, Received attention), from a vision tower in transformers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flashvid_vllm.ops as ops

from ...core.levels import PixelScale, frame_rows, merged_rows
from ...models import FAMILIES
from ...models.rope import keeps_positions
from ..errors import UserError
from . import need

_WATCHED = "sdpa_watched"  # our name among transformers' attention functions; one with "flash" is taken for a kernel
_OFFERED = {name: family for name, family in FAMILIES.items() if name != "LlavaQwenForCausalLM"}  # not in transformers


@dataclass(frozen=True)
class Encoded:
    """A video as the compression gets it.

    Attributes:
        features: [T, N, D] float32.
        attention: [T, N] float32.
        grid: rows and columns of tokens in a frame; their product is N.
        frames_each: frames that share a temporal position.
        preset: the paper's settings for the model's family.
        levels: [T, P, C] uint8, the pixels of the rows that the tower computes (`flashvid_vllm.core.levels`).
        row_grid: rows of these over a frame's height and width; their product is P.
        keeps_positions: whether a server has the LLM see kept tokens at their positions, unless told otherwise.
    """

    features: Tensor
    attention: Tensor
    grid: tuple[int, int]
    frames_each: int
    preset: Mapping[str, Any]
    levels: Tensor
    row_grid: tuple[int, int]
    keeps_positions: bool


def encode_with_model(name: str, frames: np.ndarray) -> Encoded:
    """Encode frames [F, height, width, 3] with the vision tower of a video LLM, a directory or a hub name."""
    transformers = _transformers()
    released, _ = _found(name, lambda: transformers.PreTrainedConfig.get_config_dict(name))
    architecture = (released.get("architectures") or ["?"])[0]
    if architecture not in _OFFERED:
        if architecture in FAMILIES:
            raise UserError(f"{name} is a {architecture}, which transformers cannot load; try --clip")
        known = ", ".join(f"{offered} ({family.examples})" for offered, family in _OFFERED.items())
        raise UserError(f"{name} is a {architecture}; this can look through {known}")
    config = _found(name, lambda: transformers.AutoConfig.from_pretrained(name))
    # of the language model only the embeddings: its layers are not read
    config.text_config.num_hidden_layers = 0
    config.text_config.layer_types = []
    model = _load(transformers.AutoModel, name, config=config)
    processor = _found(name, lambda: transformers.AutoVideoProcessor.from_pretrained(name))
    pixels = processor(videos=[frames], do_sample_frames=False, return_tensors="pt").to(model.device)
    is_llava = architecture.startswith("Llava")
    features, attention, grid = (_llava_onevision if is_llava else _qwen)(model, pixels)
    frames_each = 1 if len(features) == len(frames) else 2
    if is_llava:
        rows, row_grid = _patches(pixels.pixel_values_videos[0], model.config.vision_config)
    else:
        vision, row_grid = model.visual.config, grid
        sizes = (vision.spatial_merge_size**2, vision.temporal_patch_size, vision.patch_size)
        rows = merged_rows(pixels.pixel_values_videos, (len(features), math.prod(grid)), *sizes)
    levels = PixelScale.of(processor).levels(rows.cpu())
    family = _OFFERED[architecture]
    return Encoded(
        features, attention, grid, frames_each, family.preset, levels, row_grid, keeps_positions(architecture, {})
    )


def encode_with_clip(name: str, frames: np.ndarray) -> Encoded:
    """Encode frames with a CLIP tower as LLaVA does: the last layer but one, without the class token."""
    transformers = _transformers()
    config = _found(name, lambda: transformers.AutoConfig.from_pretrained(name))
    if config.model_type not in ("clip", "clip_vision_model"):
        raise UserError(f"{name} is a {config.model_type}, not CLIP; a video LLM goes to --model")
    vision = getattr(config, "vision_config", config)
    model = _load(transformers.CLIPVisionModel, name)
    processor = _found(name, lambda: transformers.CLIPImageProcessor.from_pretrained(name))
    size = {"height": vision.image_size, "width": vision.image_size}  # the whole frame, not its middle
    pixels = processor(list(frames), size=size, do_center_crop=False, return_tensors="pt").pixel_values
    with Watched(_encoder(model).layers[-2].self_attn) as watched:
        out = model(pixels.to(model.device), output_hidden_states=True)
    side = vision.image_size // vision.patch_size
    rows, row_grid = _patches(pixels, vision)
    levels = PixelScale.of(processor).levels(rows)
    features, attention = out.hidden_states[-2][:, 1:], watched.received()[:, 1:]
    return Encoded(features, attention, (side, side), 1, {}, levels, row_grid, keeps_positions=False)


def _patches(frames: Tensor, vision: Any) -> tuple[Tensor, tuple[int, int]]:
    """What SigLIP or CLIP computes of frames [T, 3, height, width], and how many of it lie in height and width."""
    rows = frame_rows(frames, vision.patch_size)
    height, width = (length // vision.patch_size for length in frames.shape[-2:])
    return rows, (height, width)


def _llava_onevision(model: Any, pixels: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Projected and pooled features; the attention pooled in the same way."""
    layer, strategy = model.config.vision_feature_layer, model.config.vision_feature_select_strategy
    layers = _encoder(model.vision_tower).layers
    with Watched(layers[layer if layer < 0 else layer - 1].self_attn) as watched:
        rows = model.get_video_features(pixels.pixel_values_videos).pooler_output[0]
    received = watched.received()[:, 1 if strategy == "default" else 0 :]  # CLIP's class token
    attention = model.apply_pooling(received[..., None])[..., 0]
    side = int(attention.shape[1] ** 0.5)
    rows = rows[: attention.numel()]  # behind them a newline, in newer versions
    return rows.unflatten(0, attention.shape), attention, (side, side)


def _qwen(model: Any, pixels: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Merged features; the attention of a token is the mean over its patches."""
    visual, thw = model.visual, pixels.video_grid_thw
    frames, height, width = thw[0].tolist()
    merge = visual.config.spatial_merge_size
    # Qwen2.5-VL attends to whole frames in few blocks
    block = visual.blocks[max(getattr(visual, "fullatt_block_indexes", [-1]))]

    def append(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        # behind the features, so that the tower brings both from window into raster order
        return torch.cat([out, watched.received().view(-1, merge**2).mean(1, keepdim=True)], dim=1)

    with Watched(block.attn) as watched:
        hook = visual.merger.register_forward_hook(append)
        try:
            rows = visual(pixels.pixel_values_videos, grid_thw=thw).pooler_output
        finally:
            hook.remove()
    rows = rows.unflatten(0, (frames, -1))
    return rows[..., :-1].contiguous(), rows[..., -1].contiguous(), (height // merge, width // merge)


class Watched:
    """Records the received attention of one attention module of transformers while its tower runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.scores: list[Tensor] = []

    def __enter__(self) -> "Watched":
        _register(self._attend)
        return self

    def __exit__(self, *_: object) -> None:
        _register(None)

    def _attend(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        if module is self.module:  # Qwen's calls it once a frame, the others once
            self.scores.append(ops.received_attention(query.contiguous(), key.contiguous()))

    def received(self) -> Tensor:
        """[T, patches] float32."""
        return torch.cat(self.scores)


def _register(record: Callable[[nn.Module, Tensor, Tensor], None] | None) -> None:
    """Make `_WATCHED` an attention function that shows its query and key, after rotary, to ``record``."""
    functions = need("transformers").AttentionInterface()
    plain = functions["sdpa"]

    def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        if record is not None:
            record(module, query, key)
        return plain(module, query, key, *args, **options)

    functions.register(_WATCHED, attend)


def _encoder(tower: Any) -> Any:
    return getattr(tower, "vision_model", tower).encoder  # older versions wrap it


def _transformers() -> Any:
    transformers = need("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _load(cls: Any, name: str, **options: Any) -> Any:
    """The model in float32, where there is a GPU on it. Raises UserError if weights of what we run are missing."""
    _register(None)
    load = cls.from_pretrained
    model, info = _found(
        name,
        lambda: load(name, dtype=torch.float32, attn_implementation=_WATCHED, output_loading_info=True, **options),
    )
    missing = [key for key in info["missing_keys"] if "language_model" not in key]
    if missing:
        raise UserError(f"{name} lacks {len(missing)} weights of the vision tower, {sorted(missing)[0]} for one")
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def _found(name: str, load: Callable[[], Any]) -> Any:
    """What ``load`` returns. Raises UserError where transformers finds nothing of use under ``name``."""
    try:
        return load()
    except ImportError as error:
        raise UserError(f"{_first_line(error)}; pip install '.[viz]' brings what is needed") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load {name!r}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
