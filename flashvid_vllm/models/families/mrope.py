# SPDX-License-Identifier: MIT
"""What the Qwen-VL families share: a tower of patches merged 2 x 2, M-RoPE, text between frames."""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalKwargsItem

from ...core.config import FlashVidConfig
from ...core.levels import merged_rows
from ...core.settings import ENABLED, KEY
from ..full_positions import FullPositionsModel
from ..plain_video import plain_video_of
from ..positions import CHANNELS, LAST_DELTA, LIMIT, append_positions
from ..processor import FlashVidProcessor, Request
from ..separators import append_text, embed_text, take_text
from ..upload import upload
from .mrope_encoder import MRopeEncoder, grid_of

LARGE = 10_000  # pixels of a side, more than any processor leaves


class MRopeProcessor(FlashVidProcessor):
    """Mixin for the family's processor."""

    def video_grid(self, item: MultiModalKwargsItem) -> tuple[int, int]:
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return grid_of(item["video_grid_thw"].data.tolist(), merge)

    def encoder_rows(self, item: MultiModalKwargsItem) -> Tensor:
        """A row is what is merged into one token: [T, P, 4, 3, 2, 14, 14]."""
        vision = self.info.get_hf_config().vision_config
        sizes = (vision.spatial_merge_size**2, vision.temporal_patch_size, vision.patch_size)
        return merged_rows(item["pixel_values_videos"].data, self.video_grid(item), *sizes)

    def check_prompt(self, updates: Mapping[str, Sequence[Sequence[Any]]], request: Request) -> None:
        """As `FlashVidProcessor.check_prompt`, and if a video is to be compressed and all of them span more position
        ids than there are."""
        super().check_prompt(updates, request)
        videos = [plain_video_of(item) for item in updates.get("video", ())]
        field = "second_per_grid_ts"
        timed = [(v.num_frames, float(v.fields[field].data)) for v in videos if field in v.fields]
        speed = getattr(self.info.get_hf_config().vision_config, "tokens_per_second", 1.0)
        ids = [(num_frames - 1) * seconds * speed for num_frames, seconds in timed]
        # vLLM's table of rotary embeddings goes four times as far as the model, for times; leave room for a prompt
        model = self.info.ctx.model_config
        reach = max(model.hf_text_config.max_position_embeddings, model.max_model_len)
        limit = min(LIMIT, 4 * reach - model.max_model_len)
        if all(x >= 0 for x in ids) and sum(ids) < limit:
            return
        if any(video.is_compressed_by(request.config) for video in videos):
            told = ", ".join(f"{num_frames} x {seconds:g} seconds" for num_frames, seconds in timed)
            raise ValueError(
                f"the temporal positions of this prompt's videos ({told}) span {sum(ids):g} position ids, and beside "
                f"compressed ones they may span fewer than {limit}: mend its fps or frame times, or send "
                f'"mm_processor_kwargs": {{"{KEY}": {{"{ENABLED}": false}}}}'
            )

    def given_grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        video_processor = self.info.get_hf_processor().video_processor
        _, tokens = self.info._get_vision_info(
            image_width=width,
            image_height=height,
            num_frames=num_frames,
            image_processor=video_processor,
            mm_kwargs={},
            modality="video",
        )
        positions = math.ceil(num_frames / self.info.get_hf_config().vision_config.temporal_patch_size)
        return positions, tokens // positions

    def frame_sizes(self) -> tuple[int, int]:
        # Qwen3-VL's limits are of all frames together: one may be as small as it likes, and is largest alone
        shortest = self.info.get_hf_config().vision_config.temporal_patch_size
        return 1, self.given_grid(shortest, LARGE, LARGE)[1]


