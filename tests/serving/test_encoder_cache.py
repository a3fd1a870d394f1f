# SPDX-License-Identifier: MIT
"""A step of the engine encodes as many videos as it would without compression."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from flashvid_vllm import engine_args
from flashvid_vllm.models.processor_cache import FULL_EMBEDS
from flashvid_vllm.serving.encoder_cache import EncoderCacheManager

from ..support.engine import VIDEO, Clip, engine, greedy, prompt_of, tokens_and_logprobs
from ..support.families import LLAVA_ONEVISION, QWEN3_VL, Family


@dataclass(frozen=True)
class Item:
    """A multimodal item as vLLM's scheduler has it: what it costs plain, and what is left of it."""

    modality: str
    full: int
    kept: int
    here: bool = True

    @property
    def data(self) -> Any:
        return {FULL_EMBEDS: SimpleNamespace(data=self.full)} if self.here else None


@dataclass
class Request:
    """A request of vLLM's, as far as the cache manager looks at it."""

    mm_features: list[Item] = field(default_factory=list)

    def get_num_encoder_embeds(self, input_id: int) -> int:
        return self.mm_features[input_id].kept


def steps(items: list[Item], budget: int) -> list[list[Item]]:
    """What each step encodes when all items wait, in vLLM's order: it stops at the first that does not fit."""
    manager, waiting, out = EncoderCacheManager(10**9), list(items), []
    while waiting:
        left, step = budget, []
        while waiting and manager.can_allocate(Request([waiting[0]]), 0, left, 0):
            step.append(waiting.pop(0))
            left -= step[-1].kept
        out.append(step)
        assert step, "stuck"
    return out


videos = st.builds(
    lambda full, share: Item("video", full, max(1, full // share)), st.integers(1, 50), st.integers(1, 20)
)
images = st.builds(lambda n: Item("image", n, n), st.integers(1, 50))


@given(st.lists(videos | images, max_size=30), st.integers(50, 120))
def test_steps_are_those_of_the_plain_model(items: list[Item], budget: int) -> None:
    expected: list[list[Item]] = []
    left = 0
    for item in items:
        if not expected or item.full > left:
            expected.append([])
            left = budget
        expected[-1].append(item)
        left -= item.full
    assert steps(items, budget) == expected


def test_a_video_larger_than_the_budget_goes_alone() -> None:
    """Where requests may not ask for the plain model the budget is as small as what is kept."""
    large, small = Item("video", 1000, 10), Item("video", 10, 1)
    assert steps([small, large, large, small], 100) == [[small], [large], [large], [small]]


def test_a_video_that_is_held_elsewhere_goes_alone() -> None:
    """With the cache in shared memory its data are in the workers only."""
    elsewhere, small = Item("video", 50, 5, here=False), Item("video", 10, 1)
    assert steps([small, small, elsewhere, small], 100) == [[small, small], [elsewhere], [small]]


def test_a_granted_item_that_was_not_encoded_after_all_is_not_charged() -> None:
    """The step ran out of something else, and the next one has its whole budget again."""
    manager, request = EncoderCacheManager(1000), Request([Item("video", 100, 10)])
    for _ in range(3):
        assert manager.can_allocate(request, 0, 100, 0)


@pytest.mark.slow
def test_the_engine_encodes_as_many_videos_a_step(sharp_model: Path) -> None:
    """Six videos of 96 tokens wait, and a step may encode 200: two at a time, compressed or not."""
    clips = [Clip(32, 56, 84, seed=seed) for seed in range(12)]
    with engine(sharp_model, **engine_args(retention_ratio=0.25)) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert type(scheduler.encoder_cache_manager) is EncoderCacheManager
        scheduler.max_num_encoder_input_tokens = 200  # the option has no smaller value than the largest video
        schedule, encoded = scheduler.schedule, []

        def watched(*args: Any, **kwargs: Any) -> Any:
            step = schedule(*args, **kwargs)
            encoded.append(sum(map(len, step.scheduled_encoder_inputs.values())))
            return step

        scheduler.schedule = watched
        for settings in ({"enabled": False}, {"retention_ratio": 0.1}):
            waiting, clips = clips[:6], clips[6:]
            greedy(llm, [prompt_of(f"{VIDEO}What happens?", [clip], flashvid=settings) for clip in waiting], 2)
            assert sum(encoded) == 6
            assert max(encoded) == 2
            encoded.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [QWEN3_VL, pytest.param(LLAVA_ONEVISION, marks=pytest.mark.longer("a variant"))],
    ids=lambda family: family.name,
)
def test_videos_in_shared_memory(models: Callable[[Any], Path], engines: Any, family: Family) -> None:
    """The first video killed the engine: its item holds an address there, and the step's cost was read from fields."""
    clips = [Clip(16, 64, 96, seed=1), Clip(12, 96, 64, seed=2)]
    prompts = [
        prompt_of(f"{family.video}What happens?", [clip], flashvid={"retention_ratio": ratio})
        for clip in clips
        for ratio in (0.3, 0.1)
    ]
    plain = answers_and_costs(engines(models(family), {"retention_ratio": 0.3}), prompts)
    llm = engines(models(family), {"retention_ratio": 0.3}, mm_processor_cache_type="shm")
    assert answers_and_costs(llm, prompts) == plain
    answers, costs = answers_and_costs(llm, prompts)  # now from the sender's cache
    assert (answers, set(costs)) == (plain[0], set())  # and the encoder's


def answers_and_costs(llm: Any, prompts: list[Any]) -> tuple[list[Any], list[int]]:
    """Greedy answers, and what the scheduler took each video for, in tokens before compression."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.encoder_cache_manager
    costs: list[int] = []

    def watched(request: Any, input_id: int) -> int:
        costs.append(type(manager)._tokens(manager, request, input_id))
        return costs[-1]

    manager._tokens = watched
    answers = [tokens_and_logprobs(greedy(llm, [prompt])[0]) for prompt in prompts]
    del manager._tokens
    return answers, costs
