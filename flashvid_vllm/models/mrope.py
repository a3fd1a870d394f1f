# SPDX-License-Identifier: MIT
"""What the Qwen-VL families share: a tower of patches merged 2 x 2, M-RoPE, text between frames."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.models.vision import run_dp_sharded_mrope_vision_model
from vllm.multimodal.inputs import MultiModalKwargsItem

from ..attention import ScoringTower, frame_attention, take_scores
from ..config import FlashVidConfig
from ..positions import CHANNELS, append_positions
from ..processor import FlashVidProcessor
from .full_positions import FullPositionsModel
from .separators import append_text, embed_text, take_text


def _grid(thw: Sequence[int], merge: int) -> tuple[int, int]:
    """(T, N) of a video of ``thw`` patches, of which ``merge`` x ``merge`` make one token."""
    return int(thw[0]), (int(thw[1]) // merge) * (int(thw[2]) // merge)


class MRopeProcessor(FlashVidProcessor):
    """Mixin for the family's processor."""

    def video_grid(self, item: MultiModalKwargsItem) -> tuple[int, int]:
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return _grid(item["video_grid_thw"].data.tolist(), merge)


class MRopeModel(FullPositionsModel):
    """Mixin for the family's model. What a family may have to say is in the methods without an underscore.

    Attributes:
        flashvid_lora: whether requests may have adapters of their own.
    """

    visual: Any
    config: Any
    use_data_parallel: bool
    get_language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.flashvid_lora = vllm_config.lora_config is not None
        if self.flashvid_on:
            # a compiled block would hide its q and k (--compilation-config compile_mm_encoder)
            self.scoring_block().do_not_compile = True

    def scoring_block(self) -> Any:
        """The tower's last block whose attention sees whole frames."""
        return self.visual.blocks[-1]

    def raster_order(self, scores: Tensor, thw: Sequence[int]) -> Tensor:
        """The scores [n] of one video's tokens as the last block has them, in the order of the tower's output."""
        return scores

    def video_layout(self, item: Any, per_frame: Sequence[int]) -> list[int]:
        """As `FlashVidProcessor.video_layout`."""
        return [self.config.video_token_id] * sum(per_frame)

    def video_grids(self, **kwargs: Any) -> list[tuple[int, int]]:
        return [self._video_grid(thw.tolist()) for thw in kwargs["video_grid_thw"]]

    def _video_grid(self, thw: Sequence[int]) -> tuple[int, int]:
        return _grid(thw, self.config.vision_config.spatial_merge_size)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if not self.flashvid_on:
            return self.plain_positions(input_tokens, mm_features)
        return self.first_positions(input_tokens, mm_features)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        if not self.flashvid_on:
            return super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        width = self.embedding_width() + CHANNELS
        placed = [embedding[:, :width] for embedding in multimodal_embeddings]
        out = self.final_positions(input_ids, placed, mrope_positions, num_computed_tokens)
        take_text(out[0], multimodal_embeddings, width)
        return out

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        embeds = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embed_text(embeds, multimodal_embeddings, is_multimodal, self.get_language_model().embed_input_ids)

    def plain_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]

    def full_layout(self, item: Any) -> list[int]:
        num_frames, n = self._video_grid(item["video_grid_thw"].data.tolist())
        return self.video_layout(item, [n] * num_frames)

    def embedding_width(self) -> int:
        return int(self.visual.out_hidden_size)

    def media_ids(self) -> tuple[int, int]:
        return self.config.video_token_id, self.config.image_token_id

    # --- encoder

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        if not self.flashvid_on:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)  # type: ignore[misc]
        return image_embeds_split

    def _process_video_input(self, video_input: Any) -> Any:
        if not self.needs_attention():
            return super()._process_video_input(video_input)  # type: ignore[misc]
        grids = video_input["video_grid_thw"].tolist()
        pixels = video_input["pixel_values_videos"]
        shared_heads = not self.use_data_parallel and get_tensor_model_parallel_world_size() > 1
        tower = ScoringTower(
            self.visual,
            self.scoring_block().attn.attn,
            self._score,
            tensor_model_parallel_all_reduce if shared_heads else None,
            get_tensor_model_parallel_world_size(),
        )
        if self.use_data_parallel:
            return run_dp_sharded_mrope_vision_model(tower, pixels, grids, rope_type="rope_3d")
        return tower(pixels, grids).split([math.prod(self._video_grid(thw)) for thw in grids])

    def _score(self, query: Tensor, key: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Mean received attention of the patches of each output token: [n]."""
        scores, start = [], 0
        for thw in grids:
            end = start + math.prod(thw)
            patches = frame_attention(query[start:end], key[start:end], thw[0], self.flashvid_backend)
            merged = patches.flatten().unflatten(0, (-1, self.visual.spatial_merge_unit)).mean(1)
            scores.append(self.raster_order(merged, thw))
            start = end
        return torch.cat(scores)

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        if not self.flashvid_on:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)  # type: ignore[misc]
        scored = self.needs_attention()
        out = []
        for index, (features, config) in enumerate(zip(video_embeds_split, self.flashvid_configs, strict=True)):
            features, scores = take_scores(features) if scored else (features, None)
            fields = ("video_grid_thw", "second_per_grid_ts", "timestamps")
            item = {
                field: SimpleNamespace(data=video_input[field][index])
                for field in fields
                if video_input.get(field) is not None
            }
            out.append(features if config is None else self._compress(features, scores, config, item))
        return tuple(out)

    def _compress(self, features: Tensor, scores: Tensor | None, config: FlashVidConfig, item: Any) -> Tensor:
        """One video's tokens and the text between its frames, with their positions: [B + separators, D + channels].

        ``features`` [T * N, D]: the merger's output first, by which tokens are chosen and which is merged; deeper
        levels (DeepStack) are taken as they are, where a token is kept.
        """
        num_frames, n = self._video_grid(item["video_grid_thw"].data.tolist())
        width = self.config.vision_config.out_hidden_size
        attention = scores.unflatten(0, (num_frames, n)) if scores is not None else None
        video = self.compress_video(features[:, :width].unflatten(0, (num_frames, n)), attention, config)
        tokens = torch.cat([video.tokens, features[video.source_index, width:]], dim=1)

        per_frame = torch.bincount(video.source_index // n, minlength=num_frames).tolist()
        ids = torch.tensor(self.video_layout(item, per_frame), device=features.device)
        is_token = ids == self.config.video_token_id
        rows = tokens
        if len(ids) != len(tokens):
            rows = tokens.new_zeros(len(ids), tokens.shape[1])
            # without an adapter: that of whichever requests run now is none of the video's
            embedding = self.get_language_model().model.embed_tokens
            rows[:, :width] = getattr(embedding, "base_layer", embedding)(ids)
            rows[is_token] = tokens

        full = torch.tensor(self.full_layout(item))
        alone = SimpleNamespace(modality="video", mm_position=SimpleNamespace(offset=0), data=item)
        positions, _ = self.plain_positions(full.tolist(), [alone])
        stays = full != self.config.video_token_id
        stays[(~stays).nonzero().flatten()[video.source_index.to(stays.device)]] = True
        rows = append_positions(rows, positions[:, stays])
        return append_text(rows, ids, ~is_token) if self.flashvid_lora else rows
