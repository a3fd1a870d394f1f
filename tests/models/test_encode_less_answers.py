# SPDX-License-Identifier: MIT
"""A video whose encoder computes a share of its rows, from the request to the answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from ..support.engine import Clip, Engines, greedy, picture, prompt_of, same, tokens_and_logprobs
from ..support.families import LLAVA_ONEVISION, LLAVA_VIDEO, QWEN2_5_VL, QWEN3_VL, Family

pytestmark = [pytest.mark.slow, pytest.mark.longer("an engine; test_reuse_towers has the towers")]

FAMILIES = [pytest.param(family, id=family.name) for family in (QWEN3_VL, LLAVA_ONEVISION, QWEN2_5_VL, LLAVA_VIDEO)]
MOVING = Clip(8, 64, 96, seed=51)


class Still(Clip):
    def frames(self) -> np.ndarray:
        return np.repeat(super().frames()[:1], self.num_frames, axis=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers(family: Family, models: Callable[[Any], Path], engines: Engines) -> None:
    """Of a still video one frame is enough; a batch of shares answers as each alone; and shares make a difference."""
    llm = engines(models(family), {"retention_ratio": 0.3, **family.settings}, **family.engine_options)
    text, still = f"{family.video}What happens?", Still(8, 64, 96, seed=52)

    def asked(clip: Clip, **settings: Any) -> Any:
        return prompt_of(text, [clip], flashvid=settings)

    (whole,) = greedy(llm, [asked(still, retention_ratio=1)], 4)
    for less in (
        {"encoder_ratio": 0.25},
        {"encoder_ratio": "auto"},
        {"encoder_ratio": 0.25, "encoder_reuse": "frames"},
    ):
        same(greedy(llm, [asked(still, retention_ratio=1, **less)], 4)[0], whole, family.tolerance)

    prompts = [
        asked(MOVING),
        asked(MOVING, encoder_ratio=0.5),
        asked(MOVING, encoder_ratio=0.5, encoder_reuse="frames"),
        asked(MOVING, encoder_ratio=0.3, enabled=True, retention_ratio=1),
        prompt_of(f"{family.image}and {text}", [MOVING], [picture()], {"encoder_ratio": 0.25}),
    ]
    together = greedy(llm, prompts, 4)
    for output, prompt in zip(together, prompts, strict=True):
        same(greedy(llm, [prompt], 4)[0], output, family.tolerance)
    lengths = [len(output.prompt_token_ids) for output in together]
    assert lengths[0] == lengths[1] == lengths[2] < lengths[3]
    first = [tokens_and_logprobs(output)[1][0] for output in together[:3]]
    assert all(x != y for i, x in enumerate(first) for y in first[:i])
