# SPDX-License-Identifier: MIT
"""Model Runner V2, the default on a GPU: the tests of vLLM's other runner, as they stand, on it.

It needs Triton; on a CPU its kernels are interpreted (tests/support/v2_on_cpu.py), in processes of their own.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from ..support.engine import in_new_process
from ..support.families import QWEN2_5_VL
from ..support.inner import run_inside
from .test_speculative import is_lossless, plain_and_drafted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FLASHVID_RUNNER" in os.environ, reason="starts such tests, and is none"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

# of each kind one: whole and chunked prompts, a batch of ratios, caches, media ids in texts, three kinds of positions
SOME = [
    "models/runner_v2/test_calls.py::test_videos_of_several_requests_in_one_call[qwen2_5_vl]",
    "models/test_engine_oracle.py::test_same_answer_as_transformers[two videos-32-0.5]",
    "models/test_engine_oracle.py::test_same_answer_as_transformers[and an image-None-0.1]",
    "models/test_engine_oracle.py::test_positions_as_the_model_receives_them[chunked-two videos]",
    "models/test_engine_oracle.py::test_a_prefix_hit_inside_a_video[chunked]",
    "models/test_families.py::test_same_answer_as_the_oracle[qwen3_vl-text around two videos-chunked-0.5]",
    "models/test_families.py::test_token_budget_disabled_and_another_method[llava_onevision-original]",
    "models/test_families.py::test_same_answer_as_the_oracle[llava_onevision-original-one video-chunked-0.5]",
    "models/test_inner.py::test_same_answer_as_the_oracle[qwen2_5_vl-text around two videos-chunked]",
]
# of families that differ in their tower or experts alone one; without EAGLE: on V2 its drafter is handed one layer's
# states, not three, for a text in plain vLLM too
ALL = {
    "test_engine_oracle.py": (
        "models/runner_v2", "models/test_engine_oracle.py", "models/test_positions_and_ids.py", "models/test_lora.py",
        "serving/test_pressure.py::test_preempted_requests_answer_as_alone", "models/test_encode_less_answers.py",
        "models/test_inner.py::test_together_as_alone_and_again",
    ),
    "test_inner.py": (
        "models/test_inner.py::test_same_answer_as_the_oracle",
        "-k", "(qwen3_vl or llava_onevision) and two and chunked",
    ),
    "test_families.py": (
        "models/test_families.py",
        "-k", "(qwen and not moe) or (llava_onevision and not clip)",
    ),
}  # fmt: skip


def passes(*arguments: str, tests: str = "quick") -> str:
    printed = run_inside(*arguments, FLASHVID_RUNNER="v2", FLASHVID_TESTS=tests)
    assert re.search(r"\b[1-9]\d* passed", printed)
    return printed


def test_some_of_each() -> None:
    assert f"\n{len(SOME)} passed" in passes(*SOME)


@pytest.mark.longer("all that test_some_of_each has some of")
@pytest.mark.parametrize("name", ALL)
def test_all(name: str) -> None:
    tests = "full" if name == "test_inner.py" else "quick"  # whose families other than Qwen2.5-VL are for that
    passes(*ALL[name], *(f"--deselect=tests/{test}" for test in SOME), tests=tests)


@pytest.mark.longer("drafting")
def test_ngram_speculation(sharp_model: Path, tmp_path: Path) -> None:
    """In its own process, since it is asked for when vLLM is imported."""
    env = {"FLASHVID_RUNNER": "v2"}
    is_lossless(in_new_process(plain_and_drafted, tmp_path, str(sharp_model), QWEN2_5_VL.name, env=env))
