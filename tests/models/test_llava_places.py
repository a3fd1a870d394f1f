# SPDX-License-Identifier: MIT
"""Where LLaVA-Video's kept tokens and newlines stand in the uncompressed video, against a layout by hand."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from flashvid_vllm.models.families.llava_video import LlavaQwenForCausalLM, num_newlines, pooled_side

T, SIDE = 3, 4  # frames, and tokens along a side of each


@pytest.mark.parametrize("newline", ["grid", "frame", "one_token", "no_token"])
def test_places(newline: str) -> None:
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=SIDE * 2, patch_size=1),
        mm_spatial_pool_mode="bilinear",
        mm_newline_position=newline,
    )
    assert pooled_side(config) == SIDE
    full: list[tuple[str, int]] = []  # a token, or a newline behind the row or frame or video that it ends
    for t in range(T):
        for row in range(SIDE):
            full += [("token", (t * SIDE + row) * SIDE + i) for i in range(SIDE)]
            full += [("row", t)] if newline == "grid" and row < SIDE - 1 else []
        full += [("frame", t)] if newline in ("grid", "frame") else []
    full += [("frame", T - 1)] if newline == "one_token" else []
    model = LlavaQwenForCausalLM.__new__(LlavaQwenForCausalLM)
    object.__setattr__(model, "config", config)
    assert num_newlines(config, T, compressed=False) == len(full) - T * SIDE**2

    kept = torch.tensor([0, 3, 4, 17, 30, 31, 32, 47])
    places = model._places(SimpleNamespace(source_index=kept), T, SIDE**2)  # type: ignore[arg-type]
    expected = [i for i, (kind, of) in enumerate(full) if (kind == "token" and of in kept) or kind == "frame"]
    assert places.tolist() == [expected] * 3
