# SPDX-License-Identifier: MIT
"""Dropping inside the LLM where an engine needs a process of its own: n-gram drafts, two tensor-parallel ranks. Only
this has ranks that choose apart, and drafts behind a drop."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm import engine_args

from ..support.engine import (
    Clip,
    Engines,
    engine,
    greedy,
    in_new_process,
    picture,
    prepare_process_of_ranks,
    prompt_of,
    tokens_and_logprobs,
)
from ..support.families import LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, Family

pytestmark = [pytest.mark.slow, pytest.mark.longer("a process each")]

FAMILIES = [QWEN2_5_VL, QWEN3_VL, LLAVA_ONEVISION]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def settings_of(family: Family) -> dict[str, Any]:
    layer = 3 if family.kind.startswith("qwen3") else 2
    return {"retention_ratio": 0.3, "inner_layer": layer, "inner_ratio": 0.3, **family.settings}


def answers_of(llm: Any, family: Family) -> list[Any]:
    video, image = family.video, family.image
    prompts = [
        prompt_of(f"0 1 2 3 0 1 2 3 {video}0 1 2", [Clip(16, 112, 160)]),
        prompt_of(f"{image}{video}and{video}s", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)], [picture()]),
        prompt_of("The quick brown fox. The quick"),
    ]
    return [tokens_and_logprobs(output) for output in greedy(llm, prompts, 24)]


def drafted_answers(directory: str, name: str) -> tuple[list[Any], float]:
    """Runs in a process of its own: vLLM's n-gram drafter loads numba, after which no engine on a CPU can start."""
    family = next(family for family in FAMILIES if family.name == name)
    options = {"speculative_config": NGRAM, "disable_log_stats": False}
    with engine(directory, **engine_args(**settings_of(family)), **options) as llm:
        found = answers_of(llm, family)
        counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return found, counters["vllm:spec_decode_num_draft_tokens"]


def ranks_answers(directories: dict[str, str]) -> dict[str, Any]:
    """Runs in a process of its own."""
    prepare_process_of_ranks()
    found = {}
    for family in FAMILIES:
        with engine(directories[family.name], **engine_args(**settings_of(family)), tensor_parallel_size=2) as llm:
            found[family.name] = answers_of(llm, family)
    return found


def assert_same(one: list[Any], other: list[Any], tolerance: float) -> None:
    for (ids, steps), (other_ids, other_steps) in zip(one, other, strict=True):
        assert ids == other_ids
        for step, other_step in zip(steps, other_steps, strict=True):
            other_step = {int(token): value for token, value in other_step.items()}
            assert max(abs(step[i] - other_step[i]) for i in step.keys() & other_step.keys()) < tolerance


@pytest.fixture
def plain(engines: Engines, models: Callable[[Family], Path]) -> Callable[[Family], list[Any]]:
    def answers(family: Family) -> list[Any]:
        return answers_of(engines(models(family), settings_of(family), **family.engine_options), family)

    return answers


@pytest.mark.parametrize("family", [QWEN2_5_VL, LLAVA_ONEVISION], ids=lambda family: family.name)
def test_ngram_drafts_lose_nothing(family: Family, plain: Any, models: Any, tmp_path: Path) -> None:
    found, offered = in_new_process(drafted_answers, tmp_path, models(family), family.name)
    assert offered > 10
    assert_same(plain(family), found, family.tolerance)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each rank")
def test_two_ranks_answer_as_one(plain: Any, models: Any, tmp_path: Path) -> None:
    directories = {family.name: str(models(family)) for family in FAMILIES}
    found = in_new_process(ranks_answers, tmp_path, directories, env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    for family in FAMILIES:
        assert_same(plain(family), found[family.name], 5 * family.tolerance)
