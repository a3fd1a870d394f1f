# SPDX-License-Identifier: MIT
"""How Model Runner V2 calls a model: several videos at once, and steps that are scheduled before the last has ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm import engine_args
from flashvid_vllm.models.processor_cache import FIELD

from ...support.engine import Clip, Engines, engine, greedy, prompt_of, same
from ...support.families import LLAVA_ONEVISION_ORIGINAL, QWEN2_5_VL, QWEN3_VL, Family

CLIPS = [Clip(8, 84, 112), Clip(12, 84, 112, seed=1), Clip(8, 112, 84, seed=2)]
SETTINGS: list[dict[str, Any]] = [{"retention_ratio": 0.5}, {"retention_ratio": 0.1}, {"enabled": False}]


def prompts_of(family: Family) -> list[Any]:
    return [
        prompt_of(f"{family.video}What happens?", [clip], [], settings)
        for clip, settings in zip(CLIPS, SETTINGS, strict=True)
    ]


def assert_same(outputs: list[Any], others: list[Any], tolerance: float) -> None:
    for output, other in zip(outputs, others, strict=True):
        same(output, other, tolerance)


@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL, LLAVA_ONEVISION_ORIGINAL], ids=lambda family: family.name)
def test_videos_of_several_requests_in_one_call(
    family: Family, models: Callable[[Family], Path], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engines(models(family), {"retention_ratio": 0.3, **family.settings}, **family.engine_options)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert type(runner).__module__ == "vllm.v1.worker.cpu.model_runner"
    prompts = prompts_of(family)
    alone = [greedy(llm, [prompt])[0] for prompt in prompts]
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    calls: list[set[bytes]] = []
    embed = runner.model.embed_multimodal

    def watched(**kwargs: Any) -> Any:
        calls.append({bytes(row.flatten().tolist()) for row in kwargs[FIELD]})
        return embed(**kwargs)

    monkeypatch.setattr(runner.model, "embed_multimodal", watched)
    assert_same(greedy(llm, prompts), alone, family.tolerance)
    assert max(map(len, calls)) == 3


def test_async_scheduling(models: Callable[[Family], Path], engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's default, which the CPU platform switches off."""
    from vllm.platforms.cpu import CpuPlatform

    family = QWEN2_5_VL
    prompts = prompts_of(family)
    expected = greedy(engines(models(family), {"retention_ratio": 0.3}), prompts)
    check: Any = CpuPlatform.__dict__["check_and_update_config"]

    def keep(cls: Any, config: Any) -> None:
        chosen = config.scheduler_config.async_scheduling
        check.__func__(cls, config)
        config.scheduler_config.async_scheduling = chosen

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
    with engine(models(family), async_scheduling=True, **engine_args(retention_ratio=0.3)) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert_same(greedy(llm, prompts), expected, family.tolerance)