class MRopeModel(MRopeEncoder, FullPositionsModel):
    """Mixin for the family's model. What a family may have to say is in the methods without an underscore.

    Attributes:
        flashvid_lora: whether requests may have adapters of their own.
    """

    visual: Any
    config: Any
    use_data_parallel: bool

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.flashvid_lora = vllm_config.lora_config is not None
        if self.flashvid_on:
            # a compiled block would hide its q and k (--compilation-config compile_mm_encoder); can go when vLLM gives
            # out an encoder's attention
            self.scoring_block().do_not_compile = True

    def visual_width(self) -> int:
        return int(self.config.vision_config.out_hidden_size)

    def video_grids(self, **kwargs: Any) -> list[tuple[int, int]]:
        return [self._video_grid(thw.tolist()) for thw in kwargs["video_grid_thw"]]

    def repeat_video(self, times: int, **kwargs: Any) -> dict[str, Any]:
        grid = kwargs["video_grid_thw"]
        longer = {"pixel_values_videos": kwargs["pixel_values_videos"].repeat(times, 1)}
        longer["video_grid_thw"] = grid * grid.new_tensor([times, 1, 1])
        if "timestamps" in kwargs:
            longer["timestamps"] = [list(stamps) * times for stamps in kwargs["timestamps"]]
        return {**kwargs, **longer}

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if not self.flashvid_on:
            return self.plain_positions(input_tokens, mm_features)
        return self.first_positions(input_tokens, mm_features)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor | None,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        if not self.flashvid_on:
            LAST_DELTA.clear()
            return super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        if self.flashvid_inner is not None:  # which no adapter goes with: no text's ids
            return self.final_positions(multimodal_embeddings, mrope_positions, num_computed_tokens)
        width = self.embedding_width() + CHANNELS
        placed = [embedding[:, :width] for embedding in multimodal_embeddings]
        out = self.final_positions(placed, mrope_positions, num_computed_tokens)
        take_text(out[0], multimodal_embeddings, width)
        return out

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        if self.flashvid_on and multimodal_embeddings:
            # `prompt_embeds` among media, which vLLM takes for as wide: DeepStack adds nothing to what is no vision
            missing = [max(0, self.embedding_width() - media.shape[1]) for media in multimodal_embeddings]
            multimodal_embeddings = [
                functional.pad(media, (0, columns)) if columns else media
                for media, columns in zip(multimodal_embeddings, missing, strict=True)
            ]
        embeds = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        return embed_text(embeds, multimodal_embeddings, is_multimodal, self.get_language_model().embed_input_ids)

    def plain_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]

    def full_layout(self, item: Any) -> list[int]:
        return [self.config.video_token_id] * math.prod(self._video_grid(item["video_grid_thw"].data.tolist()))

    def embedding_width(self) -> int:
        return int(self.visual.out_hidden_size)

    # --- encoder

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        if not self.flashvid_on:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)  # type: ignore[misc]
        return image_embeds_split

    def _process_video_input(self, video_input: Any) -> Any:
        if not any(self.flashvid_configs) and not any(self.flashvid_reuses):
            return super()._process_video_input(video_input)  # type: ignore[misc]
        fields = [f for f in ("video_grid_thw", "second_per_grid_ts", "timestamps") if video_input.get(f) is not None]
        grids = video_input["video_grid_thw"].tolist()
        out, start = [], 0
        for index, (config, reuse, thw) in enumerate(
            zip(self.flashvid_configs, self.flashvid_reuses, grids, strict=True)
        ):
            count = math.prod(thw) if reuse is None else len(reuse.rows) * self.visual.spatial_merge_unit
            pixels = video_input["pixel_values_videos"][start : start + count]
            start += len(pixels)
            features, *scores = self._encode(pixels, thw, config is not None and config.needs_attention, reuse)
            item = {field: SimpleNamespace(data=video_input[field][index]) for field in fields}
            scores_or_none = scores[0] if scores else None
            if config is not None:
                features, self.flashvid_places[index] = self._compress(features, scores_or_none, config, item)
            out.append(features)
        return tuple(out)

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        if not self.flashvid_on:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)  # type: ignore[misc]
        return video_embeds_split

    def _compress(
        self, features: Tensor, scores: Tensor | None, config: FlashVidConfig, item: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One video's tokens and the text between its frames, with their positions: [B + separators, D + channels].
        And which rows the tokens are, where tokens are dropped inside the LLM: [B].

        ``features`` [T * N, D]: the merger's output first, by which tokens are chosen and which is merged; deeper
        levels (DeepStack) are taken as they are, where a token is kept.
        """
        num_frames, n = self._video_grid(item["video_grid_thw"].data.tolist())
        width = self.visual_width()
        attention = scores.unflatten(0, (num_frames, n)) if scores is not None else None
        video = self.compress_video(features[:, :width].unflatten(0, (num_frames, n)), attention, config)
        tokens = torch.cat([video.tokens, features[video.source_index, width:]], dim=1)

        # all that is known of the uncompressed video goes to the device as it is; there it is chosen from, and the host
        # never asks which tokens were kept
        layout = self.full_layout(item)
        alone = SimpleNamespace(modality="video", mm_position=SimpleNamespace(offset=0), data=item)
        positions, _ = self.plain_positions(layout, [alone])
        full = torch.tensor(layout)
        is_text = full != self.config.video_token_id
        places, text = (~is_text).nonzero().flatten(), is_text.nonzero().flatten()
        places, text, ids, positions = (
            upload(table, features.device) for table in (places, text, full[is_text], positions)
        )
        order = torch.cat([text, places[video.source_index]]).sort()
        rows = tokens
        if len(text):
            between = tokens.new_zeros(len(text), tokens.shape[1])
            # without an adapter: that of whichever requests run now is none of the video's
            embedding = self.get_language_model().model.embed_tokens
            between[:, :width] = getattr(embedding, "base_layer", embedding)(ids)
            rows = torch.cat([between, tokens])[order.indices]
        rows = append_positions(rows, positions[:, order.values])
        tokens_at = order.indices.argsort()[len(text) :] if self.flashvid_inner is not None else None
        if not self.flashvid_lora:
            return rows, tokens_at
        ids = torch.cat([ids, ids.new_zeros(len(tokens))])[order.indices]
        return append_text(rows, ids, order.indices < len(text)), tokens_at
