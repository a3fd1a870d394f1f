# SPDX-License-Identifier: MIT
"""Prompts that do not come as text and a video: ids already expanded, embeddings, a video by its uuid, absurd times."""

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support.engine import VIDEO, Clip, check, greedy, prompt_of, record_positions, tokens_and_logprobs
from ..support.families import (
    LLAVA_ONEVISION,
    LLAVA_ONEVISION_ORIGINAL,
    LLAVA_VIDEO_ORIGINAL,
    QWEN2_5_VL,
    QWEN3_VL,
    Family,
)

pytestmark = pytest.mark.slow

SETTINGS = {"retention_ratio": 0.3}
WITH_EMBEDS: dict[str, Any] = {"enable_prompt_embeds": True, "allowed_local_media_path": tempfile.gettempdir()}
LONGER = pytest.mark.longer("a variant")
ONE, TWO = Clip(12, 112, 112), Clip(7, 84, 140, seed=1)


@pytest.fixture
def llm(engines: Any, models: Any) -> Any:
    """Qwen2.5-VL."""
    return engines(models(QWEN2_5_VL), SETTINGS)


def test_ids_that_are_expanded_already(llm: Any, models: Any) -> None:
    """A prompt's ids as an answer names them, sent again with the videos: plain vLLM puts these in place of the first
    ids of a video and takes all further ones for text. At R = 0.3 text then follows that has a video's ids."""
    first = greedy(llm, [prompt_of(f"a {VIDEO} b {VIDEO} c", [ONE, TWO])])[0]
    ids = list(first.prompt_token_ids)
    again = prompt_of("", [ONE, TWO]) | {"prompt": None, "prompt_token_ids": ids}
    del again["prompt"]
    oracle = QWEN2_5_VL.load_oracle(models(QWEN2_5_VL))
    embeddings, positions = oracle.assemble(llm.get_tokenizer().decode(ids), [ONE, TWO], [], SETTINGS)
    output = greedy(llm, [again])[0]
    assert len(output.prompt_token_ids) == len(embeddings) > len(ids)
    check(output, oracle.greedy(embeddings, positions, 6), QWEN2_5_VL.tolerance)
    received = torch.cat(record_positions(llm, [again]), dim=1)
    assert torch.equal(received[:, : len(embeddings)], positions)


def test_beside_prompt_embeds(engines: Any, models: Any) -> None:
    """Such a prompt has no ids at all, and the recompute is asked for every request of its batch."""
    llm = engines(models(QWEN2_5_VL), SETTINGS, **WITH_EMBEDS)
    width = llm.llm_engine.model_config.get_hidden_size()
    video = prompt_of(f"a {VIDEO} b", [ONE])
    embeds = {"prompt_embeds": torch.randn(9, width, generator=torch.manual_seed(0))}
    alone = [tokens_and_logprobs(greedy(llm, [prompt])[0])[0] for prompt in (video, embeds)]
    together = [tokens_and_logprobs(output)[0] for output in greedy(llm, [embeds, video, embeds, video])]
    assert together == alone[::-1] * 2


@pytest.mark.longer("an engine each")
@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda family: family.name)
def test_prompt_embeds_in_one_prompt_with_a_video(family: Family, engines: Any, models: Any, clips: list[Path]) -> None:
    """They are media to vLLM, without our channels nor DeepStack's; those of a text answer as it does."""
    from vllm import SamplingParams

    llm = engines(models(family), SETTINGS, **WITH_EMBEDS)
    text = "What is shown in this video?"
    ids = torch.tensor(llm.get_tokenizer().encode(text, add_special_tokens=False))
    file = io.BytesIO()
    torch.save(llm.apply_model(lambda model: model.get_language_model().embed_input_ids(ids).detach())[0], file)
    embeds = {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}
    video = {"type": "video_url", "video_url": {"url": clips[0].as_uri()}}

    def ask(content: Sequence[dict[str, Any]]) -> Any:
        assert llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True)
        return llm.chat([{"role": "user", "content": list(content)}], params, use_tqdm=False)[0]

    written = {"type": "text", "text": text}
    for as_text, as_embeds in (((video, written), (video, embeds)), ((written, video), (embeds, video))):
        (ids_of_text, steps), (ids_of_embeds, other_steps) = map(tokens_and_logprobs, map(ask, (as_text, as_embeds)))
        assert ids_of_text == ids_of_embeds
        for step, other in zip(steps, other_steps, strict=True):
            assert step == pytest.approx(other, abs=2e-5)


