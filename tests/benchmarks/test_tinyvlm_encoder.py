# SPDX-License-Identifier: MIT
"""A share of CLIP's work: what stands for a patch is the patch that was named, at its own place, in every layer."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers

from benchmarks.common import clip_model
from benchmarks.tinyvlm import encoder, features


@pytest.fixture(scope="module")
def tower() -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=224, patch_size=16
    )
    torch.manual_seed(0)
    return clip_model.tower(transformers.CLIPVisionModelWithProjection(config).eval())


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)


def computed(tower: Any, frames: np.ndarray, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder.encode(tower, clip_model.preprocess(frames), position)


def test_of_all_patches_it_is_the_tower_itself(tower: Any, frames: np.ndarray) -> None:
    position = torch.arange(3)[:, None].expand(3, 196)
    for ours, theirs in zip(
        computed(tower, frames, position),
        features.encode(tower, frames, True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_of_a_still_video_one_frame_is_enough(tower: Any, frames: np.ndarray) -> None:
    still = np.repeat(frames[:1], 3, axis=0)
    ours = computed(tower, still, torch.zeros(3, 196, dtype=torch.int64))
    for mine, whole in zip(ours, features.encode(tower, still, True), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-5)


def test_a_patch_that_is_another_frames_gets_that_ones_pixels_and_place(tower: Any, frames: np.ndarray) -> None:
    position = torch.arange(3)[:, None].repeat(1, 196)
    position[1, 30] = 2
    pasted = frames.copy()
    row, column = divmod(30, 14)
    cut = np.s_[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
    pasted[1][cut] = frames[2][cut]
    (ours, _), (theirs, _) = (
        computed(tower, frames, position),
        features.encode(tower, pasted, True),
    )
    torch.testing.assert_close(ours[1, 30], ours[2, 30])  # its state is frame 2's
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    other = (ours[1] - theirs[1]).norm() / theirs[1].norm()
    assert 0 < other < 0.3  # the others see that state, and not what frame 1 would have made of the pixels
