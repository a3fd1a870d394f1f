# SPDX-License-Identifier: MIT
"""Speculative decoding drafts from the compressed prompt and loses nothing."""

from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm import engine_args

from .engine import Clip, engine, greedy, prompt_of
from .families import LLAVA_VIDEO, QWEN2_5_VL, QWEN3_VL, Family

pytestmark = pytest.mark.slow
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.fixture(scope="module", params=[QWEN2_5_VL, QWEN3_VL, LLAVA_VIDEO], ids=lambda family: family.kind)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    family: Family = request.param
    return family, family.make(tmp_path_factory.mktemp("model") / family.kind)


def test_ngram_speculation_is_lossless(model: tuple[Family, Path]) -> None:
    family, directory = model
    prompts: list[Any] = [
        prompt_of(f"0 1 2 3 0 1 2 3 {family.video}0 1 2", [Clip(16, 112, 160)]),
        prompt_of(f"{family.video}and{family.video}", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)]),
        prompt_of("The quick brown fox. The quick"),
    ]
    answers = []
    for options in ({}, {"speculative_config": NGRAM}):
        with engine(directory, **engine_args(retention_ratio=0.3), disable_log_stats=False, **options) as llm:
            answers.append([output.outputs[0].token_ids for output in greedy(llm, prompts, 24)])
            counters = {metric.name: metric for metric in llm.get_metrics()}
    drafted = counters["vllm:spec_decode_num_draft_tokens"].value
    assert drafted > 10
    assert answers[0] == answers[1]
