# SPDX-License-Identifier: MIT
"""What the LLaVA families share: a SigLIP or CLIP tower, frames pooled by interpolation, newlines, 1-D positions.

Their positions count what is left of a prompt, as published. With ``positions="original"`` (see ``rope``) the LLM is
told them as M-RoPE with three equal rows, and kept tokens stay where they are in the uncompressed prompt.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem
from vllm.multimodal.parse import VideoProcessorItems

from ...core.compress import CompressedVideo
from ...core.levels import frame_rows
from ...core.reuse import Reuse
from ...core.settings import KEY
from ..attention import frame_attention, watch_attention
from ..encode_less import SOURCE
from ..full_positions import FullPositionsModel
from ..pieces import encode_in_pieces
from ..plain_video import PlainVideo, plain_video_of
from ..positions import append_positions
from ..processor import FlashVidProcessor, Request
from ..reuse import copied, part, whole_frames
from ..upload import upload
from .llava_rows import RowsTower, frames_of

# of a video; a worker gets the positions of a video that the prefix cache covers from fields on the CPU alone
FRAMES = "flashvid_frames"


class LlavaProcessor(FlashVidProcessor):
    """Mixin for the family's processor; the paper's settings for it are FlashVidConfig's own defaults."""

    def video_token(self) -> int:
        return int(self.info.get_hf_config().video_token_index)

    def video_grid(self, item: MultiModalKwargsItem) -> tuple[int, int]:
        frames = item["pixel_values_videos"].data
        height, width = frames.shape[-2:]
        return self.given_grid(len(frames), width, height)

    def given_grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        return num_frames, self.info._get_num_frame_tokens(image_width=width, image_height=height)

    def frame_sizes(self) -> tuple[int, int]:
        side = self.info.get_hf_config().vision_config.image_size
        n = self.given_grid(1, side, side)[1]
        return n, n

    def encoder_rows(self, item: MultiModalKwargsItem) -> Tensor:
        """A patch each: [T, P, 1, 3, 1, p, p]."""
        side = self.info.get_hf_config().vision_config.patch_size
        return frame_rows(item["pixel_values_videos"].data, side)

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        videos, kwargs = inputs.mm_data_items.get("video"), inputs.hf_processor_mm_kwargs
        # before the frames are worked on: all are of one size, unless some are to be chosen
        early = isinstance(videos, VideoProcessorItems) and not kwargs.get("do_sample_frames")
        if self.info.flashvid_server is not None and early:
            side = self.info.get_hf_config().vision_config.image_size
            for frames in videos.get_all():
                if frames is not None:  # else it is known by its uuid
                    grid = self.given_grid(len(frames), side, side)
                    self.check_video(PlainVideo([], None, *grid), kwargs[KEY])
        return super()._cached_apply_hf_processor(inputs, timing_ctx)

    def check_prompt(self, updates: Mapping[str, Sequence[Sequence[Any]]], request: Request) -> None:
        """As `FlashVidProcessor.check_prompt`, and if positions, those of tokens to be dropped counted, go beyond the
        model's."""
        super().check_prompt(updates, request)
        model = self.info.ctx.model_config
        videos = [plain_video_of(item) for item in updates.get("video", ())]
        # without dropped tokens vLLM holds the prompt to max_model_len
        if not model.uses_mrope or not any(video.is_compressed_by(request.config) for video in videos):
            return
        full = [len(update.content.full) for items in updates.values() for item in items for update in item]
        spans = request.prompt_length + sum(full) - len(full)  # each of them is one id in the prompt
        limit = max(model.hf_text_config.max_position_embeddings, model.max_model_len)
        if spans > limit:
            raise ValueError(
                f"before compression this prompt has {spans} tokens, and positions='original' reaches to {limit}: "
                "send fewer frames, or serve without that option"
            )

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
    multi_modal_projector: Any
    apply_pooling: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.flashvid_on:
            # vLLM counts a step of the encoder in compressed tokens: many raw videos would fit into one
            self.requires_sequential_video_encoding = True
        self.flashvid_original = vllm_config.model_config.uses_mrope
        if self.flashvid_original:
            self.supports_mrope = self.supports_multimodal_pruning = True

    def encoder_attention(self) -> Any:
        return self.attentions()[-1]

    def visual_width(self) -> int:
        return self.embedding_width()

    def add_newlines(self, video: CompressedVideo, num_frames: int, tokens_per_frame: int) -> Tensor:
        """The embeddings of a compressed video, newlines included: [B + newlines, D]."""
        raise NotImplementedError

    def plain_rows(self, features: Tensor) -> Tensor:
        """The embeddings of an uncompressed video of features [T, N, D], newlines included."""
        raise NotImplementedError

    def token_rows(self, source: Tensor, num_frames: int, tokens_per_frame: int) -> Tensor:
        """Which of a video's rows, newlines included, are its tokens ``source`` [B] (ascending; T * N: the plain
        video's)."""
        raise NotImplementedError

    def _note_places(self, index: int, num_frames: int, source: Tensor | None, device: torch.device) -> None:
        """Keep which rows of the call's video ``index`` are its tokens ``source``, None for all, if anybody asks."""
        if self.flashvid_inner is not None:
            n = self.tokens_per_frame()
            tokens = torch.arange(num_frames * n, device=device) if source is None else source
            self.flashvid_places[index] = self.token_rows(tokens, num_frames, n)

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

    def patches_per_frame(self) -> int:
        """Patches of a frame, which are the tower's rows."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2

    def attentions(self) -> list[Any]:
        return [layer.self_attn.attn for layer in self.vision_tower.vision_model.encoder.layers]

    def video_grids(self, **kwargs: Any) -> list[tuple[int, int]]:
        if SOURCE in kwargs:
            lengths = [len(source) // self.patches_per_frame() for source in kwargs[SOURCE]]
        else:
            lengths = [len(frames) for frames in kwargs["pixel_values_videos"]]
        return [(length, self.tokens_per_frame()) for length in lengths]

    def rows_per_frame(self, tokens_per_frame: int) -> int:
        return self.patches_per_frame()

    def by_rows(self, **kwargs: Any) -> dict[str, Any]:
        frames = kwargs["pixel_values_videos"][0]
        patches = frame_rows(frames, self.config.vision_config.patch_size).flatten(0, 1)  # [R, 1, 3, 1, p, p]
        return {**kwargs, "pixel_values_videos": patches[:, 0, :, 0][None]}

    def repeat_video(self, times: int, **kwargs: Any) -> dict[str, Any]:
        return {**kwargs, "pixel_values_videos": kwargs["pixel_values_videos"].repeat(1, times, 1, 1, 1)}

    def embed_multimodal(self, **kwargs: Any) -> Any:
        kwargs.pop(FRAMES, None)
        return super().embed_multimodal(**kwargs)

    def _parse_and_validate_video_input(self, **kwargs: Any) -> Any:
        if any(self.flashvid_reuses):  # patches
            return {"pixel_values_videos": kwargs["pixel_values_videos"]}
        return super()._parse_and_validate_video_input(**kwargs)  # type: ignore[misc]

    def _process_video_pixels(self, inputs: Any) -> Any:
        videos = inputs["pixel_values_videos"]
        if not self.flashvid_configs:  # FlashVID is not on
            return super()._process_video_pixels(inputs)  # type: ignore[misc]
        # one by one, plain ones too: of several that differ in length vLLM 0.32 makes 3-D embeddings, which its Model
        # Runner V2 takes for the model's fault and ends
        out: list[Tensor] = []
        for index, (frames, config, reuse) in enumerate(
            zip(videos, self.flashvid_configs, self.flashvid_reuses, strict=True)
        ):
            if config is None and reuse is None:
                out.extend(super()._process_video_pixels({"pixel_values_videos": frames[None]}))  # type: ignore[misc]
                self._note_places(index, len(frames), None, out[-1].device)
                continue
            features, attention = self._encode(frames, config is not None and config.needs_attention, reuse)
            if config is None:
                out.append(self.plain_rows(features))
                self._note_places(index, len(features), None, features.device)
                continue
            video = self.compress_video(features, attention, config)
            rows = self.add_newlines(video, *features.shape[:2])
            self._note_places(index, len(features), video.source_index, features.device)
            out.append(
                append_positions(rows, self._places(video, *features.shape[:2])) if self.flashvid_original else rows
            )
        return out

    # --- positions, asked for with `flashvid_original` only
    # vLLM's two methods stand in `mrope` too: in a base of both they would hide vLLM's own, which that calls

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
        places = upload(self.newline_places(num_frames, n), kept.device)
        return torch.cat([kept, places]).sort().values.repeat(3, 1)

    def _encode(self, pixels: Tensor, scored: bool, reuse: Reuse | None = None) -> tuple[Tensor, Tensor | None]:
        """Pooled features [T, N, D], and if ``scored`` received attention [T, N], of one video: of frames [T, 3,
        height, width], or of the patches [M, 3, p, p] of the rows that ``reuse`` computes."""
        per_frame, num_frames = self.patches_per_frame(), len(pixels)
        if reuse is not None:
            if (frames := whole_frames(reuse, per_frame)) is not None:
                features, scores = self._encode(frames_of(pixels, per_frame), scored)
                features, *rest = copied((features,) if scores is None else (features, scores), frames)
                return features, rest[0] if rest else None
            self.refuse_rows()
            num_frames = len(reuse.source) // per_frame

        def encode(start: int, stop: int) -> tuple[Tensor, ...]:
            if reuse is None:
                return self._encode_piece(pixels[start:stop], scored)
            computed, own = part(reuse, per_frame, start, stop)
            return self._encode_rows(pixels[computed], scored, own, stop - start)

        features, *found = encode_in_pieces(encode, num_frames, self.frames_per_piece(self.tokens_per_frame()))
        return features, found[0] if found else None

    def _encode_piece(self, frames: Tensor, scored: bool) -> tuple[Tensor, ...]:
        with self._watch(scored) as seen:
            features = self._video_pixels_to_features(self.vision_tower, frames)
        return (features,) if seen is None else (features, self._scores(seen(), len(frames)))

    def _encode_rows(self, patches: Tensor, scored: bool, reuse: Reuse, num_frames: int) -> tuple[Tensor, ...]:
        tower = RowsTower(self.vision_tower, reuse, num_frames)
        with self._watch(scored) as seen:
            rows = self.multi_modal_projector(tower(patches))
        rows = rows.index_select(0, upload(reuse.source, rows.device))
        features = self.apply_pooling(rows.unflatten(0, (num_frames, -1)))
        if seen is None:
            return (features,)
        query, key = map(tower.gather, seen())
        return features, self._scores((query, key), num_frames)

    def _watch(self, scored: bool) -> AbstractContextManager[Any]:
        return watch_attention(self.encoder_attention()) if scored else nullcontext()

    def _scores(self, seen: tuple[Tensor, Tensor], num_frames: int) -> Tensor:
        """Received attention of the frames' tokens after pooling, [T, N], from their queries and keys."""
        scores = frame_attention(*seen, num_frames, self.flashvid_backend)
        if seen[0].shape[1] != self.config.vision_config.num_attention_heads:
            scores = tensor_model_parallel_all_reduce(scores) / get_tensor_model_parallel_world_size()
        # CLIP's class token comes first: it took part in the softmax, but is no token of the video
        return self.apply_pooling(scores[:, -self.patches_per_frame() :, None].contiguous()).squeeze(-1)
