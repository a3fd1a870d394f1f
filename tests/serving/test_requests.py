# SPDX-License-Identifier: MIT
"""What a request may ask for besides one greedy answer, with a compressed video in its prompt; resets of caches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ..support.engine import VIDEO, Clip, greedy, prompt_of, tokens_and_logprobs

pytestmark = pytest.mark.slow

TEXT = f"<|im_start|>user\n{VIDEO}Describe the video.<|im_end|>\n<|im_start|>assistant\n"
CLIP, OTHER = Clip(16, 112, 168), Clip(12, 140, 84, 0.25, seed=2)
SETTINGS = {"retention_ratio": 0.3}
TOLERANCE = 2e-5


@pytest.fixture
def llm(engines: Any, sharp_model: Path) -> Any:
    return engines(sharp_model, SETTINGS)


@pytest.fixture(scope="module")
def oracle(sharp_model: Path) -> Any:
    from ..support.oracles.qwen2_5_vl import Oracle

    return Oracle(sharp_model)


@pytest.fixture(scope="module")
def assembled(oracle: Any) -> tuple[Tensor, Tensor]:
    """TEXT with CLIP, compressed, as the language model must receive it: embeddings and positions."""
    return oracle.assemble(TEXT, [CLIP], [], SETTINGS)


def generate(llm: Any, prompts: list[Any], **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    return llm.generate(prompts, SamplingParams(**({"ignore_eos": True} | sampling)), use_tqdm=False)


def test_four_seeded_answers_are_four_requests(llm: Any) -> None:
    """Drawn together from one prompt, beside another one's at another ratio, or each by itself."""
    prompt, beside = prompt_of(TEXT, [CLIP]), prompt_of(TEXT, [CLIP], flashvid={"retention_ratio": 0.1})
    sampling = {"temperature": 1.0, "max_tokens": 8}
    four, _ = generate(llm, [prompt, beside], n=4, seed=7, **sampling)
    alone = [generate(llm, [prompt], seed=7 + index, **sampling)[0].outputs[0] for index in range(4)]
    drawn = [list(answer.token_ids) for answer in four.outputs]
    assert drawn == [list(answer.token_ids) for answer in alone]
    assert len(set(map(tuple, drawn))) == 4


def test_beam_search_as_by_hand(llm: Any, oracle: Any, assembled: tuple[Tensor, Tensor]) -> None:
    """vLLM sends a beam's tokens as a new request each step: the video in them must be what it was."""
    from vllm.sampling_params import BeamSearchParams

    width, length = 3, 3
    found = llm.beam_search([prompt_of(TEXT, [CLIP])], BeamSearchParams(width, max_tokens=length, ignore_eos=True))
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(length):
        grown = []
        for ids, total in beams:
            row = oracle.greedy(*assembled, len(ids) + 1, [*ids, 0])[1][-1]
            best = row.topk(2 * width)
            grown += [([*ids, int(i)], total + float(p)) for p, i in zip(best.values, best.indices, strict=True)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    prompt = len(assembled[0])
    assert [sequence.tokens[prompt:] for sequence in found[0].sequences] == [ids for ids, _ in beams]
    for sequence, (_, total) in zip(found[0].sequences, beams, strict=True):
        assert sequence.cum_logprob == pytest.approx(total, abs=length * TOLERANCE)


def test_prompt_logprobs_are_the_compressed_prompts(llm: Any, oracle: Any, assembled: tuple[Tensor, Tensor]) -> None:
    output = generate(llm, [prompt_of(TEXT, [CLIP])], temperature=0, max_tokens=1, prompt_logprobs=0)[0]
    embeddings, positions = assembled
    ids = output.prompt_token_ids
    assert len(ids) == len(output.prompt_logprobs) == len(embeddings)
    assert output.prompt_logprobs[0] is None
    with torch.inference_mode():
        hidden = oracle.model.model.language_model(inputs_embeds=embeddings[None], position_ids=positions[:, None])
        rows = oracle.model.lm_head(hidden.last_hidden_state[0]).log_softmax(-1)
    for place, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry[ids[place]].logprob == pytest.approx(float(rows[place - 1, ids[place]]), abs=TOLERANCE)


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}


