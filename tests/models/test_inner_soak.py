# SPDX-License-Identifier: MIT
"""500 requests that drop tokens inside the LLM and that do not, in a random mix with aborts and preemptions: only this
has what one request leaves behind for another, and a block of the KV cache that is lost."""

import random
from pathlib import Path
from typing import Any

import pytest

from ..support.engine import Clip, Engines, chunked, greedy, prompt_of, same
from ..support.families import QWEN2_5_VL

pytestmark = [pytest.mark.slow, pytest.mark.longer("500 requests")]

VIDEO = QWEN2_5_VL.video
REQUESTS, AT_ONCE, STEPS = 500, 8, 10
CLIPS = [Clip(8, 84, 112), Clip(12, 112, 84, seed=1), Clip(4, 84, 84, seed=2)]
SETTINGS: list[Any] = [None, None, {"inner": False}, {"retention_ratio": 0.6}, {"enabled": False}]


def cases() -> list[Any]:
    made = [prompt_of("The quick brown fox. The quick")]
    for index, settings in enumerate(SETTINGS):
        for number in range(2):
            clip = CLIPS[(index + number) % len(CLIPS)]
            made.append(prompt_of(f"Clip {number}: {VIDEO}What happens?", [clip], flashvid=settings))
    made.append(prompt_of(f"{VIDEO}then{VIDEO}and?", CLIPS[:2]))
    return made


def test_every_answer_is_that_of_the_request_alone(sharp_model: Path, engines: Engines) -> None:
    from vllm import SamplingParams

    settings = {"retention_ratio": 0.3, "inner_layer": 2, "inner_ratio": 0.3}
    llm = engines(sharp_model, settings, num_gpu_blocks_override=24, max_model_len=700)
    prompts, draw = cases(), random.Random(0)
    alone = [greedy(llm, [prompt], STEPS)[0] for prompt in prompts]
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    assert engine.engine_core.reset_prefix_cache()
    free = pool.get_num_free_blocks()
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def watched(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = watched
    running: dict[str, int] = {}
    asked = answered = aborted = 0
    params = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=5, ignore_eos=True)
    try:
        with chunked(llm, 160):
            while asked < REQUESTS or running:
                while asked < REQUESTS and len(running) < AT_ONCE:
                    which = draw.randrange(len(prompts))
                    engine.add_request(f"soak-{asked}", prompts[which], params)
                    running[f"soak-{asked}"] = which
                    asked += 1
                if draw.random() < 0.03:
                    assert engine.engine_core.reset_prefix_cache(reset_running_requests=True)
                for output in engine.step():
                    if output.finished:
                        same(alone[running.pop(output.request_id)], output, QWEN2_5_VL.tolerance)
                        answered += 1
                if running and draw.random() < 0.05:
                    leaves = draw.choice(list(running))
                    engine.abort_request([leaves])
                    del running[leaves]
                    aborted += 1
    finally:
        scheduler._preempt_request = preempt
    assert answered + aborted == REQUESTS
    assert aborted > 20
    assert len(preempted) > 20
    engine.step()
    assert engine.engine_core.reset_prefix_cache()
    assert pool.get_num_free_blocks() == free
    assert llm.apply_model(lambda model: len(model.flashvid_inner.tracker._prompts))[0] <= AT_ONCE
