# SPDX-License-Identifier: MIT
"""Two tensor-parallel ranks on CPU, the encoder shared by heads or by videos: same tokens, answers as of one."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
from ..support.families import (
    LLAVA_VIDEO_ORIGINAL,
    QWEN2_5_VL,
    QWEN3_VL,
    Family,
)
from ..support.forks import in_fork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.longer("10 s a start"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each rank"),
]

# Qwen3.5's encoder is Qwen3-VL's, LLaVA-OneVision's is LLaVA-Video's, of which the whole model is ours
FAMILIES = [QWEN2_5_VL, QWEN3_VL, LLAVA_VIDEO_ORIGINAL]


def answers_of(llm: Any, family: Family) -> list[Any]:
    """Greedy answers."""
    settings = {"retention_ratio": 0.2}
    prompts = [
        prompt_of(f"{family.video}Describe the video.", [Clip(16, 112, 112)], flashvid=settings),
        prompt_of(
            f"{family.image}then{family.video}and{family.video}s",
            [Clip(4, 84, 112), Clip(9, 112, 84, seed=1)],
            [picture()],
            settings,
        ),
        prompt_of(
            f"{family.video}What moves?", [Clip(12, 112, 84, seed=2)], flashvid={**settings, "encoder_ratio": 0.3}
        ),
    ]
    return [tokens_and_logprobs(output) for output in greedy(llm, prompts, 6)]


def answers(directory: Path, family: Family, **options: Any) -> dict[str, Any]:
    """Greedy answers of several ranks, and what each rank's encoder gave the language model."""
    from flashvid_vllm import engine_args

    settings = engine_args(retention_ratio=0.3, **family.settings)
    with engine(directory, **settings, **family.engine_options, **options) as llm:
        llm.apply_model(watch_embeddings)
        return {"answers": answers_of(llm, family), "ranks": llm.apply_model(seen_embeddings)}


def watch_embeddings(model: Any) -> None:
    """Runs in every rank: note a digest of whatever the encoder returns, and how many rows it computed of less."""
    original, digests = model.embed_multimodal, []

    def keep(**kwargs: Any) -> Any:
        out = original(**kwargs)
        found = [hashlib.sha256(rows.float().numpy().tobytes()).hexdigest() for rows in out]
        digests.append(found + [str(len(reuse.rows)) for reuse in model.flashvid_reuses if reuse is not None])
        return out

    model.embed_multimodal, model.test_digests = keep, digests


def seen_embeddings(model: Any) -> list[list[str]]:
    return model.test_digests


CASES = [
    (family, encoder)
    for family in FAMILIES
    for encoder in ("weights", "data")
    # vLLM shares LLaVA's encoder by heads only, and both Qwens' by videos in one way
    if encoder == "weights" or family is QWEN3_VL
]
IDS = [f"{encoder}-{family.name}" for family, encoder in CASES]


def answers_of_two(directories: dict[str, str]) -> dict[str, Any]:
    """Runs in a process of its own."""
    prepare_process_of_ranks()
    return {
        name: answers(Path(directories[family.name]), family, tensor_parallel_size=2, mm_encoder_tp_mode=encoder)
        for name, (family, encoder) in zip(IDS, CASES, strict=True)
    }


@pytest.fixture(scope="module")
def two_ranks(models: Callable[[Family], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for apply_model
    }
    directories = {family.name: str(models(family)) for family in FAMILIES}
    return in_fork(answers_of_two, tmp_path_factory.mktemp("two"), directories, env=env)


@pytest.mark.parametrize(("family", "encoder"), CASES, ids=IDS)
def test_two_ranks_answer_as_one(
    family: Family, encoder: str, two_ranks: dict[str, Any], models: Callable[[Family], Path], engines: Engines
) -> None:
    llm = engines(models(family), {"retention_ratio": 0.3, **family.settings}, **family.engine_options)
    one = answers_of(llm, family)
    two = two_ranks[f"{encoder}-{family.name}"]
    first, second = two["ranks"]
    assert first == second
    assert len(first) >= 4  # an image, videos one by one
    assert any(entry.isdecimal() for call in first for entry in call)  # of the last one some rows, on either rank
    alike = len(one) if encoder == "weights" else -1  # ranks with frames of their own copy no rows of each other's
    same_answers(one[:alike], two["answers"][:alike], 5 * family.tolerance)
