# SPDX-License-Identifier: MIT
"""Speculative decoding drafts from the compressed prompt and loses nothing."""

from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm import engine_args

from .engine import Clip, engine, greedy, in_new_process, prompt_of
from .families import LLAVA_ONEVISION_ORIGINAL, LLAVA_VIDEO, QWEN2_5_VL, QWEN3_VL, Family

pytestmark = pytest.mark.slow
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


FAMILIES = [QWEN2_5_VL, QWEN3_VL, LLAVA_VIDEO, LLAVA_ONEVISION_ORIGINAL]


def answers(directory: str, name: str, speculate: bool) -> tuple[list[list[int]], float]:
    """Greedy answers, and how many tokens were drafted for them."""
    family = next(family for family in FAMILIES if family.name == name)
    video = family.video
    prompts: list[Any] = [
        prompt_of(f"0 1 2 3 0 1 2 3 {video}0 1 2", [Clip(16, 112, 160)]),
        prompt_of(f"{video}and{video}", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)]),
        prompt_of("The quick brown fox. The quick"),
    ]
    options = {"speculative_config": NGRAM} if speculate else {}
    with engine(
        directory, **engine_args(retention_ratio=0.3, **family.settings), disable_log_stats=False, **options
    ) as llm:
        chosen = [list(output.outputs[0].token_ids) for output in greedy(llm, prompts, 24)]
        counters = {metric.name: metric for metric in llm.get_metrics()}
    drafted = counters["vllm:spec_decode_num_draft_tokens"].value if speculate else 0
    return chosen, drafted


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=pytest.mark.longer("a variant") if family.original else [])
        for family in FAMILIES
    ],
)
def test_ngram_speculation_is_lossless(family: Family, tmp_path: Path) -> None:
    directory = str(family.make(tmp_path / family.kind))
    plain, _ = answers(directory, family.name, False)
    # vLLM's n-gram drafter loads numba, after which no engine on a CPU can start in the same process
    speculated, drafted = in_new_process(answers, tmp_path, directory, family.name, True)
    assert drafted > 10
    assert speculated == plain
