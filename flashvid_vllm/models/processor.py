# SPDX-License-Identifier: MIT
"""vLLM multimodal processor hook: the exact number of placeholders of every video.

A family's processor is ``class Processor(FlashVidProcessor, VllmsOwnProcessor)`` and its info
``class Info(FlashVidInfo, VllmsOwnInfo)``; a family's file has these and its model, so this lies beside ``base``.

Where FlashVID is not on, both are vLLM's own. Where it is, the settings in force for a request are resolved once, in
`apply`, and stay out of all that vLLM does with its kwargs: videos are processed and cached as if there were none.
What comes of that then gets the settings: they count the placeholders, enter the name of the request's videos (so that
caches shared between servers and settings stay right), and go to the model beside the pixels, one row a video.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems, VideoProcessorItems
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.context import InputProcessingContext

from ..core.budget import plan
from ..core.config import FlashVidConfig
from ..core.levels import PixelScale
from ..core.settings import (
    ENABLED,
    ENCODER_SHARES,
    ENCODER_WHOLE,
    INNER_LAYER,
    KEY,
    MAX_VIDEO_TOKENS,
    ORIGINAL,
    POSITIONS,
    check_request,
    check_server,
    request_part,
    resolve,
)
from . import FAMILIES, pieces
from .encode_less import encode_less, name_of_pixels
from .plain_video import PlainVideo, count_tokens, plain_video_of
from .processor_cache import add_ours, known_updates, name_of
from .reuse import refuse_rows
from .settings_row import pack_settings

# On what vLLM measures memory with: encode and compress the longest video as well.
MEASURE = "flashvid_measure"
_PLAIN = {ENABLED: False}  # compared by identity: also where requests may not change anything


class _ContextWithoutOurKey(InputProcessingContext):
    """Keeps our key from the Hugging Face processor, which would refuse it."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **options: Any) -> dict[str, Any]:
        merged = super().get_merged_mm_kwargs(kwargs, **options)
        merged.pop(KEY, None)
        return merged


class FlashVidInfo:
    """Mixin for a family's ProcessingInfo: the server's settings, or None where FlashVID is off."""

    flashvid_server: dict[str, Any] | None = None
    flashvid_shares = 1  # ranks that share a piece of a video
    flashvid_length = 0  # of the model, before vLLM fits an automatic one to the memory: the encoder's pieces stay
    flashvid_whole: str | None = None  # why the encoder takes whole temporal positions alone

    def __init__(self, ctx: InputProcessingContext) -> None:
        config = ctx.model_config.multimodal_config
        settings = ((config and config.mm_processor_kwargs) or {}).get(KEY)
        if settings is not None:
            settings = dict(settings)
            self.flashvid_shares = settings.pop(ENCODER_SHARES, 1)
            self.flashvid_whole = settings.pop(ENCODER_WHOLE, None)
            self.flashvid_server = check_server(settings)
            self.flashvid_length = ctx.model_config.max_model_len
            ctx = _ContextWithoutOurKey(ctx.model_config, ctx.tokenizer)
        super().__init__(ctx)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Request:
    """What a request asks for: its settings (None: the plain model), and how many ids its prompt has, one for each of
    its media."""

    config: FlashVidConfig | None
    prompt_length: int


_request: ContextVar[Request] = ContextVar("flashvid_request")  # that is being processed


def _asked() -> FlashVidConfig | None:
    """The settings of the request that is being processed; None: the plain model."""
    request = _request.get(None)
    return None if request is None else request.config


