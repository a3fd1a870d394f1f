# SPDX-License-Identifier: MIT
"""Too little room: a KV cache of hardly one prompt, steps smaller than a video, requests that leave in between."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ..support.engine import VIDEO, Clip, greedy, prompt_of, same

pytestmark = pytest.mark.slow

TEXT = f"<|im_start|>user\n{VIDEO}Describe the video.<|im_end|>\n<|im_start|>assistant\n"
TOLERANCE = 2e-5
RATIOS = (0.3, 0.9, 0.1, 0.25, 0.3, 0.15)
# 192 tokens of a video before compression, one prompt of up to 256 in the KV cache, 64 tokens a step
BLOCK = 32
TIGHT: dict[str, Any] = {
    "max_model_len": 8 * BLOCK, "block_size": BLOCK, "num_gpu_blocks_override": 9, "max_num_batched_tokens": 64,
    "max_num_seqs": 6, "enable_prefix_caching": True,
}  # fmt: skip
TOKENS = 48


@pytest.fixture
def llm(engines: Any, sharp_model: Path) -> Any:
    return engines(sharp_model, {"retention_ratio": 0.3}, **TIGHT)


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def prompts_from(seed: int) -> list[dict[str, Any]]:
    """Videos that no other test has in a cache, at several ratios."""
    return [
        prompt_of(TEXT, [Clip(16, 112, 168, seed=seed + index)], flashvid={"retention_ratio": ratio})
        for index, ratio in enumerate(RATIOS)
    ]


def alone(llm: Any, prompts: Sequence[Any]) -> list[Any]:
    """What each gets by itself, nothing of it in the prefix cache."""
    outputs = []
    for prompt in prompts:
        assert llm.reset_prefix_cache()
        outputs += greedy(llm, [prompt], TOKENS)
    assert llm.reset_prefix_cache()
    return outputs


def nothing_is_held(llm: Any) -> None:
    """All blocks and all of the encoder cache can be had again, and both sides agree on what is in it."""
    scheduler = scheduler_of(llm)
    assert scheduler.get_num_unfinished_requests() == 0
    blocks = scheduler.kv_cache_manager.block_pool
    assert blocks.get_num_free_blocks() == blocks.num_gpu_blocks - 1  # one is vLLM's own
    cache = scheduler.encoder_cache_manager
    assert cache.num_freeable_slots == cache.cache_size
    assert not any(cache.cached.values())
    held = sum(cache.freeable.values())
    assert cache.num_free_slots == cache.cache_size - held


def test_preempted_requests_answer_as_alone(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted request starts again: its video's embeddings may be gone, its positions are not to be."""
    prompts, scheduler = prompts_from(100), scheduler_of(llm)
    expected = alone(llm, prompts)
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def watched(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", watched)
    for one, other in zip(expected, greedy(llm, prompts, TOKENS), strict=True):
        same(one, other, TOLERANCE)
    assert len(preempted) > 1
    nothing_is_held(llm)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_requests_that_leave_do_not_touch_the_others(llm: Any, steps: int) -> None:
    """Running and waiting ones are aborted; one of them shares its video with one that stays."""
    from vllm import SamplingParams

    prompts = prompts_from(200 + 10 * steps)
    stays = (1, 3, 4)
    prompts[0] = prompts[4]  # leaves, and its video stays
    expected = dict(zip(stays, alone(llm, [prompts[i] for i in stays]), strict=True))
    nothing_is_held(llm)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True)
    engine = llm.llm_engine
    names = [engine.add_request(f"{steps}-{index}", prompt, params) for index, prompt in enumerate(prompts)]
    for _ in range(steps):
        engine.step()
    engine.abort_request([f"{steps}-{index}" for index in range(len(prompts)) if index not in stays])
    outputs: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    assert len(names) == len(prompts)
    assert sorted(outputs) == [f"{steps}-{index}" for index in stays]
    for index in stays:
        same(expected[index], outputs[f"{steps}-{index}"], TOLERANCE)
    nothing_is_held(llm)
