# SPDX-License-Identifier: MIT
"""Tokens dropped inside the LLM: where and how many, from the model's depth, and what it does not go with."""

from collections.abc import Mapping
from typing import Any

from ..core.config import FASTV, FASTV_LAYER
from ..core.settings import INNER, INNER_DEPTH, INNER_LAYER, INNER_RATIO, METHOD
from ..models import FAMILIES

_KV_UPDATE = "vllm::unified_kv_cache_update"


def is_asked_for(settings: Mapping[str, Any]) -> bool:
    """Whether a server's settings let any request drop tokens inside the LLM."""
    return bool(settings.get(INNER)) or INNER_LAYER in settings or INNER_RATIO in settings or _is_fastv(settings)


def _is_fastv(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get(METHOD) == FASTV)


def prepare(engine_args: Any, settings: Mapping[str, Any]) -> None:
    """Before vLLM makes its config: CUDA graphs of single pieces, unless the user has chosen."""
    compilation = getattr(engine_args, "compilation_config", None)
    if is_asked_for(settings) and compilation is not None and compilation.cudagraph_mode is None:
        from vllm.config import CUDAGraphMode

        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def settle(config: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings with K, r and L, where any request may drop tokens inside the LLM; else as they are.

    Raises:
        ValueError: a layer that the model does not have, or an option that this does not go with.
    """
    if not is_asked_for(settings):
        return settings
    text = config.model_config.hf_text_config
    depth = int(text.num_hidden_layers)
    if settings.get(INNER_DEPTH, depth) != depth:
        raise ValueError(f"{INNER_DEPTH}={settings[INNER_DEPTH]}: the language model has {depth} layers; leave it out")
    family = FAMILIES[config.model_config.architecture]
    numerator, denominator, ratio = family.inner
    levels = len(getattr(config.model_config.hf_config.vision_config, "deepstack_visual_indexes", None) or ())
    if _is_fastv(settings):
        chosen = {INNER: True, INNER_LAYER: settings.get(INNER_LAYER, max(FASTV_LAYER, levels)), INNER_DEPTH: depth}
    else:
        layer = settings.get(INNER_LAYER, (2 * depth * numerator + denominator) // (2 * denominator))
        chosen = {INNER: settings.get(INNER, True), INNER_LAYER: layer, INNER_DEPTH: depth}
        chosen[INNER_RATIO] = settings.get(INNER_RATIO, ratio)
    least = max(1, levels)
    if not least <= chosen[INNER_LAYER] < depth:
        why = f" (DeepStack adds to the first {levels})" if levels > 1 else ""
        raise ValueError(
            f"{INNER_LAYER}={chosen[INNER_LAYER]} must be from {least}{why} to {depth - 1}: the language model has "
            f"{depth} layers"
        )
    refuse(config)
    return {**settings, **chosen}


def refuse(config: Any) -> None:
    """ValueError for an option under which tokens that are dropped inside the LLM would make answers wrong."""
    from vllm import envs

    parallel, compilation = config.parallel_config, config.compilation_config
    speculative, mode = config.speculative_config, compilation.cudagraph_mode
    refused = [
        (
            bool(config.model_config.is_hybrid),
            "hybrid attention (Qwen3.5): its linear layers keep a state of all tokens, so layers that drop some and "
            "layers that cannot would alternate",
        ),
        (
            config.model_config.get_sliding_window() is not None,
            "sliding windows: which tokens are in a window is counted by those that are cached; serve with "
            "--disable-sliding-window if the model allows it",
        ),
        (config.model_config.runner_type == "pooling", "pooling: it reads the hidden states of tokens that are gone"),
        (
            speculative is not None and speculative.method != "ngram",
            "draft models (--speculative-config): a drafter's own layers have all tokens, and share the lengths of the "
            'target\'s; n-gram drafts work ({"method": "ngram"})',
        ),
        (
            config.kv_transfer_config is not None,
            "KV connectors (--kv-transfer-config): they pass on KV by the prompt's tokens, of which later layers have "
            "fewer",
        ),
        (config.lora_config is not None, "LoRA: adapters are chosen token by token, for all layers alike"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism: the stages would have to agree on the tokens"),
        (
            parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism: each rank has a part of a prompt's tokens, and ranks them alone",
        ),
        (
            parallel.data_parallel_size > 1,
            "data parallelism (--data-parallel-size): ranks take steps of one size; start one server a rank",
        ),
        (
            parallel.enable_dbo or getattr(parallel, "ubatch_size", 0) > 1,
            "micro-batching (--enable-dbo): half a step has no plan of its own",
        ),
        (
            mode is not None and mode.has_full_cudagraphs(),
            "full CUDA graphs: they would replay a step with the lengths of another; use "
            '--compilation-config \'{"cudagraph_mode": "PIECEWISE"}\'',
        ),
        (
            mode is not None
            and mode.has_piecewise_cudagraphs()
            and _KV_UPDATE not in (compilation.splitting_ops or ()),
            f"CUDA graphs that hold {_KV_UPDATE}: they would write to the slots of another step; leave splitting_ops "
            "and use_inductor_graph_partition as they are",
        ),
        (
            bool(getattr(config.model_config, "enable_return_routed_experts", False)),
            "--enable-return-routed-experts: later layers route fewer tokens than are told",
        ),
        (
            bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH),
            "VLLM_USE_BREAKABLE_CUDAGRAPH=1: its graphs hold all that a model's forward pass does; leave it out",
        ),
        (bool(config.cache_config.kv_sharing_fast_prefill), "--kv-sharing-fast-prefill: it shortens the same layers"),
    ]
    for is_set, what in refused:
        if is_set:
            raise ValueError(f"dropping tokens inside the LLM ({INNER}, {INNER_LAYER}) does not work with {what}")
