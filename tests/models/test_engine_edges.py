# SPDX-License-Identifier: MIT
"""Odd videos, hostile numbers and bf16: exactly B tokens, exact positions, and the engine lives on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashvid_vllm import FlashVidConfig, engine_args
from flashvid_vllm.core.budget import plan

from ..support.engine import VIDEO, Clip, engine, greedy, prompt_of, record_positions, tokens_and_logprobs

pytestmark = pytest.mark.slow

HEAD, TAIL = "<|im_start|>user\n", "Describe the video.<|im_end|>\n<|im_start|>assistant\n"
TEXT = f"{HEAD}{VIDEO}{TAIL}"


@pytest.fixture(scope="module")
def llm(sharp_model: Path) -> Iterator[Any]:
    """A bf16 engine, as a server would be."""
    with engine(sharp_model, dtype="bfloat16", **engine_args(retention_ratio=0.25)) as llm:
        yield llm


@dataclass(frozen=True)
class Painted(Clip):
    """A video painted by hand."""

    kind: str = "black"

    def frames(self) -> np.ndarray:
        frames = np.zeros((self.num_frames, self.height, self.width, 3), np.uint8)
        if self.kind == "letterbox":  # three quarters one colour
            top = self.height * 3 // 8
            frames[:, top : self.height - top] = super().frames()[:, top : self.height - top]
        return frames


def num_text_tokens(llm: Any) -> int:
    return len(llm.get_tokenizer().encode(TEXT)) - 1


def grid_of(clip: Clip) -> tuple[int, int]:
    """(T, N) of a clip whose sides are multiples of 28 and whose size the processor leaves alone."""
    return (clip.num_frames + 1) // 2, (clip.height // 28) * (clip.width // 28)


@pytest.mark.parametrize("settings", [{"retention_ratio": 0.1}, {"retention_ratio": 0.5}, {"token_budget": 7}])
@pytest.mark.parametrize(
    "clip",
    [
        Clip(1, 112, 112), Clip(3, 84, 84), Painted(16, 112, 112, kind="black"),
        Painted(16, 112, 168, kind="letterbox"), Clip(64, 56, 56),
    ],
    ids=["one frame", "odd frames", "all equal", "letterbox", "long and small"],
)  # fmt: skip
def test_exactly_b_tokens(llm: Any, clip: Clip, settings: dict[str, Any]) -> None:
    budget = plan(*grid_of(clip), FlashVidConfig(**settings))
    output = greedy(llm, [prompt_of(TEXT, [clip], flashvid=settings)])[0]
    assert len(output.prompt_token_ids) == num_text_tokens(llm) + budget.tokens


def test_a_video_smaller_than_a_patch(llm: Any) -> None:
    """The processor enlarges it; what it becomes is compressed like any other."""
    both: list[dict[str, Any]] = [{"enabled": False}, {"retention_ratio": 0.5}]
    plain, half = (
        len(greedy(llm, [prompt_of(TEXT, [Painted(4, 9, 11)], flashvid=settings)])[0].prompt_token_ids)
        for settings in both
    )
    text = num_text_tokens(llm)
    assert half - text == (plain - text) // 2 > 0


def test_a_budget_larger_than_the_video_is_the_plain_model(llm: Any) -> None:
    clip = Clip(8, 112, 112)
    both: list[dict[str, Any]] = [{"token_budget": 10**6}, {"enabled": False}]
    more, plain = (greedy(llm, [prompt_of(TEXT, [clip], flashvid=settings)])[0] for settings in both)
    assert more.prompt_token_ids == plain.prompt_token_ids
    assert more.outputs[0].token_ids == plain.outputs[0].token_ids
    assert more.outputs[0].cumulative_logprob == plain.outputs[0].cumulative_logprob


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 6e4])
def test_whatever_the_encoder_returns(llm: Any, value: float) -> None:
    """Zero vectors, NaN, infinity and overflow in the features: B tokens, and the next request is right."""
    clip = Clip(12, 112, 112, seed=9)
    before = greedy(llm, [prompt_of(TEXT, [clip], flashvid={"retention_ratio": 0.5})])[0]

    def break_tower(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, value)

    hook = llm.apply_model(lambda model: model.visual.merger.register_forward_hook(break_tower))[0]
    try:
        settings: dict[str, Any] = {"retention_ratio": 0.1 if value == 0 else 0.2}
        broken = Clip(12, 112, 112, seed=int(np.nan_to_num(value, nan=1, posinf=2)))
        output = greedy(llm, [prompt_of(TEXT, [broken], flashvid=settings)])[0]
        budget = plan(*grid_of(broken), FlashVidConfig(**settings))
        assert len(output.prompt_token_ids) == num_text_tokens(llm) + budget.tokens
    finally:
        hook.remove()
    after = greedy(llm, [prompt_of(TEXT, [clip], flashvid={"retention_ratio": 0.5})])[0]
    assert after.outputs[0].token_ids == before.outputs[0].token_ids


@pytest.mark.parametrize("seconds_per_frame", [25.0, 26.0])
def test_positions_above_600_in_bf16(llm: Any, monkeypatch: pytest.MonkeyPatch, seconds_per_frame: float) -> None:
    """bf16 holds integers to 256 only. Positions are compared one by one with those of the full prompt."""
    import flashvid_vllm.models.base as wiring

    kept: list[torch.Tensor] = []

    def compress(*args: Any, **options: Any) -> Any:
        video = original(*args, **options)
        kept.append(video.source_index)
        return video

    original = wiring.compress
    monkeypatch.setattr(wiring, "compress", compress)
    clip = Clip(16, 84, 112, seconds_per_frame, seed=3)  # 100 or 104 position ids a frame pair
    received = torch.cat(record_positions(llm, [prompt_of(TEXT, [clip])]), dim=1)
    text = llm.get_tokenizer().encode(TEXT)
    start = text.index(llm.get_tokenizer().convert_tokens_to_ids("<|video_pad|>"))
    step = int(2 * clip.seconds_per_frame * 2)
    full = [[start + t * step, start + y, start + x] for t in range(8) for y in range(3) for x in range(4)]
    want = [[i] * 3 for i in range(start)] + [full[i] for i in kept[0].tolist()]
    after = max(max(p) for p in full) + 1
    assert after > 700
    want += [[after + i] * 3 for i in range(len(text) - 1 - start + 5)]
    assert received.T.tolist() == want


@pytest.mark.parametrize("ratio", [1, 0.5, 0.1])
def test_bf16_answers_as_transformers_in_bf16(llm: Any, sharp_model: Path, ratio: float) -> None:
    """To bf16's precision: 8 bits of mantissa over 8 layers. The choices that rounding decides (up to 2 % of the
    tokens) are among equals, so they do not show either."""
    from ..support.oracles.qwen2_5_vl import Oracle

    oracle = Oracle(sharp_model, torch.bfloat16)
    clips = [Clip(32, 112, 168), Clip(12, 140, 84, 0.25, seed=2)]
    settings = {"retention_ratio": ratio}
    text = f"{HEAD}{VIDEO}seconds{VIDEO}{TAIL}"
    output = greedy(llm, [prompt_of(text, clips, flashvid=settings)])[0]
    _, expected = oracle.greedy(*oracle.assemble(text, clips, [], settings), 1)
    _, steps = tokens_and_logprobs(output)
    assert max(abs(value - float(expected[0][token])) for token, value in steps[0].items()) < 0.03


def test_bad_settings_raise_and_the_engine_lives_on(llm: Any) -> None:
    from ..core.test_settings import BAD_REQUESTS

    clip = Clip(4, 84, 84)
    for settings, message in BAD_REQUESTS:
        with pytest.raises(ValueError, match=message):
            greedy(llm, [prompt_of(TEXT, [clip], flashvid=settings)])
    prompt = prompt_of(TEXT, [clip]) | {"mm_processor_kwargs": {"flashvidd": {"alpha": 1}}}
    with pytest.raises(ValueError, match="did you mean 'flashvid'"):
        greedy(llm, [prompt])
    assert greedy(llm, [prompt_of(TEXT, [clip])])[0].outputs[0].token_ids


def test_precomputed_video_embeddings_are_refused(sharp_model: Path) -> None:
    with engine(sharp_model, enable_mm_embeds=True, **engine_args(retention_ratio=0.25)) as llm:
        embeddings = {
            "video_embeds": torch.randn(2 * 9, 128), "video_grid_thw": torch.tensor([[2, 6, 6]]),
            "second_per_grid_ts": torch.tensor([1.0]),
        }  # fmt: skip
        prompt: dict[str, Any] = {"prompt": TEXT, "multi_modal_data": {"video": embeddings}}
        with pytest.raises(ValueError, match="cannot compress video_embeds"):
            greedy(llm, [prompt])
        output = greedy(llm, [prompt | {"mm_processor_kwargs": {"flashvid": {"enabled": False}}}])[0]
        assert len(output.prompt_token_ids) == num_text_tokens(llm) + 18
