# SPDX-License-Identifier: MIT
"""Dropping inside the LLM where an engine needs a process of its own: n-gram drafts, two tensor-parallel ranks. Only
this has ranks that choose apart, and drafts behind a drop."""

import os
from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm import engine_args

from ..support.engine import (
    Clip,
    Engines,
    engine,
    greedy,
    picture,
    prepare_process_of_ranks,
    prompt_of,
    tokens_and_logprobs,
)
from ..support.families import QWEN2_5_VL
from ..support.forks import in_fork

pytestmark = [pytest.mark.slow, pytest.mark.longer("a process each")]

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


SETTINGS: dict[str, Any] = {"retention_ratio": 0.3, "inner_layer": 2, "inner_ratio": 0.3}


def answers_of(llm: Any) -> list[Any]:
    video, image = QWEN2_5_VL.video, QWEN2_5_VL.image
    prompts = [
        prompt_of(f"0 1 2 3 0 1 2 3 {video}0 1 2", [Clip(16, 112, 160)]),
        prompt_of(f"{image}{video}and{video}s", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)], [picture()]),
        prompt_of("The quick brown fox. The quick"),
    ]
    return [tokens_and_logprobs(output) for output in greedy(llm, prompts, 24)]


def drafted_answers(directory: str) -> tuple[list[Any], float]:
    """Runs in a process of its own: vLLM's n-gram drafter loads numba, after which no engine on a CPU can start."""
    options = {"speculative_config": NGRAM, "disable_log_stats": False}
    with engine(directory, **engine_args(**SETTINGS), **options) as llm:
        found = answers_of(llm)
        counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return found, counters["vllm:spec_decode_num_draft_tokens"]


def ranks_answers(directory: str) -> list[Any]:
    """Runs in a process of its own."""
    prepare_process_of_ranks()
    with engine(directory, **engine_args(**SETTINGS), tensor_parallel_size=2) as llm:
        return answers_of(llm)


def assert_same(one: list[Any], other: list[Any], tolerance: float) -> None:
    for (ids, steps), (other_ids, other_steps) in zip(one, other, strict=True):
        assert ids == other_ids
        for step, other_step in zip(steps, other_steps, strict=True):
            other_step = {int(token): value for token, value in other_step.items()}
            assert max(abs(step[i] - other_step[i]) for i in step.keys() & other_step.keys()) < tolerance


@pytest.fixture
def plain(engines: Engines, sharp_model: Path) -> list[Any]:
    return answers_of(engines(sharp_model, SETTINGS))


def test_ngram_drafts_lose_nothing(plain: list[Any], sharp_model: Path, tmp_path: Path) -> None:
    found, offered = in_fork(drafted_answers, tmp_path, str(sharp_model))
    assert offered > 10
    assert_same(plain, found, QWEN2_5_VL.tolerance)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each rank")
def test_two_ranks_answer_as_one(plain: list[Any], sharp_model: Path, tmp_path: Path) -> None:
    found = in_fork(ranks_answers, tmp_path, str(sharp_model), env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    assert_same(plain, found, 5 * QWEN2_5_VL.tolerance)
