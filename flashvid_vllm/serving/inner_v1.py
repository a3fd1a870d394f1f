# SPDX-License-Identifier: MIT
"""Model Runner V1, blocks of KV and requests, told of tokens that are dropped inside the LLM (see ``models/inner``).

All do nothing for a model that drops none.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..models.processor_cache import INNER, video_of

if TYPE_CHECKING:
    from ..models.inner.install import Inner

# what a message says at its end
_WITHOUT = '"mm_processor_kwargs": {"flashvid": {"inner": false}}'


def plan_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """GPUModelRunner's ``_build_attention_metadata``, which plans a step before. Can go when V1 asks a model for its
    metadata, as V2."""

    @functools.wraps(original)
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner: Inner | None = getattr(self.model, "flashvid_inner", None)
        if inner is not None:
            scheduled = kwargs.get("num_scheduled_tokens")
            if scheduled is None:  # nothing is, in a run to measure or to compile
                inner.nothing()
            else:
                _prepare(inner, self, scheduled, kwargs["num_reqs"])
        return original(self, *args, **kwargs)

    return _build_attention_metadata


def _prepare(inner: "Inner", runner: Any, scheduled: dict[str, int], num_requests: int) -> None:
    batch, requests = runner.input_batch, runner.requests

    def prompt_of(request_id: str) -> tuple[int, Sequence[Any]]:
        request = requests[request_id]
        return request.num_prompt_tokens, request.mm_features

    step = [
        (name, int(batch.num_computed_tokens_cpu[row]), scheduled[name])
        for row, name in enumerate(batch.req_ids[:num_requests])
    ]
    inner.prepare(step, requests, prompt_of)


def read_no_prefix(original: Callable[..., Any]) -> Callable[..., Any]:
    """InputProcessor's ``process_inputs``. A request that drops tokens inside the LLM finds none of its prefix in the
    cache: which are dropped depends on its last token, so the KV of no other is its own. Can go when a plugin may say
    so of a request."""

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if _drops(request):
            try:
                check_request(request, self.vllm_config.scheduler_config.max_num_batched_tokens)
            except ValueError:
                _unsend(self.renderer.mm_processor_cache, request.mm_features)
                raise
            request.sampling_params.skip_reading_prefix_cache = True
        return request

    return process_inputs


def _unsend(cache: Any, features: Any) -> None:
    """Media that the engine will not hear of are not taken for sent, so that the next request brings them."""
    for feature in features if cache is not None else ():
        cache.invalidate(video_of(feature.mm_hash or feature.identifier))


def leave_no_prefix(original: Callable[..., Any]) -> Callable[..., Any]:
    """KVCacheManager's ``allocate_slots``. vLLM lets others find a block as soon as it is scheduled, and of a prompt
    whose chunks wait the layers from K on fill it with the last one. So such a request's blocks are found by nobody
    before its first token. Can go when a request may say so."""

    @functools.wraps(original)
    def allocate_slots(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if _drops(request):
            kwargs["delay_cache_blocks"] = True
        return original(self, request, *args, **kwargs)

    return allocate_slots


def _drops(request: Any) -> bool:
    return any(_dropped(feature) for feature in request.mm_features or ())


def _dropped(feature: Any) -> int:
    """Visual tokens of one of a request's media that are dropped inside the LLM."""
    if feature.data is None or INNER not in feature.data:
        return 0
    tokens, kept = feature.data[INNER].data.tolist()
    return int(tokens - kept)


def check_request(request: Any, most: int) -> None:
    """ValueError for what a request asks of tokens that layers from K on do not have, or if more than ``most`` are left
    for these layers, which get all of them in one step."""
    left = len(request.prompt_token_ids or ()) - sum(map(_dropped, request.mm_features))
    if left > most:
        raise ValueError(
            f"{left} tokens of this prompt are left inside the language model, whose later layers get them in one step "
            f"of at most {most} (--max-num-batched-tokens): send less, serve with more, or send {_WITHOUT}"
        )
    params = request.sampling_params
    if params.prompt_logprobs is not None or getattr(params, "prompt_logprob_token_ids", None) is not None:
        raise ValueError(
            "prompt_logprobs: this request drops tokens of its video inside the language model, which then have no "
            f"log-probabilities; leave it out, or send {_WITHOUT}"
        )
    if getattr(request, "resumable", False):
        raise ValueError(
            "this request's prompt may grow, and drops tokens of its video inside the language model by its last "
            f"token; send {_WITHOUT}"
        )
