# SPDX-License-Identifier: MIT
"""How many variants of the kernels videos of all sizes call for: each is compiled while a request waits."""

import random

import pytest
import torch

pytest.importorskip("triton")

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan
from flashvid_vllm.ops import pipeline, triton_backend
from flashvid_vllm.ops.launch import Launch, record

from .compile_gate import served, variant

WIDTH, HEADS, HEAD = 3584, 16, 80


def launches(num_frames: int, n: int, ratio: float) -> list[Launch]:
    """What one video of Qwen2.5-VL's launches, in the layout that the model serves."""
    budget = plan(num_frames, n, FlashVidConfig(retention_ratio=ratio))
    features, scores, query, key = served(num_frames, n, WIDTH, HEADS, 4 * n, HEAD, torch.bfloat16)
    with record(run=False, hip=False) as found:
        sizes = (budget.selected_per_frame, budget.merged)
        pipeline.compress_video(features, scores, *sizes, "attention_diversity", "tree", 0.8, 0.9, 4)
        triton_backend.UNREGISTERED["received_attention"](query, key)
    return found


@pytest.mark.parametrize("n", [196, 360, 1035])
def test_the_number_of_frames_calls_for_none_of_its_own(n: int) -> None:
    expected = {variant(launch) for launch in launches(8, n, 0.25)}
    assert len(expected) >= 12
    for num_frames in range(2, 65):
        assert {variant(launch) for launch in launches(num_frames, n, 0.25)} == expected


def test_videos_of_many_sizes_call_for_few() -> None:
    """A kernel has one for each power of 2 that holds a frame's tokens, some for each that holds those not chosen."""
    seen: set[tuple[str, ...]] = set()
    draw, compiling = random.Random(0), 0
    for _ in range(200):
        found = launches(draw.randint(1, 64), draw.randint(4, 40) * draw.randint(4, 40), draw.choice([0.5, 0.25, 0.1]))
        new = set(map(variant, found)) - seen
        compiling += bool(new)
        seen |= new
    assert compiling <= 15
    assert len(seen) <= 64
