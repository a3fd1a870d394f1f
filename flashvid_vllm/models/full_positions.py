# SPDX-License-Identifier: MIT
"""Kept tokens, and all text, at the positions that they have in the uncompressed prompt (see ``positions``)."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.multimodal.inputs import PlaceholderRange
from vllm.sequence import IntermediateTensors
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from . import stages
from .base import FlashVidModel
from .inner import rows
from .positions import LAST_DELTA, Span, compress_positions, delta_of, fill_positions


class FullPositionsModel(FlashVidModel):
    """Mixin for models that M-RoPE tells where a token is. What a family says is in the methods without underscore.

    Attributes:
        flashvid_staged: whether the stages of a pipeline hand on positions (see ``stages``).
    """

    make_empty_intermediate_tensors: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        several = vllm_config.parallel_config.pipeline_parallel_size > 1
        self.flashvid_staged = self.flashvid_on and several and vllm_config.model_config.uses_mrope
        if self.flashvid_staged:
            self.make_empty_intermediate_tensors = stages.with_room(self.make_empty_intermediate_tensors)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.flashvid_staged and intermediate_tensors is not None:
            intermediate_tensors = stages.receive(intermediate_tensors, positions)
        output = super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds, **kwargs
        )
        return stages.hand_on(output, positions) if self.flashvid_staged else output

    def full_layout(self, item: Any) -> list[int]:
        """Ids of an uncompressed video, separators included."""
        raise NotImplementedError

    def plain_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, L] of an uncompressed prompt, and the delta behind it."""
        raise NotImplementedError

    def first_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """What vLLM's get_mrope_input_positions gives: `compress_positions` of the prompt, and the delta."""
        tokens, features, spans, grown = list(input_tokens), [], [], 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            offset, kept = feature.mm_position.offset + grown, feature.mm_position.length
            full = self.full_layout(feature.data) if feature.modality == "video" else []
            if full and len(full) != kept:
                spans.append(Span(offset, len(full), kept))
                tokens[offset : offset + kept] = full
                grown += len(full) - kept
            features.append(replace(feature, mm_position=PlaceholderRange(offset, len(full) or kept)))
        positions, delta = self.plain_positions(tokens, features)
        if spans:
            positions, delta = compress_positions(positions, spans)
        # Model Runner V1 fills this very tensor in, and after a preemption asks again for what is final already
        positions.flashvid_marks = positions.clone()  # type: ignore[attr-defined]
        return positions, delta

    def final_positions(
        self, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """What vLLM's recompute_mrope_positions gives: embeddings alone, `fill_positions` of a chunk, the delta."""
        width = self.embedding_width()
        if self.flashvid_inner is not None:
            multimodal_embeddings = rows.take_marks(multimodal_embeddings, width)
        # Model Runner V2 copies positions to the device, and lays a request out anew whenever it starts
        marks = getattr(mrope_positions, "flashvid_marks", mrope_positions)
        delta = LAST_DELTA.pop() if LAST_DELTA else delta_of(marks)
        if any(embedding.shape[1] > width for embedding in multimodal_embeddings):
            # Runner V1 has positions on the host, and embeddings on the device
            with gpu_sync_allowed() if marks.is_cpu else nullcontext():
                mrope_positions = fill_positions(
                    mrope_positions, marks, multimodal_embeddings, width, num_computed_tokens
                )
        bare = [embedding[:, :width] for embedding in multimodal_embeddings]
        if self.flashvid_inner is not None:
            bare = [rows.keep_marks(x, rows.marks_of(e)) for x, e in zip(bare, multimodal_embeddings, strict=True)]
        return bare, mrope_positions, delta
