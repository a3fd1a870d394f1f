# SPDX-License-Identifier: MIT
"""What torch.compile makes of it: an LLM that is told positions, an encoder with a block whose q and k are needed."""

from pathlib import Path
from typing import Any

import pytest

from flashvid_vllm import engine_args

from ..support.engine import VIDEO, Clip, engine, greedy, prompt_of, same_answers, tokens_and_logprobs
from ..support.families import LLAVA_ONEVISION_ORIGINAL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.longer("compiles"),
]


def answers(llm: Any, video: str = VIDEO, **settings: Any) -> list[Any]:
    prompts = [
        prompt_of(f"{video}Describe the video.", [Clip(16, 112, 168)], flashvid={"retention_ratio": ratio, **settings})
        for ratio in (0.25, 0.1, 1)
    ]
    return [tokens_and_logprobs(output) for output in greedy(llm, prompts)]


def test_the_last_full_attention_block_stays_eager(sharp_model: Path) -> None:
    """With ``compile_mm_encoder``; the other blocks are compiled."""
    with engine(sharp_model, **engine_args(retention_ratio=0.25)) as llm:
        eager = answers(llm)
    options: dict[str, Any] = {"enforce_eager": False, "compilation_config": {"compile_mm_encoder": True}}
    with engine(sharp_model, **engine_args(retention_ratio=0.25), **options) as llm:
        # vLLM 0.32's compiled encoder does not run on a CPU while its weights want gradients
        llm.apply_model(lambda model: model.visual.requires_grad_(False))
        compiled = answers(llm)
        blocks = llm.apply_model(lambda model: [block.do_not_compile for block in model.visual.blocks])[0]
    assert blocks == [False, False, False, True]  # the tiny model's last full-attention block is its last
    same_answers(eager, compiled, 0.01)


def test_a_compiled_llm(tmp_path: Path) -> None:
    """It was traced for positions [3, n], as M-RoPE has them, and gets LLaVA's, those in the whole video. Where tokens
    are dropped inside it, prefill goes layer by layer and decoding behind it is compiled."""
    family = LLAVA_ONEVISION_ORIGINAL
    directory = family.make(tmp_path / "model")
    settings = engine_args(retention_ratio=0.25, inner_layer=2, inner_ratio=0.3, **family.settings)
    found = []
    for eager in (True, False):
        with engine(directory, **settings, enforce_eager=eager) as llm:
            found.append([*answers(llm, family.video), *answers(llm, family.video, inner=False)])
    same_answers(found[0], found[1], family.tolerance)
