# SPDX-License-Identifier: MIT
"""Every family through vLLM with the plugin, against the same weights outside vLLM.

test_engine_oracle.py looks more closely, at Qwen2.5-VL.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashvid_vllm.models.plain_video import count_tokens
from flashvid_vllm.models.processor_cache import FIELD
from flashvid_vllm.models.settings_row import unpack_settings

from ..support.engine import Clip, Engines, check, chunked, engine, greedy, picture, prompt_of, record_positions
from ..support.families import (
    EXACT,
    LLAVA_ONEVISION_ORIGINAL,
    LLAVA_VIDEO,
    LLAVA_VIDEO_ORIGINAL,
    QWEN3_5,
    QWEN3_5_MOE,
    Family,
)
from ..support.oracles.qwen3_5_float32 import float32_linear_attention

pytestmark = pytest.mark.slow

HEAD, TAIL = "<|im_start|>user\n", "\nWhat happens in this clip?<|im_end|>\n<|im_start|>assistant\n"
LONG, OTHER = Clip(20, 128, 192), Clip(9, 160, 96, 0.25, seed=2)
# {i} and {v} are where the media go
CASES: dict[str, tuple[str, list[Clip], list[np.ndarray]]] = {
    "one video": (f"{HEAD}{{v}}{TAIL}", [LONG], []),
    "text around two videos": (f"{HEAD}The quick brown fox.{{v}}0 1 2 3{{v}}{TAIL}", [OTHER, LONG], []),
    "image, video": (f"{HEAD}{{i}}\n{{v}}{TAIL}", [OTHER], [picture()]),
    "nothing around it": ("{v}", [OTHER], []),
    # without images and behind the last video, users only speak of them: in the system message, in an earlier turn
    "media ids in the text": (
        f"<|im_start|>system\nMind {{i}}<|im_end|>\n{HEAD}{{i}}{{v}} and {{i}}<|im_end|>\n{HEAD}{{v}}{{i}}{{v}}{TAIL}",
        [OTHER, LONG],
        [],
    ),
}
VARIANTS = ("qwen3_vl_moe", "qwen3_5_moe", "llava_onevision_clip", "llava_video", "llava_video_frame")


@dataclass(frozen=True)
class Served:
    """A family's tiny model in vLLM, and its oracle."""

    family: Family
    llm: Any
    oracle: Any

    def prompt(self, name: str, settings: dict[str, Any] | None) -> dict[str, Any]:
        text, clips, images = CASES[name]
        return prompt_of(text.format(i=self.family.image, v=self.family.video), clips, images, settings)

    def assemble(self, name: str, settings: dict[str, Any] | None) -> tuple[Any, torch.Tensor]:
        text, clips, images = CASES[name]
        text = self.family.for_oracle(text.format(i=self.family.image, v=self.family.video), len(clips))
        return self.oracle.assemble(text, clips, images, settings)

    def check(self, name: str, settings: dict[str, Any] | None, expected: dict[str, Any] | None) -> None:
        output = greedy(self.llm, [self.prompt(name, settings)])[0]
        embeddings, positions = self.assemble(name, expected)
        assert len(output.prompt_token_ids) == len(embeddings)
        check(output, self.oracle.greedy(embeddings, positions, 6), self.family.tolerance)


LONGER = pytest.mark.longer("a variant")


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, id=f.name, marks=LONGER if {f.kind, f.name} & set(VARIANTS) else []) for f in EXACT],
)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    linear_attention = float32_linear_attention() if request.param in (QWEN3_5, QWEN3_5_MOE) else nullcontext()
    with linear_attention:
        yield request.param


@pytest.fixture
def served(
    family: Family, engines: Engines, models: Callable[[Family], Path], oracles: Callable[[Family], Any]
) -> Served:
    llm = engines(models(family), {"retention_ratio": 0.3, **family.settings}, **family.engine_options)
    return Served(family, llm, oracles(family))


@pytest.fixture
def chunk(request: pytest.FixtureRequest, served: Served) -> Iterator[None]:
    """Whole prompts (None), or prompts in chunks smaller than a video."""
    with chunked(served.llm, request.param):
        yield


# 1 is the plain model's path; a chunk that ends inside a video needs one of more tokens than that
@pytest.mark.parametrize(
    ("chunk", "ratio"),
    [(None, 0.1), (32, 0.5), pytest.param(None, 1, marks=pytest.mark.longer("plain"))],
    ids=["whole-0.1", "chunked-0.5", "whole-1"],
    indirect=["chunk"],
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("chunk")
def test_same_answer_as_the_oracle(served: Served, name: str, ratio: float) -> None:
    settings = {"retention_ratio": ratio}
    served.check(name, settings, settings)


def test_token_budget_disabled_and_another_method(served: Served) -> None:
    served.check("text around two videos", {"token_budget": 20}, {"token_budget": 20})
    served.check("text around two videos", {"enabled": False}, None)
    still = {"method": "adaptive", "retention_ratio": 0.4}  # which asks whether tokens keep their positions
    served.check("text around two videos", still, still)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("one video", 32), ("text around two videos", 32), ("image, video", None), ("nothing around it", 32)],
    indirect=["chunk"],
)
@pytest.mark.usefixtures("chunk")
def test_positions_are_those_of_the_oracle(served: Served, name: str) -> None:
    settings = {"retention_ratio": 0.37}
    steps = record_positions(served.llm, [served.prompt(name, settings)])
    received = torch.cat(steps, dim=-1)
    _, positions = served.assemble(name, settings)
    length = positions.shape[-1]
    assert torch.equal(received[..., :length], positions)
    continued = torch.arange(served.oracle.next_position, served.oracle.next_position + 5)
    assert torch.equal(received[..., length:], continued.expand(*received.shape[:-1], 5))


