# SPDX-License-Identifier: MIT
"""Tokens dropped inside the LLM: vLLM with the plugin against transformers on the same weights, where nobody attends to
them. Only this has a neighbour dropped, a slot off by one, a decode without the shift."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvid_vllm.models import base
from flashvid_vllm.models.inner import metadata, plan, rank, text_model

from ..support.engine import Engines, check, chunked, greedy, prompt_of, same, tokens_and_logprobs
from ..support.families import LLAVA_ONEVISION, LLAVA_VIDEO_ORIGINAL, QWEN2_5_VL, QWEN3_VL, Family
from ..support.oracles.inner import InnerOracle
from .test_families import CASES as ALL_CASES
from .test_families import HEAD, TAIL

pytestmark = pytest.mark.slow

LONGER = pytest.mark.longer("a family")
QUICK = (QWEN2_5_VL,)
# DeepStack, one position a token, separators and the positions of the whole; what others have besides is their tower's
FAMILIES = [QWEN2_5_VL, QWEN3_VL, LLAVA_ONEVISION, LLAVA_VIDEO_ORIGINAL]
CASES = {name: ALL_CASES[name] for name in ("one video", "text around two videos", "image, video", "nothing around it")}
RATIO, STEPS = 0.3, 12


@dataclass(frozen=True)
class Served:
    """A family's tiny model in vLLM, dropping tokens inside, and its oracle."""

    family: Family
    llm: Any
    oracle: InnerOracle

    def prompt(self, name: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        text, clips, images = CASES[name]
        return prompt_of(text.format(i=self.family.image, v=self.family.video), clips, images, settings)

    def expected(self, name: str, ratio: float | None = RATIO) -> Any:
        text, clips, images = CASES[name]
        text = self.family.for_oracle(text.format(i=self.family.image, v=self.family.video), len(clips))
        settings = None if ratio is None else {"retention_ratio": ratio}
        embeddings, positions = self.oracle.assemble(text, clips, images, settings)
        return len(embeddings), self.oracle.greedy(embeddings, positions, STEPS)


@pytest.fixture(
    scope="module", params=[pytest.param(f, id=f.name, marks=[] if f in QUICK else LONGER) for f in FAMILIES]
)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def served(
    family: Family, engines: Engines, models: Callable[[Family], Path], oracles: Callable[[Family], Any]
) -> Served:
    layer = 3 if family.kind.startswith("qwen3") else 2  # DeepStack's three levels
    settings = {"retention_ratio": RATIO, "inner_layer": layer, "inner_ratio": 0.3, **family.settings}
    llm = engines(models(family), settings, **family.engine_options)
    return Served(family, llm, InnerOracle(oracles(family), layer, 0.3))


@pytest.fixture
def chunk(request: pytest.FixtureRequest, served: Served) -> Iterator[None]:
    with chunked(served.llm, request.param):
        yield


@pytest.mark.parametrize("chunk", [None, 32], ids=["whole", "chunked"], indirect=True)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("chunk")
def test_same_answer_as_the_oracle(served: Served, name: str) -> None:
    output = greedy(served.llm, [served.prompt(name)], STEPS)[0]
    length, expected = served.expected(name)
    assert len(output.prompt_token_ids) == length
    assert served.oracle.dropped
    check(output, expected, served.family.tolerance)


@pytest.mark.parametrize("chunk", [None, 32], ids=["whole", "chunked"], indirect=True)
@pytest.mark.usefixtures("chunk")
def test_together_as_alone_and_again(served: Served) -> None:
    """A batch of prompts that drop tokens and prompts that do not, decoding beside prefilling; all of it again from the
    caches, where a prefix with dropped tokens is not one without."""
    prompts = [
        served.prompt(name, settings)
        for name, settings in [
            ("one video", None), ("one video", {"inner": False}), ("text around two videos", None),
            ("one video", {"enabled": False}), ("image, video", {"retention_ratio": 0.1}), ("one video", None),
        ]
    ]  # fmt: skip
    prompts.insert(2, prompt_of(HEAD + TAIL))
    alone = [greedy(served.llm, [prompt], STEPS)[0] for prompt in prompts]
    together = greedy(served.llm, prompts, STEPS)
    again = greedy(served.llm, prompts[::-1], STEPS, keep_prefixes=True)[::-1]
    for batch in (together, again):
        for one, other in zip(alone, batch, strict=True):
            same(one, other, served.family.tolerance)
    assert again[4].num_cached_tokens  # the plain model's: more than a block
    assert not any(again[i].num_cached_tokens for i in (0, 3, 5, 6))


def test_a_request_without(served: Served, oracles: Callable[[Family], Any]) -> None:
    """It gets the budget, and the answer, of a server that drops nothing inside."""
    text, clips, images = CASES["text around two videos"]
    text = served.family.for_oracle(text.format(i=served.family.image, v=served.family.video), len(clips))
    plain = oracles(served.family)
    for settings, expected in (({"inner": False}, {"retention_ratio": RATIO}), ({"enabled": False}, None)):
        embeddings, positions = plain.assemble(text, clips, images, expected)
        output = greedy(served.llm, [served.prompt("text around two videos", settings)], STEPS)[0]
        check(output, plain.greedy(embeddings, positions, STEPS), served.family.tolerance)


def test_preempted_requests_answer_as_alone(served: Served) -> None:
    """In the middle of a prompt, and of an answer: both are computed again, without what was found out before."""
    from vllm import SamplingParams

    prompts = [served.prompt("text around two videos"), served.prompt("one video"), prompt_of(HEAD + TAIL)]
    alone = [greedy(served.llm, [prompt], STEPS)[0] for prompt in prompts]
    engine = served.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=5, ignore_eos=True)
    outputs: dict[str, Any] = {}
    with chunked(served.llm, 32):
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, params)
        for step in range(200):
            if step in (2, 9, 14):
                assert engine.engine_core.reset_prefix_cache(reset_running_requests=True)
            outputs |= {output.request_id: output for output in engine.step() if output.finished}
            if not engine.has_unfinished_requests():
                break
    for index, one in enumerate(alone):
        same(one, outputs[str(index)], served.family.tolerance)


