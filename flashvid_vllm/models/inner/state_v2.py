# SPDX-License-Identifier: MIT
"""Model Runner V2, told of tokens that are dropped inside the LLM by its own hook: a model may bring its state."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .install import Inner


class InnerModelState(DefaultModelState):
    """vLLM's state of a model, which plans a step before attention's metadata is made of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: dict[str, Any] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self._requests[new_req_data.req_id] = new_req_data

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._requests.pop(req_id, None)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inner: Inner = self.model.flashvid_inner
        names = input_batch.req_ids
        inner.nothing()
        if all(name in self._requests for name in names):  # else nothing is scheduled: to measure or to compile
            numbers = (input_batch.num_computed_tokens_np.tolist(), input_batch.num_scheduled_tokens.tolist())
            inner.prepare(zip(names, *numbers, strict=True), self._requests, self._prompt_of)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def _prompt_of(self, request_id: str) -> tuple[int, Sequence[Any]]:
        request = self._requests[request_id]
        return request.prompt_len, request.mm_features
