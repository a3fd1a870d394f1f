# SPDX-License-Identifier: MIT
"""How many videos a step of the engine encodes: as many as without compression.

vLLM's scheduler fills a step's encoder budget with the tokens that the language model gets. At a tenth of them ten
times as many waiting videos would be encoded in one step, before the first of them is prefilled and while all that
is being answered stands still. But the encoder sees every patch whatever is kept afterwards, so here a video takes
of that budget what it has before compression. Can go when vLLM counts what the encoder sees.
"""

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager as _EncoderCacheManager
from vllm.v1.request import Request

from ..models.processor_cache import FULL_EMBEDS


class EncoderCacheManager(_EncoderCacheManager):
    """vLLM's, which grants a step's encoder budget by what videos have before compression."""

    def __init__(self, cache_size: int) -> None:
        super().__init__(cache_size)
        self._budget = 0  # of a step, as far as it is known: the highest that was seen
        self._left = 0  # of it, in tokens before compression

    def can_allocate(
        self, request: Request, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        """As vLLM's. ``encoder_compute_budget`` is whole as long as a step encodes nothing."""
        if encoder_compute_budget >= self._budget:
            self._budget = self._left = encoder_compute_budget
        cost = self._tokens(request, input_id)
        # the first is let through whatever it costs: it would never be
        if cost > self._left < self._budget:
            return False
        if not super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule):
            return False
        self._left -= cost
        return True

    def _tokens(self, request: Request, input_id: int) -> int:
        """Embeddings of an item before compression; of a video that does not say them all that a step has."""
        feature = request.mm_features[input_id]
        if feature.modality != "video":
            return request.get_num_encoder_embeds(input_id)
        if feature.data is None or FULL_EMBEDS not in feature.data:
            return self._budget
        return int(feature.data[FULL_EMBEDS].data)