def test_penalties_count_the_compressed_prompt(llm: Any, oracle: Any, assembled: tuple[Tensor, Tensor]) -> None:
    """A token of the prompt is penalised once, however many of a video's are left."""
    output = generate(llm, [prompt_of(TEXT, [CLIP])], temperature=0, max_tokens=12, **PENALTIES)[0]
    chosen: list[int] = []
    prompt = torch.tensor(oracle.ids)
    for _ in range(12):
        logits = oracle.greedy(*assembled, len(chosen) + 1, [*chosen, 0])[1][-1].clone()
        # of logits and log-probabilities alike only differences count below, but signs where it repeats: so shift back
        logits += raw_shift(oracle, assembled, chosen)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[prompt], seen[chosen] = True, True
        factor = PENALTIES["repetition_penalty"]
        logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
        counts = torch.bincount(torch.tensor(chosen, dtype=torch.int64), minlength=len(logits))
        logits -= PENALTIES["frequency_penalty"] * counts + PENALTIES["presence_penalty"] * (counts > 0)
        chosen.append(int(logits.argmax()))
    assert list(output.outputs[0].token_ids) == chosen
    assert len(set(chosen)) > 3


def raw_shift(oracle: Any, assembled: tuple[Tensor, Tensor], chosen: list[int]) -> Tensor:
    """What `Oracle.greedy`'s log-probabilities lack to the logits of the step after ``chosen``."""
    embeddings, positions = assembled
    if chosen:
        start = oracle.next_position
        more = torch.arange(start, start + len(chosen)).expand(3, -1)
        embeddings = torch.cat([embeddings, oracle.embed(chosen)])
        positions = torch.cat([positions, more], dim=1)
    with torch.inference_mode():
        hidden = oracle.model.model.language_model(inputs_embeds=embeddings[None], position_ids=positions[:, None])
        return oracle.model.lm_head(hidden.last_hidden_state[0, -1]).logsumexp(-1)


def test_a_json_schema_with_penalties(llm: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    constrained = {"structured_outputs": StructuredOutputsParams(json=schema), "ignore_eos": False}
    sampling = {"temperature": 0, "max_tokens": 60, **constrained, **PENALTIES}
    prompts = [prompt_of(TEXT, [CLIP], flashvid={"retention_ratio": ratio}) for ratio in (0.1, 0.5)]
    alone = [generate(llm, [prompt], **sampling)[0].outputs[0] for prompt in prompts]
    together = [output.outputs[0] for output in generate(llm, prompts, **sampling)]
    for one, other in zip(alone, together, strict=True):
        assert set(json.loads(one.text)) == {"a"}
        assert one.token_ids == other.token_ids


def same(one: Any, other: Any) -> bool:
    """Whether two outputs have one prompt, the same tokens and log-probabilities."""
    (ids, steps), (other_ids, other_steps) = tokens_and_logprobs(one), tokens_and_logprobs(other)
    pairs = [(s[i], o[i]) for s, o in zip(steps, other_steps, strict=True) for i in s.keys() & o.keys()]
    near = all(abs(a - b) < TOLERANCE for a, b in pairs)
    return one.prompt_token_ids == other.prompt_token_ids and ids == other_ids and near


def named(prompt: dict[str, Any], name: str) -> dict[str, Any]:
    return prompt | {"multi_modal_uuids": {"video": [name]}}


def test_one_uuid_with_other_settings_is_another_video_to_the_caches(llm: Any) -> None:
    settings: list[dict[str, Any]] = [{"retention_ratio": 0.5}, {"retention_ratio": 0.1}, {"enabled": False}]
    settings += [{"retention_ratio": 0.5, "alpha": 0.1}, {"retention_ratio": 0.5, "method": "uniform"}]
    prompts = [prompt_of(TEXT, [CLIP], flashvid=each) for each in settings]
    expected = [greedy(llm, [prompt])[0] for prompt in prompts]
    for _ in range(2):
        for prompt, right in zip(prompts, expected, strict=True):
            assert same(greedy(llm, [named(prompt, "settings")])[0], right)


def test_one_uuid_with_other_bytes_is_the_first_video(llm: Any) -> None:
    """As in vLLM without the plugin: who names a video vouches for it. Its size is the first one's too."""
    first = greedy(llm, [prompt_of(TEXT, [CLIP])])[0]
    assert same(greedy(llm, [named(prompt_of(TEXT, [CLIP]), "bytes")])[0], first)
    assert same(greedy(llm, [named(prompt_of(TEXT, [OTHER]), "bytes")])[0], first)
    other = greedy(llm, [prompt_of(TEXT, [OTHER])])[0]
    assert not same(other, first)


@pytest.mark.parametrize("reset", ["reset_mm_cache", "reset_encoder_cache", "sleep"])
def test_answers_after_a_reset_or_a_sleep(llm: Any, reset: str) -> None:
    """vLLM's CPU worker ignores sleep and wake_up; elsewhere they discard or save what the caches hold."""
    before = greedy(llm, [prompt_of(TEXT, [CLIP])])[0]
    call: Callable[[], Any] = getattr(llm, reset, None) or getattr(llm.llm_engine, reset)
    call()
    if reset == "sleep":
        llm.wake_up()
    assert same(greedy(llm, [prompt_of(TEXT, [CLIP])])[0], before)