def test_together_as_alone(served: Served) -> None:
    """Prompts of one batch, compressed and not, answer as each does alone."""
    prompts = [
        served.prompt(name, settings)
        for name in ("one video", "image, video")
        for settings in ({"retention_ratio": 0.2}, {"enabled": False}, {"retention_ratio": 0.05})
    ]
    alone = [greedy(served.llm, [prompt])[0].outputs[0].token_ids for prompt in prompts]
    assert [output.outputs[0].token_ids for output in greedy(served.llm, prompts)] == alone


def test_memory_is_measured_on_uncompressed_videos(served: Served) -> None:
    """A request may ask for the plain model, and a step of the encoder takes one video's pixels at a time."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(served.llm.llm_engine.vllm_config, MULTIMODAL_REGISTRY)
    ((modality, item),) = budget.get_dummy_encoder_profile_inputs("video", 1)
    assert modality == "video"
    grid = budget.processor.video_grid(item)
    layout = budget.processor.video_layout(item, [grid[1]] * grid[0])
    embeds = layout.count(budget.processor.video_token())
    assert (
        count_tokens(unpack_settings(item[FIELD].data), *grid)
        == grid[0] * grid[1]
        <= embeds
        <= budget.mm_max_toks_per_item["video"]
    )
    runner = served.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert runner.is_multimodal_pruning_enabled or runner.requires_sequential_video_encoding
    assert runner.requires_sequential_video_encoding == served.family.kind.startswith("llava")


@pytest.mark.longer("an engine; tests/models/test_llava_video_config.py has what finds the model")
def test_llava_video_is_served_without_the_option_too(tmp_path: Path) -> None:
    """vLLM alone does not know the model."""
    directory = LLAVA_VIDEO.make(tmp_path / "model")
    with engine(directory, **LLAVA_VIDEO.engine_options) as llm:
        plain = Served(LLAVA_VIDEO, llm, LLAVA_VIDEO.load_oracle(directory))
        for name in CASES:
            plain.check(name, None, None)
        # the released code's own way to write it, where there are no images
        output = greedy(llm, [prompt_of("<image>\nWhat happens?", [OTHER])])[0]
        other = greedy(llm, [prompt_of(f"{LLAVA_VIDEO.video}\nWhat happens?", [OTHER])])[0]
        assert output.prompt_token_ids == other.prompt_token_ids
        # a place for every video and no more; any <image> is one only where its own are too few
        for text, oracle_text, clips in (
            ("<image>a <image>", "<video>a <image>", [OTHER]),
            (f"<image>a {LLAVA_VIDEO.video}b<image>", "<image>a <video>b<image>", [OTHER]),
            (f"<image>a {LLAVA_VIDEO.video}b<image>", "<video>a <video>b<image>", [OTHER, LONG]),
        ):
            expected = plain.oracle.greedy(*plain.oracle.assemble(oracle_text, clips, [], None), 6)
            check(greedy(llm, [prompt_of(text, clips)])[0], expected, LLAVA_VIDEO.tolerance)
        with pytest.raises(ValueError, match="the prompt has 1 places for videos"):
            greedy(llm, [prompt_of("<image>What happens?", [OTHER, OTHER])])


@pytest.mark.longer("several engines")
@pytest.mark.parametrize("family", [LLAVA_ONEVISION_ORIGINAL, LLAVA_VIDEO_ORIGINAL], ids=lambda family: family.name)
def test_original_positions_beyond_the_models_are_refused(family: Family, tmp_path: Path) -> None:
    """Prompts that fit when compressed, but whose uncompressed positions the rotary embedding does not have."""
    from flashvid_vllm import engine_args

    directory = family.make(tmp_path / "model")

    def limited(limit: int) -> dict[str, Any]:
        return {"max_model_len": limit, "hf_overrides": {"text_config": {"max_position_embeddings": limit}}}

    names = ("image, video", "text around two videos", "one video")
    with engine(directory, **engine_args(**family.settings), **limited(4096)) as llm:
        served = Served(family, llm, family.load_oracle(directory))
        plain = [len(greedy(llm, [served.prompt(name, {"enabled": False})], 1)[0].prompt_token_ids) for name in names]
    shortest = min(plain)
    with engine(directory, **engine_args(**family.settings), **limited(shortest + 1)) as llm:
        served = Served(family, llm, served.oracle)
        for name, tokens in zip(names, plain, strict=True):
            prompt = served.prompt(name, {"retention_ratio": 0.1})
            if tokens == shortest:
                assert greedy(llm, [prompt], 1)[0].outputs[0].token_ids
                continue
            with pytest.raises(ValueError, match=rf"this prompt has {tokens} tokens.*reaches to {shortest + 1}: "):
                greedy(llm, [prompt], 1)
    if family is LLAVA_ONEVISION_ORIGINAL:
        with engine(directory, **engine_args(), **limited(shortest + 1)) as llm:
            for name in names:
                assert greedy(llm, [served.prompt(name, {"retention_ratio": 0.1})], 1)[0].outputs[0].token_ids
