# SPDX-License-Identifier: MIT
"""vLLM multimodal processor hook: the exact number of placeholders of every video.

A family's processor is ``class Processor(FlashVidProcessor, VllmsOwnProcessor)`` and its info
``class Info(FlashVidInfo, VllmsOwnInfo)``. Where FlashVID is not on, both are vLLM's own. Where it
is, the settings in force for a request are resolved once, in `apply`, and stay out of all that
vLLM does with its kwargs: videos are processed and cached as if there were none. What comes of
that then gets the settings: they count the placeholders, enter the name of the request's videos
(so that caches shared between servers and settings stay right), and go to the model beside the
pixels, one row a video.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
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

from .budget import Budget, plan
from .config import FlashVidConfig
from .models import FAMILIES
from .processor_cache import add_settings, name_of
from .settings import ENABLED, KEY, MAX_VIDEO_TOKENS, check_request, check_server, request_part, resolve

# On what vLLM measures memory with: encode and compress the longest video as well.
MEASURE = "flashvid_measure"
_ROW_BYTES = 512
# The settings of the request that is being processed: what lies between is vLLM's, and takes its own options along.
_IN_FORCE: ContextVar[FlashVidConfig | None] = ContextVar("_IN_FORCE", default=None)
_PLAIN = {ENABLED: False}  # compared by identity: also where requests may not change anything


def pack_settings(config: FlashVidConfig | None) -> Tensor:
    """The settings as one uint8 row of JSON: vLLM carries tensors, and casts floats to the model's dtype."""
    text = json.dumps(config.to_dict() if config else None).encode()
    if len(text) > _ROW_BYTES:
        raise ValueError(f"FlashVID settings of {len(text)} bytes exceed {_ROW_BYTES}: {text!r}")
    return torch.frombuffer(bytearray(text.ljust(_ROW_BYTES)), dtype=torch.uint8)


def unpack_settings(row: Tensor) -> FlashVidConfig | None:
    """The inverse of `pack_settings`; None: this video stays as it is."""
    settings = json.loads(bytes(row.flatten().tolist()))
    return FlashVidConfig(**settings) if settings is not None else None


