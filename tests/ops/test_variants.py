# SPDX-License-Identifier: MIT
"""What start-up compiles holds all that videos of any size call for: else a request waits for a compiler."""

import os
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan
from flashvid_vllm.ops import pipeline, triton_backend, warm_up
from flashvid_vllm.ops.launch import frame_block
from tests.support.triton_keys import SM_90, compiled

from .compile_gate import served

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("interpreted and compiled modes do not share a process", allow_module_level=True)

QWEN = warm_up.Videos(torch.bfloat16, 3584, 1, 16_384, 65_536, heads=16, head_channels=80)
SMALL = [
    QWEN,
    replace(QWEN, heads=2, head_channels=72),
    replace(QWEN, most_tokens=729, channels=2048, dtype=torch.float16),
]
FIXED = replace(QWEN, least_tokens=196, most_tokens=196, head_channels=72)  # LLaVA-OneVision's


def compress(videos: warm_up.Videos, draw: random.Random) -> tuple[int, int]:
    """One video of any size and settings, laid out as a model serves it. Returns its T and N."""
    most = draw.choice([videos.most_tokens, min(videos.most_tokens, 1000)])  # large ones, and as they usually are
    n = draw.randint(videos.least_tokens, most)
    num_frames = draw.randint(1, warm_up.most_frames(videos, n))
    budget = plan(num_frames, n, FlashVidConfig(retention_ratio=draw.choice([0.9, 0.5, 0.25, 0.1, 0.02])))
    shape = (num_frames, n, videos.channels, videos.heads, 4 * n, videos.head_channels)
    features, scores, query, key = served(*shape, videos.dtype)
    sizes = (budget.selected_per_frame, budget.merged, draw.choice(warm_up.SELECTIONS), draw.choice(warm_up.MATCHINGS))
    pipeline.compress_video(features, scores, *sizes, 0.8, 0.9, draw.randint(1, 8))
    triton_backend.UNREGISTERED["received_attention"](query, key)
    return num_frames, n


@pytest.mark.parametrize("videos", [*SMALL, FIXED], ids=["Qwen", "2 heads of 72", "fp16", "LLaVA"])
def test_nothing_is_left_to_a_request(videos: warm_up.Videos) -> None:
    with compiled(SM_90) as before:
        warm_up.compress_one_of_each(videos)
    draw, in_chunks = random.Random(0), 0
    with compiled(SM_90) as found:
        for _ in range(200):
            num_frames, n = compress(videos, draw)
            in_chunks += num_frames * n * n * 4 > pipeline.WORKSPACE_BYTES
            assert found <= before, f"{num_frames} frames of {n} tokens: {sorted(found - before)}"
        for num_frames, n in ((1, videos.least_tokens), (3, videos.most_tokens)):
            features = torch.empty((num_frames, n, videos.channels), dtype=videos.dtype, device="meta")
            triton_backend.UNREGISTERED["explain_tokens"](features, n, 0.7)
            assert found <= before, f"adaptive: {sorted(found - before)}"
    assert len(found) > 12
    assert in_chunks or videos.most_tokens < 1000


def test_start_up_compiles_few() -> None:
    with compiled(SM_90) as found:
        warm_up.compress_one_of_each(QWEN)
    assert len(found) <= 60


@pytest.mark.parametrize("most", [1, 63, 64, 65, 1000, 4096])
def test_classes_hold_every_number_of_frames(most: int) -> None:
    blocks = [frame_block(num_frames) for num_frames in warm_up.frame_classes(most)]
    assert blocks == sorted({frame_block(num_frames) for num_frames in range(1, most + 1)})
