# SPDX-License-Identifier: MIT
"""What the LLaVA families share: a SigLIP or CLIP tower, frames pooled by interpolation, newlines, 1-D positions.

Their positions count what is left of a prompt, as published. With ``positions="original"`` (see ``rope``) the LLM is
told them as M-RoPE with three equal rows, and kept tokens stay where they are in the uncompressed prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems
from vllm.utils.cache import LRUCache

from ..attention import frame_attention, watch_attention
from ..budget import plan
from ..compress import CompressedVideo
from ..config import FlashVidConfig
from ..pieces import encode_in_pieces
from ..positions import append_positions
from ..processor import FlashVidProcessor, without_our_key
from ..settings import KEY
from .full_positions import FullPositionsModel

# of a video; a worker gets the positions of a video that the prefix cache covers from fields on the CPU alone
FRAMES = "flashvid_frames"


def _length(update: Any, index: int) -> int:
    """Placeholders of an item."""
    return len(update.resolve(index).content.full)


class LlavaProcessor(FlashVidProcessor):
    """Mixin for the family's processor; the paper's settings for it are FlashVidConfig's own defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cached_sizes = LRUCache[str, int](2**16)  # hash -> size; more than any cache of vLLM's has items

    def video_token(self) -> int:
        return int(self.info.get_hf_config().video_token_index)

    def video_grid(self, item: MultiModalKwargsItem) -> tuple[int, int]:
        frames = item["pixel_values_videos"].data
        height, width = frames.shape[-2:]
        return self.given_grid(len(frames), width, height)

    def given_grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        return num_frames, self.info._get_num_frame_tokens(image_width=width, image_height=height)

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        # here, since of what a request that is refused later leaves in vLLM's cache the engine never hears
        if self.info.flashvid_server is not None:
            self._refuse_many_frames(inputs)
        if self.info.flashvid_server is not None and self.info.ctx.model_config.uses_mrope:
            self._refuse_long(inputs)
        return super()._cached_apply_hf_processor(inputs, timing_ctx)

    def _refuse_many_frames(self, inputs: Any) -> None:
        """`_refuse_large` before the frames are worked on: all are of one size, unless some are to be chosen."""
        videos, kwargs = inputs.mm_data_items.get("video"), inputs.hf_processor_mm_kwargs
        if not isinstance(videos, VideoProcessorItems) or kwargs.get("do_sample_frames"):
            return
        side = self.info.get_hf_config().vision_config.image_size
        for frames in videos.get_all():
            if frames is not None:  # else it is in vLLM's cache, where nothing that was refused is
                self._refuse_large(*self.given_grid(len(frames), side, side), kwargs[KEY])

    def _refuse_long(self, inputs: Any) -> None:
        """ValueError if a prompt's positions, those of tokens to be dropped counted, go beyond the model's."""
        items, kwargs = inputs.mm_data_items, inputs.hf_processor_mm_kwargs
        config, videos = kwargs[KEY], items.get("video")
        if config is None or not isinstance(videos, VideoProcessorItems):
            return  # without dropped tokens vLLM holds the prompt to max_model_len
        side = self.info.get_hf_config().vision_config.image_size
        per_frame = self.info._get_num_frame_tokens(image_width=side, image_height=side)
        frames = self._sizes(inputs, "video", videos.get_num_frames)
        full = [len(self.video_layout(None, [per_frame] * count)) for count in frames]
        for update in self._get_prompt_updates(items, kwargs, {}):
            if update.modality == "image" and "image" in items:
                full += self._sizes(inputs, "image", partial(_length, update))
        spans = len(inputs.prompt) + sum(full) - len(full)  # each of them is one id in the prompt
        model = self.info.ctx.model_config
        limit = max(model.hf_text_config.max_position_embeddings, model.max_model_len)
        if spans > limit and any(
            plan(count, per_frame, config).tokens < count * per_frame for count in frames if count
        ):
            raise ValueError(
                f"before compression this prompt has {spans} tokens, and positions='original' reaches to {limit}: "
                "send fewer frames, or serve without that option"
            )

    def _sizes(self, inputs: Any, modality: str, size_of: Callable[[int], int]) -> list[int]:
        """``size_of`` every item. One with a uuid may come without its data, or with other data than vLLM's cache has
        under it: then that of the data that are in the cache counts."""
        items, uuids = inputs.mm_data_items[modality], (inputs.mm_uuid_items or {}).get(modality) or []
        hashes = [""] * len(items)
        if inputs.cache is not None and any(uuid is not None for uuid in uuids):
            alone = replace(inputs, mm_data_items=MultiModalDataItems({modality: items}))
            hashes = self._get_mm_hashes(without_our_key(alone))[modality]  # type: ignore[attr-defined]
        sizes = []
        for i, item_hash in enumerate(hashes):
            is_cached = bool(item_hash) and inputs.cache.is_cached_item(item_hash)
            size = self._cached_sizes.get(item_hash) if is_cached else None
            if size is None:  # vLLM says so itself if an item comes without data and is not cached
                size = 0 if items[i] is None and not is_cached else size_of(i)
            if item_hash and size:
                self._cached_sizes[item_hash] = size
            sizes.append(size)
        return sizes

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        if self.info.ctx.model_config.uses_mrope and "pixel_values_videos" in data:
            data[FRAMES] = torch.tensor([[len(frames)] for frames in data["pixel_values_videos"]])
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        if FRAMES in hf_inputs:
            fields = {**fields, FRAMES: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}
        return fields