class _ContextWithoutOurKey(InputProcessingContext):
    """Keeps our key from the Hugging Face processor, which would refuse it."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **options: Any) -> dict[str, Any]:
        merged = super().get_merged_mm_kwargs(kwargs, **options)
        merged.pop(KEY, None)
        return merged


@dataclass
class PlainVideo(PromptUpdateDetails):
    """What stands for a video in an uncompressed prompt, and what it takes to shorten it: ``num_frames`` temporal
    positions of ``tokens_per_frame`` visual tokens, ``full_embeds`` embeddings, and the item's small ``fields`` without
    its pixels. vLLM keeps it beside the video wherever that is cached."""

    num_frames: int = 0
    tokens_per_frame: int = 0
    full_embeds: int = 0
    fields: MultiModalKwargsItem = field(default_factory=MultiModalKwargsItem)


class FlashVidInfo:
    """Mixin for a family's ProcessingInfo: the server's settings, or None where FlashVID is off."""

    flashvid_server: dict[str, Any] | None = None

    def __init__(self, ctx: InputProcessingContext) -> None:
        config = ctx.model_config.multimodal_config
        settings = ((config and config.mm_processor_kwargs) or {}).get(KEY)
        if settings is not None:
            self.flashvid_server = check_server(settings)
            ctx = _ContextWithoutOurKey(ctx.model_config, ctx.tokenizer)
        super().__init__(ctx)  # type: ignore[call-arg]


class FlashVidProcessor:
    """Mixin for a family's multimodal processor."""

    info: Any

    @abstractmethod
    def video_grid(self, item: MultiModalKwargsItem) -> tuple[int, int]:
        """(T, N) of a processed video: temporal positions and visual tokens at each."""

    @abstractmethod
    def given_grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        """(T, N) of a video of so many frames of this size, unless the family's processor is told to choose others."""

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
        inputs = super().get_dummy_inputs(model.max_model_len, {"video": 1}, options)  # type: ignore[misc]
        video = inputs.mm_data_items["video"].get(0)
        frames = video[0] if isinstance(video, tuple) else video  # beside its metadata
        size = VideoProcessorItems([frames]).get_frame_size(0)
        return self.given_grid(len(frames), size.width, size.height)

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
            kwargs[KEY] = config
            inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        if self.info.flashvid_server is None:
            return super()._cached_apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        config = inputs.hf_processor_mm_kwargs[KEY]
        token = _IN_FORCE.set(config)
        try:
            result = super()._cached_apply_hf_processor(without_our_key(inputs), timing_ctx)  # type: ignore[misc]
        finally:
            _IN_FORCE.reset(token)
        if "video" not in result.kwargs:
            return result
        row, updates = pack_settings(config), result.prompt_updates["video"]
        embeds = [video[0].content.full_embeds for video in updates]
        items = [add_settings(item, row, full) for item, full in zip(result.kwargs["video"], embeds, strict=True)]
        return result._replace(
            kwargs=type(result.kwargs)({**result.kwargs, "video": items}),
            hashes={**result.hashes, "video": [name_of(video, row) for video in result.hashes["video"]]},
            prompt_updates={
                **result.prompt_updates,
                "video": [[self._compress(update, config) for update in video] for video in updates],
            },
        )

    def refuse_video(self, item: MultiModalKwargsItem, grid: tuple[int, int], config: FlashVidConfig | None) -> None:
        """ValueError if a video of ``grid`` cannot be compressed with these settings.

        Asked before it is cached, since the engine never hears of what is refused, and again for every request that
        finds it there, perhaps under other settings; then ``item`` has no pixels.
        """
        self._refuse_large(*grid, config)

    def _refuse_large(self, num_frames: int, n: int, config: FlashVidConfig | None) -> None:
        """ValueError if a video to be compressed is larger than the server takes; vLLM itself refuses others."""
        limit, tokens = self.info.flashvid_server[MAX_VIDEO_TOKENS], num_frames * n
        if tokens > limit and config is not None and not plan(num_frames, n, config).is_identity:
            raise ValueError(
                f"this video has {tokens} visual tokens before compression ({num_frames} x {n}), and this server takes "
                f"{limit}: send fewer or smaller frames, or serve with --flashvid-max-video-tokens {tokens}"
            )

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        try:
            return super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)  # type: ignore[misc]
        except ValueError as error:
            if self.info.flashvid_server is None or not any(data is None for data in mm_data_items.get("video", ())):
                raise
            raise ValueError(
                f"{error} A video sent by its uuid alone is known under the loading options that it was sent with, "
                f"whatever its {KEY} settings: send the video itself, or the same options"
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
        self.refuse_video(item, (num_frames, n), _IN_FORCE.get())
        token = self.video_token()
        full = PromptUpdateDetails.select_token_id(self.video_layout(item, [n] * num_frames), token)
        fields = MultiModalKwargsItem({key: elem for key, elem in item.items() if elem.field.keep_on_cpu})
        return PlainVideo(full.full, full.is_embed, num_frames, n, full.full.count(token), fields)

    def _compress(self, update: Any, config: FlashVidConfig | None) -> Any:
        """A video's prompt update, as vLLM has cached it, under a request's settings.

        Which frames the kept tokens will belong to is not known yet. So their ids come first, then those of the
        separators, and embeddings replace them all; the ids themselves only count, for penalties say.
        """
        video = update.content
        num_frames, n = video.num_frames, video.tokens_per_frame
        self.refuse_video(video.fields, (num_frames, n), config)
        kept = count_tokens(config, num_frames, n)
        if kept == num_frames * n:
            return update
        token = self.video_token()
        layout = self.video_layout(video.fields, [kept] + [0] * (num_frames - 1))
        return replace(update, content=PromptUpdateDetails.from_seq(sorted(layout, key=lambda i: i != token)))


def without_our_key(inputs: Any) -> Any:
    """vLLM's ProcessorInputs with its own options alone."""
    kwargs = {key: value for key, value in inputs.hf_processor_mm_kwargs.items() if key != KEY}
    return replace(inputs, hf_processor_mm_kwargs=kwargs)


def count_tokens(config: FlashVidConfig | None, num_frames: int, tokens_per_frame: int) -> int:
    """Placeholders of a video of ``num_frames`` x ``tokens_per_frame`` visual tokens; None: it stays as it is."""
    budget: Budget | None = plan(num_frames, tokens_per_frame, config) if config else None
    return budget.tokens if budget else num_frames * tokens_per_frame


def _refuse_embeddings(mm_items: Any, config: FlashVidConfig | None) -> None:
    for modality, items in mm_items.items():
        given = isinstance(items, (EmbeddingItems, DictEmbeddingItems))
        if config is not None and modality == "video" and given:
            raise ValueError(
                "FlashVID cannot compress video_embeds: the encoder's attention is not part of them. "
                f'Send the video itself, or "mm_processor_kwargs": {{"{KEY}": {{"enabled": false}}}}'
            )