UUID_FAMILIES = [QWEN2_5_VL, LLAVA_ONEVISION_ORIGINAL, QWEN3_VL, LLAVA_ONEVISION, LLAVA_VIDEO_ORIGINAL]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=[] if family is LLAVA_ONEVISION_ORIGINAL else LONGER)
        for family in UUID_FAMILIES
    ],
)
def test_a_video_by_its_uuid(family: Family, engines: Any, models: Any) -> None:
    """Without data it answers as it did with, and never with what other settings have made of it."""
    llm = engines(models(family), SETTINGS | family.settings)

    def ask(data: bool = True, uuid: str = "v1", **settings: Any) -> tuple[list[int], float]:
        prompt = prompt_of(f"a {family.video} b", [ONE], flashvid=settings or None)
        prompt["multi_modal_uuids"] = {"video": [uuid]}
        if not data:
            prompt["multi_modal_data"] = {"video": [None]}
        output = greedy(llm, [prompt], keep_prefixes=True)[0]
        return list(output.prompt_token_ids), output.outputs[0].cumulative_logprob

    def truth(**settings: Any) -> tuple[list[int], float]:
        output = greedy(llm, [prompt_of(f"a {family.video} b", [ONE], flashvid=settings or None)])[0]
        return list(output.prompt_token_ids), output.outputs[0].cumulative_logprob

    def same(one: tuple[list[int], float], other: tuple[list[int], float]) -> bool:
        return one[0] == other[0] and abs(one[1] - other[1]) < 1e-4

    first = ask()
    assert same(first, truth())
    assert same(ask(data=False), first)
    others: list[dict[str, Any]] = [{"retention_ratio": 0.5}, {"alpha": 0.2}, {"enabled": False}]
    for settings in others:
        other = ask(data=False, **settings)
        assert same(other, truth(**settings))
        assert not same(other, first)
        assert same(ask(**settings), other)
        assert same(ask(data=False), first)
    with pytest.raises(ValueError, match=r"Cache miss for video.* by its uuid alone is known under"):
        ask(data=False, uuid="never sent")


@pytest.mark.parametrize("fps", [1e-9, 1e-5, -1.0, float("nan"), 0.0])
def test_absurd_times_are_refused(llm: Any, fps: float) -> None:
    """Positions that the language model or our channels do not have: the engine would die of them, or wrap them.
    (vLLM itself refuses to divide by 0.)"""
    right = prompt_of(f"a {VIDEO} b", [ONE])
    before = greedy(llm, [right])[0].outputs[0].token_ids
    frames, metadata = right["multi_modal_data"]["video"][0]
    wrong = right | {"multi_modal_data": {"video": [(frames, metadata | {"fps": fps})]}}
    for _ in range(2):  # nothing of it is in a cache
        with pytest.raises(ValueError, match="mend its fps or frame times" if fps else "Failed to apply"):
            greedy(llm, [wrong])
    assert greedy(llm, [right])[0].outputs[0].token_ids == before


def test_times_add_up(llm: Any) -> None:
    """Each of them within the language model's positions, all of them beyond: it would read past its table."""
    one = prompt_of(f"a {VIDEO} b", [ONE])
    frames, metadata = one["multi_modal_data"]["video"][0]
    model = llm.llm_engine.model_config
    reach = max(model.hf_text_config.max_position_embeddings, model.max_model_len)
    # two fifths of the table: two seconds to a temporal position and pair of frames at 1 fps
    speed = model.hf_config.vision_config.tokens_per_second
    slow = (frames, metadata | {"fps": 2 * (len(frames) // 2 - 1) * speed / (1.6 * reach)})
    alone = one | {"multi_modal_data": {"video": [slow]}}
    before = greedy(llm, [alone])[0].outputs[0].token_ids
    three = prompt_of(f"a {VIDEO}{VIDEO}{VIDEO} b", [ONE] * 3) | {"multi_modal_data": {"video": [slow] * 3}}
    with pytest.raises(ValueError, match=r"6 x [\d.]+ seconds, 6 x .* span .* mend its fps or frame times"):
        greedy(llm, [three])
    assert greedy(llm, [alone])[0].outputs[0].token_ids == before
