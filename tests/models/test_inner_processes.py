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
    same_answers,
    tokens_and_logprobs,
)
from ..support.families import QWEN2_5_VL
from ..support.forks import in_fork
from .test_speculative import NGRAM, drafted

pytestmark = [pytest.mark.slow, pytest.mark.longer("a process each")]


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
        return answers_of(llm), drafted(llm)[0]


def ranks_answers(directory: str) -> list[Any]:
    """Runs in a process of its own."""
    prepare_process_of_ranks()
    with engine(directory, **engine_args(**SETTINGS), tensor_parallel_size=2) as llm:
        return answers_of(llm)


@pytest.fixture
def plain(engines: Engines, sharp_model: Path) -> list[Any]:
    return answers_of(engines(sharp_model, SETTINGS))


def test_ngram_drafts_lose_nothing(plain: list[Any], sharp_model: Path, tmp_path: Path) -> None:
    found, offered = in_fork(drafted_answers, tmp_path, str(sharp_model))
    assert offered > 10
    same_answers(plain, found, QWEN2_5_VL.tolerance)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each rank")
def test_two_ranks_answer_as_one(plain: list[Any], sharp_model: Path, tmp_path: Path) -> None:
    found = in_fork(ranks_answers, tmp_path, str(sharp_model), env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    same_answers(plain, found, 5 * QWEN2_5_VL.tolerance)
