# SPDX-License-Identifier: MIT
"""Speculative decoding drafts from the compressed prompt and loses nothing."""

from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm import engine_args

from ..support.drafts import make_eagle3
from ..support.engine import Clip, engine, greedy, prompt_of
from ..support.families import LLAVA_ONEVISION_ORIGINAL, QWEN2_5_VL, QWEN3_VL, Family
from ..support.forks import in_fork

pytestmark = [pytest.mark.slow, pytest.mark.longer("an engine each")]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


FAMILIES = [QWEN2_5_VL, LLAVA_ONEVISION_ORIGINAL]  # what n-grams see of Qwen3-VL is what they see of Qwen2.5-VL


def prompts_of(family: Family) -> list[Any]:
    """One video, two of them, and text alone."""
    video = family.video
    return [
        prompt_of(f"0 1 2 3 0 1 2 3 {video}0 1 2", [Clip(16, 112, 160)]),
        prompt_of(f"{video}and{video}", [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)]),
        prompt_of("The quick brown fox. The quick"),
    ]


def plain_and_drafted(directory: str, name: str) -> dict[str, Any]:
    """Greedy answers without and with a drafter of n-grams, and how many tokens that one has offered.

    Runs in a process of its own: vLLM's drafter loads numba, after which no engine on a CPU can start there.
    """
    family = next(family for family in FAMILIES if family.name == name)
    prompts, settings = prompts_of(family), engine_args(retention_ratio=0.3, **family.settings)
    with engine(directory, **settings) as llm:
        plain = chosen(llm, prompts, 24)
    with engine(directory, **settings, disable_log_stats=False, speculative_config=NGRAM) as llm:
        return {"plain": plain, "drafted": chosen(llm, prompts, 24), "offered": drafted(llm)[0]}


def is_lossless(found: dict[str, Any]) -> None:
    assert found["offered"] > 10
    assert found["drafted"] == found["plain"]


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_ngram_speculation_is_lossless(family: Family, models: Any, tmp_path: Path) -> None:
    is_lossless(in_fork(plain_and_drafted, tmp_path, str(models(family)), family.name))


def chosen(llm: Any, prompts: list[Any], max_tokens: int) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in greedy(llm, prompts, max_tokens)]


def drafted(llm: Any) -> tuple[float, float]:
    """Tokens that a speculating engine has drafted, and of those that it has accepted."""
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return counters["vllm:spec_decode_num_draft_tokens"], counters["vllm:spec_decode_num_accepted_tokens"]


@pytest.mark.parametrize(
    ("family", "step"),
    [
        pytest.param(QWEN2_5_VL, 32, id="qwen2_5_vl"),
        pytest.param(QWEN2_5_VL, 4096, id="qwen2_5_vl-whole"),
        pytest.param(QWEN3_VL, 32, id="qwen3_vl"),
    ],
)
def test_eagle3_is_lossless(family: Family, step: int, models: Any, engines: Any, tmp_path: Path) -> None:
    """The drafter asks for a chunk's embeddings once more, shifted by a token: they come without our channels, and
    the target's positions stay. In steps smaller than a video."""
    directory, prompts = models(family), prompts_of(family)
    plain = chosen(engines(directory, {"retention_ratio": 0.3}), prompts, 24)
    drafter = {
        "method": "eagle3",
        "model": str(make_eagle3(directory, tmp_path / "drafter")),
        "num_speculative_tokens": 3,
    }
    options = {"max_num_batched_tokens": step, "max_num_seqs": 8, "disable_log_stats": False}
    llm = engines(directory, {"retention_ratio": 0.3}, speculative_config=drafter, **options)
    assert chosen(llm, prompts, 24) == plain
    offered, accepted = drafted(llm)
    assert 0 < accepted < offered