class LlavaModel(FullPositionsModel):
    """Mixin for the family's model; a family says where its newlines go.

    Attributes:
        flashvid_original: whether kept tokens keep their positions in the uncompressed prompt.
    """

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
        self.flashvid_original = vllm_config.model_config.uses_mrope
        if self.flashvid_original:
            self.supports_mrope = self.supports_multimodal_pruning = True

    def add_newlines(self, video: CompressedVideo, num_frames: int, tokens_per_frame: int) -> Tensor:
        """The embeddings of a compressed video, newlines included: [B + newlines, D]."""
        raise NotImplementedError

    def newline_places(self, num_frames: int, tokens_per_frame: int) -> Tensor:
        """Where the newlines that `add_newlines` adds stand in the uncompressed video, its newlines counted."""
        raise NotImplementedError

    def num_newlines(self, num_frames: int) -> int:
        """Newlines of an uncompressed video."""
        raise NotImplementedError

    def tokens_per_frame(self) -> int:
        """Tokens of a frame after pooling."""
        vision = self.config.vision_config
        return math.ceil(vision.image_size // vision.patch_size / 2) ** 2

    def video_grids(self, **kwargs: Any) -> list[tuple[int, int]]:
        return [(len(frames), self.tokens_per_frame()) for frames in kwargs["pixel_values_videos"]]

    def repeat_video(self, times: int, **kwargs: Any) -> dict[str, Any]:
        return {**kwargs, "pixel_values_videos": kwargs["pixel_values_videos"].repeat(1, times, 1, 1, 1)}

    def embed_multimodal(self, **kwargs: Any) -> Any:
        kwargs.pop(FRAMES, None)
        return super().embed_multimodal(**kwargs)

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
            video = self.compress_video(features, attention, config)
            rows = self.add_newlines(video, *features.shape[:2])
            out.append(
                append_positions(rows, self._places(video, *features.shape[:2])) if self.flashvid_original else rows
            )
        return out

    # --- positions, asked for with `flashvid_original` only

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        return self.first_positions(input_tokens, mm_features)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor | None,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        return self.final_positions(multimodal_embeddings, mrope_positions, num_computed_tokens)

    def full_layout(self, item: Any) -> list[int]:
        num_frames = int(item[FRAMES].data)
        return [self.config.video_token_index] * (num_frames * self.tokens_per_frame() + self.num_newlines(num_frames))

    def plain_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        return torch.arange(len(input_tokens)).repeat(3, 1), 0

    def embedding_width(self) -> int:
        return int(self.config.text_config.hidden_size)

    def _places(self, video: CompressedVideo, num_frames: int, n: int) -> Tensor:
        """Where each row of a compressed video stands in the uncompressed one, newlines counted: [3, B + newlines]."""
        newlines = self.num_newlines(num_frames) * video.source_index // (num_frames * n)
        kept = video.source_index + newlines
        places = self.newline_places(num_frames, n).to(kept.device)
        return torch.cat([kept, places]).sort().values.repeat(3, 1)

    def _encode(self, frames: Tensor, config: FlashVidConfig) -> tuple[Tensor, Tensor | None]:
        """Pooled features [T, N, D] and received attention [T, N] of one video."""

        def encode(start: int, stop: int) -> tuple[Tensor, ...]:
            return self._encode_piece(frames[start:stop], config.needs_attention)

        features, *scores = encode_in_pieces(encode, len(frames), self.frames_per_piece(self.tokens_per_frame()))
        return features, scores[0] if scores else None

    def _encode_piece(self, frames: Tensor, scored: bool) -> tuple[Tensor, ...]:
        attention = self.vision_tower.vision_model.encoder.layers[-1].self_attn.attn
        with watch_attention(attention) if scored else nullcontext() as seen:
            features = self._video_pixels_to_features(self.vision_tower, frames)
        if seen is None:
            return (features,)
        scores = frame_attention(*seen(), len(frames), self.flashvid_backend)
        if attention.num_heads != self.config.vision_config.num_attention_heads:
            scores = tensor_model_parallel_all_reduce(scores) / get_tensor_model_parallel_world_size()
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        # CLIP's class token comes first: it took part in the softmax, but is no token of the video
        return features, self.apply_pooling(scores[:, -patches:, None].contiguous()).squeeze(-1)
