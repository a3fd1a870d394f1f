# SPDX-License-Identifier: MIT
"""Qwen2.5-VL: windowed vision tower, 2x2 merge, M-RoPE."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.models import qwen2_5_vl as upstream
from vllm.model_executor.models.vision import run_dp_sharded_mrope_vision_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem, PlaceholderRange
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from ..attention import ScoringTower, frame_attention, take_scores
from ..budget import plan
from ..compress import compress
from ..config import FlashVidConfig
from ..positions import Span, append_positions, compress_positions, delta_of, fill_positions
from ..processor import FIELD, FlashVidInfo, FlashVidProcessor, unpack_settings
from ..settings import KEY
from . import QWEN_PRESET


def _grid(thw: Sequence[int], merge: int) -> tuple[int, int]:
    """(T, N) of a video of ``thw`` patches, of which ``merge`` x ``merge`` make one token."""
    return thw[0], (thw[1] // merge) * (thw[2] // merge)


class ProcessingInfo(FlashVidInfo, upstream.Qwen2_5_VLProcessingInfo):
    pass


class Processor(FlashVidProcessor, upstream.Qwen2_5_VLMultiModalProcessor):
    flashvid_preset = QWEN_PRESET

    def video_grid(self, item: MultiModalKwargsItem) -> tuple[int, int]:
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return _grid(item["video_grid_thw"].data.tolist(), merge)


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=ProcessingInfo, dummy_inputs=upstream.Qwen2_5_VLDummyInputsBuilder
)
class Qwen2_5_VLForConditionalGeneration(upstream.Qwen2_5_VLForConditionalGeneration):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = (self.multimodal_config.mm_processor_kwargs or {}).get(KEY)
        self.flashvid_on = settings is not None
        self.flashvid_backend = (settings or {}).get("backend", "auto")
        self.flashvid_configs: Sequence[FlashVidConfig | None] = ()
        if self.flashvid_on:
            # a compiled block would hide its q and k (--compilation-config compile_mm_encoder)
            self._last_full_block().do_not_compile = True

    def _last_full_block(self) -> Any:
        return self.visual.blocks[max(self.visual.fullatt_block_indexes)]

    # --- positions

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if not self.flashvid_on:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        merge = self.config.vision_config.spatial_merge_size
        tokens, features, spans, grown = list(input_tokens), [], [], 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            offset, kept = feature.mm_position.offset + grown, feature.mm_position.length
            length = kept
            if feature.modality == "video":
                length = int(feature.data["video_grid_thw"].data.prod()) // merge**2
            features.append(replace(feature, mm_position=PlaceholderRange(offset=offset, length=length)))
            if length != kept:
                spans.append(Span(offset, length, kept))
                tokens[offset + kept : offset + kept] = [self.config.video_token_id] * (length - kept)
                grown += length - kept
        full, delta = super().get_mrope_input_positions(tokens, features)
        if spans:
            full, delta = compress_positions(full, spans)
        # A prompt may end with a video, whose last position is then unknown once its tokens are filled in.
        full.flashvid_delta = delta
        return full, delta

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        if not self.flashvid_on:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        delta = getattr(mrope_positions, "flashvid_delta", None)
        if delta is None:
            delta = delta_of(mrope_positions)
        width = self.visual.out_hidden_size
        if any(embedding.shape[1] > width for embedding in multimodal_embeddings):
            with gpu_sync_allowed():
                ids = torch.as_tensor(input_ids)
                is_media = (ids == self.config.video_token_id) | (ids == self.config.image_token_id)
                mrope_positions = fill_positions(
                    mrope_positions, is_media, multimodal_embeddings, width, num_computed_tokens
                )
        return [embedding[:, :width] for embedding in multimodal_embeddings], mrope_positions, delta

    # --- encoder

    def embed_multimodal(self, **kwargs: Any) -> Any:
        rows = kwargs.pop(FIELD, None)
        if rows is None:  # images, or FlashVID is not on
            return super().embed_multimodal(**kwargs)
        configs = [unpack_settings(row) for row in rows]
        grids = [_grid(thw.tolist(), self.visual.spatial_merge_size) for thw in kwargs["video_grid_thw"]]
        self.flashvid_configs = [
            None if config is None or plan(*grid, config).is_identity else config
            for config, grid in zip(configs, grids, strict=True)
        ]
        with gpu_sync_allowed():
            return super().embed_multimodal(**kwargs)

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        if not self.flashvid_on:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        return image_embeds_split

    def _process_video_input(self, video_input: Any) -> Any:
        if not self._needs_attention():
            return super()._process_video_input(video_input)
        grids = video_input["video_grid_thw"].tolist()
        pixels = video_input["pixel_values_videos"]
        shared_heads = not self.use_data_parallel and get_tensor_model_parallel_world_size() > 1
        tower = ScoringTower(
            self.visual,
            self._last_full_block().attn.attn,
            self._score,
            tensor_model_parallel_all_reduce if shared_heads else None,
            get_tensor_model_parallel_world_size(),
        )
        if self.use_data_parallel:
            return run_dp_sharded_mrope_vision_model(tower, pixels, grids, rope_type="rope_3d")
        return tower(pixels, grids).split([math.prod(_grid(thw, self.visual.spatial_merge_size)) for thw in grids])

    def _needs_attention(self) -> bool:
        return any(config is not None and config.needs_attention for config in self.flashvid_configs)

    def _score(self, query: Tensor, key: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Mean received attention of the patches of each output token, in raster order: [n]."""
        scores, start = [], 0
        for frames, height, width in grids:
            end = start + frames * height * width
            patches = frame_attention(query[start:end], key[start:end], frames, self.flashvid_backend)
            merged = patches.flatten().unflatten(0, (-1, self.visual.spatial_merge_unit)).mean(1)
            # the tower works in window order: row i of it is output token window_index[i]
            window_index = self.visual.get_rope_by_thw(frames, height, width)[2]
            scores.append(torch.empty_like(merged).index_copy_(0, window_index.to(merged.device), merged))
            start = end
        return torch.cat(scores)

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        if not self.flashvid_on:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
        grids = video_input["video_grid_thw"]
        seconds = video_input.get("second_per_grid_ts")
        scored = self._needs_attention()
        out = []
        for index, (features, config) in enumerate(zip(video_embeds_split, self.flashvid_configs, strict=True)):
            features, scores = take_scores(features) if scored else (features, None)
            item = {"video_grid_thw": SimpleNamespace(data=grids[index])}
            if seconds is not None:
                item["second_per_grid_ts"] = SimpleNamespace(data=seconds[index])
            out.append(self._compress(features, scores, config, item))
        return tuple(out)

    def _compress(self, features: Tensor, scores: Tensor | None, config: FlashVidConfig | None, item: Any) -> Tensor:
        """One video's tokens with their positions inside it appended; [B, D + channels]."""
        num_frames = int(item["video_grid_thw"].data[0])
        if config is None:
            return features
        attention = scores.unflatten(0, (num_frames, -1)) if scores is not None else None
        video = compress(features.unflatten(0, (num_frames, -1)), attention, config)
        alone = SimpleNamespace(modality="video", mm_position=SimpleNamespace(offset=0), data=item)
        positions, _ = super().get_mrope_input_positions([self.config.video_token_id] * len(features), [alone])
        return append_positions(video.tokens, positions.to(features.device)[:, video.source_index])
