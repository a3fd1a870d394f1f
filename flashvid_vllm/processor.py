# SPDX-License-Identifier: MIT
"""vLLM multimodal processor hook: the exact number of placeholders of every video.

A family's processor is ``class Processor(FlashVidProcessor, VllmsOwnProcessor)`` and its info
``class Info(FlashVidInfo, VllmsOwnInfo)``. Where FlashVID is not on, both are vLLM's own. Where it
is, the settings in force for a request are resolved once, in `apply`; they count the
placeholders, enter the hash of the request's videos (so that caches shared between servers
and settings stay right), and go to the model beside the pixels, one row a video.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.context import InputProcessingContext

from .budget import Budget, plan
from .config import FlashVidConfig
from .models import FAMILIES
from .settings import KEY, ORIGINAL, POSITIONS, REQUEST_OVERRIDES, check_request, check_server, request_part, resolve

FIELD = "flashvid_settings"
_ROW_BYTES = 512


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

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Start-up measures memory on the largest thing a request may ask for: a video left as it is."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        server = self.info.flashvid_server
        if server is None or not server.get(REQUEST_OVERRIDES, True):
            return inputs
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: {"enabled": False}})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        if self.info.flashvid_server is not None:
            kwargs = dict(inputs.hf_processor_mm_kwargs)
            config = self.flashvid_config(request_part(kwargs))
            _refuse_embeddings(inputs.mm_data_items, config)
            kwargs[KEY] = config
            inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        if self.info.flashvid_server is not None:
            config = kwargs.pop(KEY)
            # where the kept tokens are is the server's choice, but KV may be shared between servers
            original = self.info.flashvid_server.get(POSITIONS) == ORIGINAL
            given = config and {**config.to_dict(), **({POSITIONS: ORIGINAL} if original else {})}
            settings = json.dumps(given, sort_keys=True) if given else ""
            # under videos_kwargs it enters the hash of videos alone: images are not ours
            kwargs["videos_kwargs"] = {**(kwargs.get("videos_kwargs") or {}), KEY: settings}
            inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
        return super()._get_mm_hashes(inputs)  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        videos = mm_items.get_count("video", strict=False)
        if self.info.flashvid_server is not None and videos:
            config = hf_kwargs[KEY]
            assert config is None or isinstance(config, FlashVidConfig)
            data[FIELD] = pack_settings(config).repeat(videos, 1)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        if FIELD in hf_inputs:
            fields = {**fields, FIELD: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        if self.info.flashvid_server is None:
            return updates

        def placeholder(index: int) -> PromptUpdateDetails:
            item = out_mm_kwargs["video"][index]
            return self._placeholder(item)

        return [
            replace(update, replacement=placeholder) if update.modality == "video" else update for update in updates
        ]

    def _placeholder(self, item: Any) -> PromptUpdateDetails:
        """What stands for a video in the prompt.

        Which frames the kept tokens will belong to is not known yet. So their ids come first, then those of the
        separators, and embeddings replace them all; the ids themselves only count, for penalties say.
        """
        num_frames, n = self.video_grid(item)
        kept = count_tokens(item, num_frames, n)
        token = self.video_token()
        if kept == num_frames * n:
            return PromptUpdateDetails.select_token_id(self.video_layout(item, [n] * num_frames), token)
        layout = self.video_layout(item, [kept] + [0] * (num_frames - 1))
        return PromptUpdateDetails.from_seq(sorted(layout, key=lambda i: i != token))


def settings_of(item: Any) -> FlashVidConfig | None:
    """The settings that a processed video carries; None where it stays as it is."""
    field = item.get(FIELD)
    return None if field is None else unpack_settings(field.data)


def count_tokens(item: Any, num_frames: int, tokens_per_frame: int) -> int:
    """Placeholders of a processed video of ``num_frames`` x ``tokens_per_frame`` visual tokens."""
    config = settings_of(item)
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
