# SPDX-License-Identifier: MIT
"""End to end: vLLM with the plugin against transformers on the same weights, the prompt put together by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ..support.engine import (
    IMAGE,
    VIDEO,
    Clip,
    Engines,
    check,
    chunked,
    greedy,
    picture,
    prompt_of,
    record_positions,
    same,
)

pytestmark = pytest.mark.slow

# vLLM and transformers agree to 1e-6 in fp32; any of the faults below moves a logprob by over 1e-3
TOLERANCE = 2e-5

HEAD, TAIL = "<|im_start|>user\n", "What happens in this clip?<|im_end|>\n<|im_start|>assistant\n"
LONG, SHORT, OTHER = Clip(32, 112, 168), Clip(2, 84, 140, seed=1), Clip(12, 140, 84, 0.25, seed=2)
CASES: dict[str, tuple[str, list[Clip], list[np.ndarray]]] = {
    "long": (f"{HEAD}{VIDEO}{TAIL}", [LONG], []),
    "one temporal position": (f"{HEAD}{VIDEO}{TAIL}", [SHORT], []),
    "text on both sides": (f"{HEAD}The quick brown fox.{VIDEO}0 1 2 3{TAIL}", [OTHER], []),
    "two videos": (f"{HEAD}{VIDEO}seconds{VIDEO}{TAIL}", [OTHER, LONG], []),
    "image, video": (f"{HEAD}{IMAGE}{VIDEO}{TAIL}", [OTHER], [picture()]),
    "video, image, video": (f"{HEAD}{VIDEO}then{IMAGE}{VIDEO}{TAIL}", [SHORT, OTHER], [picture()]),
    "nothing before or after": ("<|video_pad|>", [OTHER], []),
    "side by side": ("<|video_pad|><|video_pad|>", [OTHER, SHORT], []),
    # users speak of media, without images and behind the last video
    "media ids in the text": (
        f"{HEAD}What is {IMAGE}?{VIDEO}and {IMAGE}{IMAGE}{VIDEO}{VIDEO} what?{TAIL}", [OTHER, SHORT], [],
    ),
    "and an image": (
        f"{HEAD}{IMAGE}What is {IMAGE}?{VIDEO}and {IMAGE}{VIDEO}{VIDEO} what?{TAIL}", [OTHER, SHORT], [picture()],
    ),
}  # fmt: skip
LITERAL = ["media ids in the text", "and an image"]


@pytest.fixture(scope="module")
def oracle(sharp_model: Path) -> Any:
    from ..support.oracles.qwen2_5_vl import Oracle

    return Oracle(sharp_model)


@pytest.fixture
def llm(engines: Engines, sharp_model: Path) -> Any:
    return engines(sharp_model, {"retention_ratio": 0.3})


@pytest.fixture(params=[None, 32], ids=["whole", "chunked"])
def chunk(request: pytest.FixtureRequest, llm: Any) -> Iterator[int | None]:
    """Whole prompts, and prompts in chunks smaller than a video."""
    with chunked(llm, request.param):
        yield request.param


@pytest.mark.parametrize(("chunk", "ratio"), [(None, 1), (None, 0.1), (32, 0.5)], indirect=["chunk"])
@pytest.mark.parametrize("name", CASES)
def test_same_answer_as_transformers(llm: Any, oracle: Any, chunk: int | None, name: str, ratio: float) -> None:
    text, clips, images = CASES[name]
    settings = {"retention_ratio": ratio}
    output = greedy(llm, [prompt_of(text, clips, images, settings)])[0]
    embeddings, positions = oracle.assemble(text, clips, images, settings)
    assert len(output.prompt_token_ids) == len(embeddings)
    check(output, oracle.greedy(embeddings, positions, 6), TOLERANCE)


def test_token_budget_and_disabled(llm: Any, oracle: Any) -> None:
    text, clips, images = CASES["two videos"]
    for settings, expected in (({"token_budget": 40}, {"token_budget": 40}), ({"enabled": False}, None)):
        output = greedy(llm, [prompt_of(text, clips, images, settings)])[0]
        embeddings, positions = oracle.assemble(text, clips, images, expected)
        check(output, oracle.greedy(embeddings, positions, 6), TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0}, {"alpha": 1.0}, {"selection": "diversity"}, {"selection": "attention"},
        {"selection": "attention_diversity_event", "min_segments": 3}, {"matching": "position"},
        {"merge_threshold": 0.3, "segment_threshold": 0.99},
    ],
)  # fmt: skip
def test_every_setting_reaches_the_model(llm: Any, oracle: Any, settings: dict[str, Any]) -> None:
    text, clips, images = CASES["long"]
    settings = {"retention_ratio": 0.2} | settings
    output = greedy(llm, [prompt_of(text, clips, images, settings)])[0]
    embeddings, positions = oracle.assemble(text, clips, images, settings)
    check(output, oracle.greedy(embeddings, positions, 6), TOLERANCE)


@pytest.mark.usefixtures("chunk")
def test_served_together_as_alone_and_again(llm: Any) -> None:
    """A batch of different videos and ratios, against each alone, and all of it repeated from the caches."""
    prompts = [
        prompt_of(*CASES[name], {"retention_ratio": ratio})
        for name, ratio in [("long", 0.1), ("two videos", 0.5), ("image, video", 0.1), ("long", 0.5), ("long", 1)]
    ]
    prompts.append(prompt_of(HEAD + TAIL))
    alone = [greedy(llm, [prompt])[0] for prompt in prompts]
    together, again = greedy(llm, prompts), greedy(llm, prompts, keep_prefixes=True)
    for batch in (together, again):
        for one, other in zip(alone, batch, strict=True):
            same(one, other, TOLERANCE)


@pytest.mark.usefixtures("chunk")
def test_a_prefix_hit_inside_a_video(llm: Any, oracle: Any) -> None:
    """Another question about the same video: its first blocks come from the cache, the rest is prefilled."""
    _, clips, images = CASES["long"]
    settings = {"retention_ratio": 0.95}
    greedy(llm, [prompt_of(f"{HEAD}{VIDEO}{TAIL}", clips, images, settings)])
    text = f"{HEAD}{VIDEO}Describe the video.{TAIL}"
    output = greedy(llm, [prompt_of(text, clips, images, settings)], keep_prefixes=True)[0]
    assert len(HEAD) < output.num_cached_tokens < len(output.prompt_token_ids) - len(TAIL)
    embeddings, positions = oracle.assemble(text, clips, images, settings)
    check(output, oracle.greedy(embeddings, positions, 6), TOLERANCE)


@pytest.mark.parametrize(
    "name", ["long", "text on both sides", "two videos", "video, image, video", "side by side", *LITERAL]
)
def test_positions_as_the_model_receives_them(llm: Any, oracle: Any, name: str, chunk: int | None) -> None:
    text, clips, images = CASES[name]
    settings = {"retention_ratio": 0.37}  # used nowhere else: nothing of it can come from a cache
    steps = record_positions(llm, [prompt_of(text, clips, images, settings)])
    received = torch.cat(steps, dim=1)
    _, positions = oracle.assemble(text, clips, images, settings)
    assert torch.equal(received[:, : positions.shape[1]], positions)
    continued = torch.arange(oracle.next_position, oracle.next_position + 5).expand(3, 5)
    assert torch.equal(received[:, positions.shape[1] :], continued)
    limit = chunk or llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert len(steps) == -(-positions.shape[1] // limit) + 5  # chunks of the prompt, then tokens


def test_the_oracle_is_sharp(oracle: Any) -> None:
    """Faults of one position or one token move a logprob by more than 10 times the tolerance."""
    text, clips, images = CASES["long"]
    settings = {"retention_ratio": 0.1}
    embeddings, positions = oracle.assemble(text, clips, images, settings)
    right = oracle.greedy(embeddings, positions, 1)[1][0]
    top = right.topk(5).indices

    def moved(embeddings: torch.Tensor, positions: torch.Tensor) -> float:
        return float((oracle.greedy(embeddings, positions, 1)[1][0] - right)[top].abs().max())

    spatial = (positions[1] != positions[0]) | (positions[2] != positions[0])
    last_of_video = int(spatial.nonzero().max())
    shifted = positions.clone()
    shifted[:, last_of_video + 2 :] += 1
    faults = {"text after the video by 1": moved(embeddings, shifted)}
    for t in positions[0, spatial].unique().tolist():
        shifted = positions.clone()
        shifted[0, spatial & (positions[0] == t)] += 1
        faults[f"frame at t={t} by 1"] = moved(embeddings, shifted)
    features, _, grid = oracle.video(clips[0])
    first = int(spatial.nonzero().min())
    base = positions[:, first - 1].max() + 1
    for row in spatial.nonzero().flatten().tolist():
        t, y, x = (positions[:, row] - base).tolist()
        source = (t // 2) * grid[1] * grid[2] + y * grid[2] + x
        neighbour = source + 1 if x + 1 < grid[2] else source - 1
        swapped = embeddings.clone()
        swapped[row] = features.flatten(0, 1)[neighbour]
        faults[f"token {row} for its neighbour"] = moved(swapped, positions)
    weakest = min(faults, key=lambda name: faults[name])
    assert faults[weakest] > 10 * TOLERANCE, f"{weakest}: {faults[weakest]}"