def test_start_up_measures_what_waits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest prompt that is let in, hidden states and residuals and keys, twice; real steps have that memory."""
    if served.family is not QWEN2_5_VL:
        pytest.skip("the same for every family")
    monkeypatch.setattr(base, "encode_longest_video", lambda model: None)  # has tests of its own

    def measured(model: Any) -> list[int]:
        model.measure_longest_video()
        return list(model.flashvid_inner._reserved.shape)

    (model,) = served.llm.apply_model(lambda model: model)
    hidden, heads, channels, most = 128, 2, 32, 4096
    width = 2 * hidden + heads * channels
    assert measured(model) == [2, most, width]  # a step takes as much
    monkeypatch.setattr(model.flashvid_vllm_config.scheduler_config, "max_num_batched_tokens", 400)
    assert measured(model) == [2, 1334, width]  # of more than 400 / 0.3 more than 400 would be left
    greedy(served.llm, [served.prompt("one video")], 2)
    assert model.flashvid_inner._reserved is None


@pytest.mark.longer("another engine")
def test_off_is_off_to_the_bit(served: Served, engines: Engines, models: Callable[[Family], Path]) -> None:
    """A request without, of a server that drops tokens inside, against a server that never does."""
    if served.family is not QWEN2_5_VL:
        pytest.skip("the same for every family")

    def answers(settings: dict[str, Any] | None) -> list[Any]:
        outputs = [greedy(llm, [served.prompt(name, settings)], STEPS)[0] for name in CASES]
        return [tokens_and_logprobs(output) for output in outputs]

    llm = served.llm
    off = answers({"inner": False})
    llm = engines(models(served.family), {"retention_ratio": RATIO, **served.family.settings})
    assert answers(None) == off


right_row, right_metadata = plan._row, metadata.packed


def deviation(output: Any, expected: Any) -> float:
    """The largest difference of a log-probability as long as both answers are to the same prompt."""
    ids, steps = tokens_and_logprobs(output)
    worst = 0.0
    for token, other, step, row in zip(ids, expected[0], steps, expected[1], strict=True):
        worst = max(worst, *(abs(value - float(row[i])) for i, value in step.items()))
        if token != other:
            break
    return worst


def neighbour(attention: Tensor, visual: Tensor, videos: Any) -> Tensor:
    """A kept token of the first video gives way to one beside it that is to be dropped."""
    order = rank.kept_order(attention, visual, videos).tolist()
    dropped = [i for i in range(len(visual)) if i not in order]
    out = next(i for i in order if visual[i] and (i + 1 in dropped or i - 1 in dropped))
    order[order.index(out)] = out + 1 if out + 1 in dropped else out - 1
    return torch.tensor(sorted(order))


def one_ranks_heads(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    return rank.attention_of_last(query[: len(query) // 2], keys[:, : keys.shape[1] // 2], scale)


def without_shift(start: int, scheduled: int, computed: int, prompt: Any) -> Any:
    row = right_row(start, scheduled, computed, prompt)
    return dataclasses.replace(row, dropped=0) if prompt is not None and not row.ranks and not row.waits else row


def slot_off_by_one(common: Any, step: Any, block_size: int) -> Any:
    """Of every token but the last."""
    out = right_metadata(common, step, block_size)
    moved = out.slot_mapping.clone()
    moved[: len(moved) // 2] += 1
    return out.replace(slot_mapping=moved)


def test_faults_are_seen(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each moves a log-probability by more than ten times the tolerance."""
    name = "text around two videos"
    _, expected = served.expected(name)

    def measured() -> float:
        return deviation(greedy(served.llm, [served.prompt(name)], STEPS)[0], expected)

    assert measured() < served.family.tolerance
    faults: dict[str, tuple[Any, str, Any]] = {
        "a neighbour dropped": (text_model, "kept_order", neighbour),
        "one rank's heads": (text_model, "attention_of_last", one_ranks_heads),
        "decode without the shift": (plan, "_row", without_shift),
        "a slot off by one": (metadata, "packed", slot_off_by_one),
    }
    found = {}
    for fault, (module, attribute, wrong) in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, wrong)
            found[fault] = measured()
    weakest = min(found, key=lambda fault: found[fault])
    assert found[weakest] > 10 * served.family.tolerance, f"{weakest}: {found}"
    assert measured() < served.family.tolerance


