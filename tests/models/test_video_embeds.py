# SPDX-License-Identifier: MIT
"""Videos that come as embeddings are served, or refused, with ``"enabled": false`` as vLLM does without the plugin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from flashvid_vllm import engine_args
from flashvid_vllm.core.settings import KEY

from ..support.engine import greedy, tokens_and_logprobs
from ..support.families import LLAVA_ONEVISION, LLAVA_VIDEO, QWEN2_5_VL, QWEN3_VL, Family

GRID = (4, 8, 12)  # in patches
OFF: dict[str, Any] = {KEY: {"enabled": False}}


def embeds(family: Family, width: int) -> dict[str, Any]:
    """multi_modal_data of a video that was encoded elsewhere."""
    rows = 0.1 * torch.randn(GRID[0] * GRID[1] * GRID[2] // 4, width, generator=torch.Generator().manual_seed(0))
    if family.kind.startswith("llava"):
        return {"video": rows[None]}
    video: dict[str, Any] = {"video_embeds": rows, "video_grid_thw": torch.tensor([GRID])}
    if family is QWEN3_VL:
        video["timestamps"] = [[0.5, 1.5, 2.5, 3.5]]
    return {"video": video}


def processed(family: Family, model: Path, data: Callable[[int], Any], flashvid: bool) -> Any:
    """What a processor makes of a prompt with such a video: ids and where the video is, or how it refuses."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    options: dict[str, Any] = engine_args(retention_ratio=0.3) if flashvid else {}
    config = EngineArgs(str(model), dtype="float32", enable_mm_embeds=True, **options).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    try:
        items = processor.info.parse_mm_data(data(config.model_config.get_inputs_embeds_size()))
        made = processor(f"{family.video}What happens?", items, hf_processor_mm_kwargs=OFF if flashvid else {})
    except Exception as error:
        return type(error), str(error)
    (where,) = made["mm_placeholders"]["video"]
    # plain vLLM says "all of them" with no mask at all
    return made["prompt_token_ids"], where.offset, where.length, where.get_num_embeds()


@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL, LLAVA_ONEVISION, LLAVA_VIDEO], ids=lambda f: f.name)
def test_the_prompt_is_that_of_plain_vllm(family: Family, models: Callable[[Any], Path]) -> None:
    """LLaVA's were refused with a KeyError of our own."""
    model = models(family)
    for data in (
        lambda width: embeds(family, width),
        lambda width: {"video": [torch.zeros(6, width)]},
        lambda width: {"video": {"video_embeds": torch.zeros(6, width)}},
    ):
        assert processed(family, model, data, True) == processed(family, model, data, False)


@pytest.mark.slow
@pytest.mark.longer("two engines each; what they are asked is compared above")
@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda f: f.name)
def test_the_answer_is_that_of_plain_vllm(family: Family, models: Callable[[Any], Path], engines: Any) -> None:
    answers = []
    for settings in (None, {"retention_ratio": 0.3}):
        llm = engines(models(family), settings, enable_mm_embeds=True)
        (model,) = llm.apply_model(lambda model: model.visual.out_hidden_size)
        prompt = {
            "prompt": f"{family.video}What happens?",
            "multi_modal_data": embeds(family, model),
            "mm_processor_kwargs": OFF if settings else {},
        }
        answers.append(tokens_and_logprobs(greedy(llm, [prompt])[0]))
        if settings:
            with pytest.raises(ValueError, match="cannot compress video_embeds"):
                greedy(llm, [{**prompt, "mm_processor_kwargs": {}}])
            assert tokens_and_logprobs(greedy(llm, [prompt])[0]) == answers[-1]
    assert answers[0][0] == answers[1][0]
    assert all(
        abs(one[i] - other[i]) < family.tolerance
        for one, other in zip(answers[0][1], answers[1][1], strict=True)
        for i in one.keys() & other.keys()
    )
