# SPDX-License-Identifier: MIT
"""Dropping inside the LLM: where and how many by the model's depth, what it does not go with, and what a request may
not ask for. Only this has the refusals."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashvid_vllm.models.processor_cache import name_of
from flashvid_vllm.serving import inner, inner_v1

GOOD: dict[str, Any] = {
    "model_config.is_hybrid": False,
    "model_config.get_sliding_window": lambda: None,
    "model_config.runner_type": "generate",
    "speculative_config": None,
    "kv_transfer_config": None,
    "lora_config": None,
    "parallel_config.pipeline_parallel_size": 1,
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.prefill_context_parallel_size": 1,
    "parallel_config.data_parallel_size": 1,
    "parallel_config.enable_dbo": False,
    "parallel_config.ubatch_size": 0,
    "compilation_config.cudagraph_mode": None,
    "compilation_config.splitting_ops": None,
    "cache_config.kv_sharing_fast_prefill": False,
    "use_v2_model_runner": False,
}


def config(
    architecture: str = "Qwen2_5_VLForConditionalGeneration", depth: int = 28, levels: int = 0, **other: Any
) -> Any:
    made: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for name, value in (GOOD | other).items():
        part, _, field = name.rpartition(".")
        (made.setdefault(part, {}) if part else flat)[field or name] = value
    text = SimpleNamespace(num_hidden_layers=depth)
    vision = SimpleNamespace(deepstack_visual_indexes=list(range(levels)))
    made["model_config"] |= {
        "architecture": architecture, "hf_text_config": text, "hf_config": SimpleNamespace(vision_config=vision),
    }  # fmt: skip
    return SimpleNamespace(**flat, **{name: SimpleNamespace(**fields) for name, fields in made.items()})


QWEN3 = "Qwen3VLForConditionalGeneration"


@pytest.mark.parametrize(
    ("architecture", "depth", "settings", "layer", "ratio"),
    [
        ("Qwen2_5_VLForConditionalGeneration", 28, {"inner": True}, 20, 0.3),
        (QWEN3, 36, {"inner": True}, 28, 0.1),
        (QWEN3, 28, {"inner": True}, 22, 0.1),
        ("LlavaQwenForCausalLM", 80, {"inner": True}, 57, 0.3),
        ("LlavaQwenForCausalLM", 24, {"inner": True, "inner_layer": 3}, 3, 0.3),
        ("LlavaQwenForCausalLM", 24, {"inner": False, "inner_ratio": 0.5}, 17, 0.5),
        ("LlavaQwenForCausalLM", 24, {"method": "fastv"}, 2, None),
        ("LlavaQwenForCausalLM", 24, {"method": "fastv", "inner": True, "inner_layer": 5}, 5, None),
    ],
)
def test_the_papers_layer_and_share(
    architecture: str, depth: int, settings: dict[str, Any], layer: int, ratio: float | None
) -> None:
    chosen = inner.settle(config(architecture, depth, levels=3 * (architecture == QWEN3)), settings)
    assert (chosen["inner_layer"], chosen.get("inner_ratio"), chosen["inner_depth"]) == (layer, ratio, depth)
    assert chosen["inner"] == settings.get("inner", True)


def test_off_changes_nothing() -> None:
    for settings in ({}, {"inner": False}, {"retention_ratio": 0.1}):
        assert inner.settle(None, settings) is settings
        engine_args = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=None))
        inner.prepare(engine_args, settings)
        assert engine_args.compilation_config.cudagraph_mode is None


def test_graphs_are_of_single_pieces_unless_chosen() -> None:
    from vllm.config import CUDAGraphMode

    for given, then in ((None, CUDAGraphMode.PIECEWISE), (CUDAGraphMode.NONE, CUDAGraphMode.NONE)):
        engine_args = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=given))
        inner.prepare(engine_args, {"inner": True})
        assert engine_args.compilation_config.cudagraph_mode is then


def test_a_layer_that_there_is_not() -> None:
    for layer in (28, 40):
        with pytest.raises(ValueError, match=f"inner_layer={layer} must be from 1 to 27: the language model has 28"):
            inner.settle(config(), {"inner_layer": layer})
    with pytest.raises(ValueError, match=r"must be from 3 \(DeepStack adds to the first 3\) to 35"):
        inner.settle(config(QWEN3, 36, levels=3), {"inner_layer": 2})
    assert inner.settle(config(QWEN3, 36, levels=3), {"method": "fastv"})["inner_layer"] == 3
    with pytest.raises(ValueError, match="inner_depth=4: the language model has 28 layers; leave it out"):
        inner.settle(config(), {"inner": True, "inner_depth": 4})


def test_what_it_does_not_go_with() -> None:
    from vllm.config import CUDAGraphMode

    kv_update = {"compilation_config.splitting_ops": ["vllm::unified_kv_cache_update"]}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"model_config.is_hybrid": True}, "hybrid attention"),
        ({"model_config.get_sliding_window": lambda: 4096}, "sliding windows"),
        ({"model_config.runner_type": "pooling"}, "pooling"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "draft models"),
        ({"kv_transfer_config": object()}, "KV connectors"),
        ({"lora_config": object()}, "LoRA"),
        ({"parallel_config.pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config.decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config.prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config.data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config.enable_dbo": True}, "micro-batching"),
        ({"compilation_config.cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE, **kv_update}, "full CUDA graphs"),
        ({"compilation_config.cudagraph_mode": CUDAGraphMode.PIECEWISE}, "CUDA graphs that hold vllm::unified_kv"),
        ({"model_config.enable_return_routed_experts": True}, "--enable-return-routed-experts"),
        ({"cache_config.kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ]
    for other, reason in refused:
        with pytest.raises(ValueError, match=rf"\(inner, inner_layer\) does not work with {reason}"):
            inner.settle(config(**other), {"inner": True})
    fine = {"compilation_config.cudagraph_mode": CUDAGraphMode.PIECEWISE, **kv_update}
    inner.settle(config(**fine, speculative_config=SimpleNamespace(method="ngram")), {"inner": True})


UNSENT: list[str] = []
WORKER = SimpleNamespace(
    vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=20)),
    renderer=SimpleNamespace(mm_processor_cache=SimpleNamespace(invalidate=UNSENT.append)),
)


def request(kept: int, **params: Any) -> Any:
    elem = SimpleNamespace(data=torch.tensor([10, kept]))
    sampling = SimpleNamespace(**{"prompt_logprobs": None, "skip_reading_prefix_cache": False} | params)
    features = [
        SimpleNamespace(data=None, mm_hash=None, identifier="an image"),
        SimpleNamespace(data={"flashvid_inner": elem}, mm_hash=name_of("a video", b"settings"), identifier=""),
    ]
    ids = [0] * params.get("length", 20)
    return SimpleNamespace(
        mm_features=features, sampling_params=sampling, resumable=params.get("resumable", False), prompt_token_ids=ids
    )


def test_a_request_that_drops_tokens_leaves_no_prefix() -> None:
    """Its first blocks, text perhaps, wait for the layers from K on, and vLLM shows them to others at once."""
    allocate = inner_v1.leave_no_prefix(lambda self, request, tokens, delay_cache_blocks=False: delay_cache_blocks)
    assert allocate(None, request(3), 16)
    assert not allocate(None, request(10), 16)


def test_more_tokens_than_a_step_of_the_later_layers_takes() -> None:
    read = inner_v1.read_no_prefix(lambda self, made: made)
    read(WORKER, request(3, length=27))
    with pytest.raises(
        ValueError, match=r"^21 tokens of this prompt are left .* at most 20 \(--max-num-batched-tokens"
    ):
        read(WORKER, request(3, length=28))


def test_a_request_that_drops_tokens_reads_no_prefix() -> None:
    read = inner_v1.read_no_prefix(lambda self, made: made)
    assert read(WORKER, request(3)).sampling_params.skip_reading_prefix_cache
    assert not read(WORKER, request(10)).sampling_params.skip_reading_prefix_cache
    assert not read(WORKER, request(10, prompt_logprobs=1)).sampling_params.skip_reading_prefix_cache
    UNSENT.clear()
    with pytest.raises(ValueError, match="prompt_logprobs: this request drops tokens"):
        read(WORKER, request(3, prompt_logprobs=1))
    assert UNSENT == ["an image", "a video"]  # else the next request for them would send no pixels
    with pytest.raises(ValueError, match="this request's prompt may grow"):
        read(WORKER, request(3, resumable=True))