@pytest.mark.longer("200 steps, each the whole sequence again in the oracle")
def test_decoding_over_hundreds_of_steps(served: Served) -> None:
    if served.family is not QWEN2_5_VL:
        pytest.skip("the same for every family")
    text, clips, images = CASES["one video"]
    embeddings, positions = served.oracle.assemble(
        text.format(i=served.family.image, v=served.family.video), clips, images, {"retention_ratio": RATIO}
    )
    output = greedy(served.llm, [served.prompt("one video")], 200)[0]
    check(output, served.oracle.greedy(embeddings, positions, 200), served.family.tolerance)


@pytest.mark.longer("an engine")
@pytest.mark.parametrize("chunk", [None, 32])
def test_fastv(chunk: int | None, models: Any, oracles: Any, engines: Engines) -> None:
    """All of a video's tokens enter, R of them leave the second layer."""
    family = QWEN2_5_VL
    llm = engines(models(family), {"retention_ratio": RATIO, "method": "fastv"})
    fastv = Served(family, llm, InnerOracle(oracles(family), 2, RATIO, entering=True))
    with chunked(llm, chunk):
        for name in CASES:
            output = greedy(llm, [fastv.prompt(name)], STEPS)[0]
            length, expected = fastv.expected(name)
            assert len(output.prompt_token_ids) == length
            check(output, expected, family.tolerance)


def test_what_is_refused_was_never_sent(served: Served) -> None:
    """The same video again, without what was refused: the engine gets its pixels."""
    from vllm import SamplingParams

    prompt = served.prompt("nothing around it", {"alpha": 0.61})
    with pytest.raises(ValueError, match="prompt_logprobs: this request drops tokens"):
        served.llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    assert greedy(served.llm, [prompt], 1)[0].outputs[0].token_ids


def test_a_waiting_prompt_lends_nothing(served: Served) -> None:
    """A system prompt of several blocks, the same for a text in between: the layers from K on have none of it yet."""
    from vllm import SamplingParams

    system = "The quick brown fox jumps over the lazy dog. " * 60
    text, clips, _ = CASES["one video"]
    video = prompt_of(system + text.format(v=served.family.video), clips)
    twin = prompt_of(f"{system}What is it?{TAIL}")
    alone = greedy(served.llm, [twin], STEPS)[0]
    engine = served.llm.llm_engine
    assert served.llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=5, ignore_eos=True)
    with chunked(served.llm, 160):
        engine.add_request("video", video, params)
        for _ in range(3):
            engine.step()
        engine.add_request("twin", twin, params)
        engine.step()
        engine.abort_request(["video"])
        engine.add_request("later", twin, params)
        outputs: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step() if output.finished}
    assert len(alone.prompt_token_ids) > 3 * 160
    for name in ("twin", "later"):
        same(alone, outputs[name], served.family.tolerance)