class FlashVidProcessor:
    """Mixin for a family's multimodal processor."""

    info: Any

    @abstractmethod
    def video_grid(self, item: MultiModalKwargsItem) -> tuple[int, int]:
        """(T, N) of a processed video: temporal positions and visual tokens at each."""

    @abstractmethod
    def given_grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        """(T, N) of a video of so many frames of this size, unless the family's processor is told to choose others."""

    @abstractmethod
    def frame_sizes(self) -> tuple[int, int]:
        """The least and the most visual tokens of a frame [N], unless the family's processor is told other limits."""

    @abstractmethod
    def encoder_rows(self, item: MultiModalKwargsItem) -> Tensor:
        """A processed video's pixels by the rows that its encoder computes: [T, P, U, channels, K, S, S], U patches of
        S x S pixels and K frames a row."""

    def video_token(self) -> int:
        """The id that stands for a visual token of a video."""
        return int(self.info.get_hf_config().video_token_id)

    def video_layout(self, item: Any, per_frame: Sequence[int]) -> list[int]:
        """Ids of a video with ``per_frame[t]`` visual tokens in frame t, and of the separators between them."""
        return [self.video_token()] * sum(per_frame)

    def flashvid_config(self, request: Any | None) -> FlashVidConfig | None:
        """The settings in force for a request, or None: the plain model. ValueError if bad."""
        server = self.info.flashvid_server
        checked = None if request is None else check_request(request, server)
        return resolve(server, checked, FAMILIES[self.info.ctx.model_config.architecture].preset)

    def dummy_grid(self) -> tuple[int, int]:
        """(T, N) of the video on which vLLM measures memory at the start."""
        model = self.info.ctx.model_config
        options = model.get_multimodal_config().limit_per_prompt
        inputs = super().get_dummy_inputs(self.info.flashvid_length, {"video": 1}, options)  # type: ignore[misc]
        video = inputs.mm_data_items["video"].get(0)
        frames = video[0] if isinstance(video, tuple) else video  # beside its metadata
        size = VideoProcessorItems([frames]).get_frame_size(0)
        return self.given_grid(len(frames), size.width, size.height)

    @cached_property
    def piece(self) -> int:
        """Visual tokens that the encoder gets in one call: as many as start-up measures memory for."""
        num_frames, n = self.dummy_grid()
        return num_frames * n

    @cached_property
    def _pixel_scale(self) -> PixelScale:
        return PixelScale.of(self.info.get_hf_processor().video_processor)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Start-up measures memory on the largest thing a request may ask for: a video left as it is."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        if self.info.flashvid_server is None:
            return inputs
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: _PLAIN})

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever it is measured on, an image perhaps, tells the model to measure its longest video too."""
        inputs = super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]
        if self.info.flashvid_server is None:
            return inputs
        mark = {MEASURE: MultiModalFieldElem(torch.zeros(1), MultiModalBatchedField(keep_on_cpu=True))}
        marked = {
            modality: [item and MultiModalKwargsItem({**item, **mark}) for item in items]  # copies: caches hold these
            for modality, items in inputs["mm_kwargs"].items()
        }
        return {**inputs, "mm_kwargs": MultiModalKwargsItems(marked)}

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        if self.info.flashvid_server is not None:
            kwargs = dict(inputs.hf_processor_mm_kwargs)
            part = request_part(kwargs)
            config = None if part is _PLAIN else self.flashvid_config(part)
            _refuse_embeddings(inputs.mm_data_items, config)
            refuse_rows(self.info.flashvid_whole, config)
            kwargs[KEY] = config
            inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        if self.info.flashvid_server is None:
            return super()._cached_apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        config = kwargs.pop(KEY)
        inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
        request = Request(config, len(inputs.prompt))
        token = _request.set(request)
        try:
            processed = super()._cached_apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        finally:
            _request.reset(token)
        if "video" not in processed.kwargs:
            return processed
        self.check_prompt(processed.prompt_updates, request)  # where there is no cache
        row = pack_settings(config)
        # where the kept tokens are is the server's choice, but KV may be shared between servers
        original = config is not None and self.info.flashvid_server.get(POSITIONS) == ORIGINAL
        settings = row.numpy().tobytes() + original * ORIGINAL.encode()
        updates = processed.prompt_updates["video"]
        videos = [plain_video_of(update) for update in updates]
        items = [
            add_ours(item, row, video.embeds, self._inner_tokens(video, config))
            for item, video in zip(processed.kwargs["video"], videos, strict=True)
        ]
        return processed._replace(
            kwargs=type(processed.kwargs)({**processed.kwargs, "video": items}),
            hashes={**processed.hashes, "video": [name_of(video, settings) for video in processed.hashes["video"]]},
            prompt_updates={
                **processed.prompt_updates,
                "video": [[self._compress(update, config) for update in item] for item in updates],
            },
        )

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Where pixels are left out, a video is another one for each choice of them."""
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        config = _asked()
        if config is None or not config.encodes_less or "video" not in hashes:
            return hashes
        piece = (self.piece, self.info.flashvid_shares)
        return {**hashes, "video": [name_of_pixels(name, config, piece) for name in hashes["video"]]}

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        """From whole videos; what is cached and sent of them afterwards are the pixels that the encoder computes."""
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        config = _asked()
        if config is not None and config.encodes_less and "video" in out_mm_kwargs:
            request = _request.get()
            self.check_prompt(updates, request)  # before any work on what is refused
            out_mm_kwargs["video"] = [self._encode_less(item, config) for item in out_mm_kwargs["video"]]
        return updates

    def _encode_less(self, item: MultiModalKwargsItem, config: FlashVidConfig) -> MultiModalKwargsItem:
        num_frames, n = self.video_grid(item)
        most = pieces.frames_per_piece(self.piece, n)
        blocks = pieces.blocks(num_frames, most, self.info.flashvid_shares)
        return encode_less(item, self.encoder_rows(item), self._pixel_scale, blocks, config)

    def _merge_mm_kwargs(self, cache: Any, mm_hashes: Any, mm_is_cached: Any, *missing: Any, **more: Any) -> Any:
        if self.info.flashvid_server is not None:
            # before anything is cached: of what is refused later the engine would never hear
            _, new = missing or (None, more["mm_missing_prompt_updates"])
            updates = {modality: list(items) for modality, items in new.items()}
            for modality, names in mm_hashes.items():
                known = [name for name, is_cached in zip(names, mm_is_cached[modality], strict=True) if is_cached]
                updates.setdefault(modality, []).extend(known_updates(cache, name) for name in known)
            self.check_prompt(updates, _request.get())
        return super()._merge_mm_kwargs(cache, mm_hashes, mm_is_cached, *missing, **more)  # type: ignore[misc]

    def check_prompt(self, updates: Mapping[str, Sequence[Sequence[Any]]], request: "Request") -> None:
        """ValueError for what must not reach the engine. ``updates``: each item's prompt updates, in any order."""
        for item in updates.get("video", ()):
            self.check_video(plain_video_of(item), request.config)

    def check_video(self, video: PlainVideo, config: FlashVidConfig | None) -> None:
        """ValueError if a video to be compressed is larger than the server takes; vLLM itself refuses others."""
        limit, tokens = self.info.flashvid_server[MAX_VIDEO_TOKENS], video.num_frames * video.tokens_per_frame
        if tokens > limit and video.is_compressed_by(config):
            raise ValueError(
                f"this video has {tokens} visual tokens before compression ({video.num_frames} x "
                f"{video.tokens_per_frame}), and this server takes {limit}: send fewer or smaller frames, or serve "
                f"with --flashvid-max-video-tokens {tokens}"
            )

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        try:
            return super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)  # type: ignore[misc]
        except ValueError as error:
            if self.info.flashvid_server is None or not any(data is None for data in mm_data_items.get("video", ())):
                raise
            raise ValueError(
                f"{error} A video sent by its uuid alone is known under the loading options and the encoder_ratio that "
                f"it was sent with, whatever its other {KEY} settings: send the video itself, or the same options"
            ) from None

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        if self.info.flashvid_server is None or "video" not in out_mm_kwargs:
            return updates

        def placeholder(index: int) -> PromptUpdateDetails:
            return self._plain_video(out_mm_kwargs["video"][index])

        return [
            replace(update, replacement=placeholder) if update.modality == "video" else update for update in updates
        ]

    def _plain_video(self, item: MultiModalKwargsItem) -> PlainVideo:
        num_frames, n = self.video_grid(item)
        token, layout = self.video_token(), self.video_layout(item, [n] * num_frames)
        if layout.count(token) == len(layout):  # as vLLM says it where nothing but tokens is in a video
            details = PromptUpdateDetails.from_seq(layout)
        else:
            details = PromptUpdateDetails.select_token_id(layout, token)
        fields = MultiModalKwargsItem({key: elem for key, elem in item.items() if elem.field.keep_on_cpu})
        return PlainVideo(details.full, details.is_embed, num_frames, n, fields, layout.count(token))

    def _inner_tokens(self, video: PlainVideo, config: FlashVidConfig | None) -> Tensor | None:
        """A video's visual tokens in the LLM, and those that are left inside it; None where no request drops any."""
        if INNER_LAYER not in self.info.flashvid_server:
            return None
        tokens = kept = video.num_frames * video.tokens_per_frame
        if config is not None:
            budget = plan(video.num_frames, video.tokens_per_frame, config)
            tokens, kept = budget.tokens, budget.inner_tokens
        return torch.tensor([tokens, kept])

    def _compress(self, update: Any, config: FlashVidConfig | None) -> Any:
        """A video's prompt update, as vLLM has cached it, under a request's settings.

        Which frames the kept tokens will belong to is not known yet. So their ids come first, then those of the
        separators, and embeddings replace them all; the ids themselves only count, for penalties say.
        """
        video = update.content
        kept = count_tokens(config, video.num_frames, video.tokens_per_frame)
        if kept == video.num_frames * video.tokens_per_frame:
            return update
        token = self.video_token()
        layout = self.video_layout(video.fields, [kept] + [0] * (video.num_frames - 1))
        return replace(update, content=PromptUpdateDetails.from_seq(sorted(layout, key=lambda i: i != token)))


def _refuse_embeddings(mm_items: Any, config: FlashVidConfig | None) -> None:
    for modality, items in mm_items.items():
        given = isinstance(items, (EmbeddingItems, DictEmbeddingItems))
        if config is not None and modality == "video" and given:
            raise ValueError(
                "FlashVID cannot compress video_embeds: the encoder's attention is not part of them. "
                f'Send the video itself, or "mm_processor_kwargs": {{"{KEY}": {{"enabled": false}}}}'
            )
