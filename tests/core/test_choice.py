# SPDX-License-Identifier: MIT
"""What the encoder computes: the exact number of rows, whole frames between cuts, and rows that stand for others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashvid_vllm.core.budget import encoder_rows
from flashvid_vllm.core.choice import CUT, choose, choose_frames
from flashvid_vllm.core.config import FlashVidConfig
from flashvid_vllm.ops.reuse import UNEXPLAINED, choose_rows


def scenes(*lengths: int, places: int = 3) -> Tensor:
    """Levels [sum of lengths, places, 4] of scenes that are still, with cuts between them."""
    made = [torch.full((n, places, 4), 40 * i, dtype=torch.uint8) for i, n in enumerate(lengths)]
    return torch.cat(made)


def noise(t: int, places: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    return torch.randint(0, 20, (t, places, 4), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("size", "ratio", "rows"),
    [
        ((1, 360, 1), 0.7, 360),  # never less than a frame of each block
        ((2, 360, 1), 0.7, 504),  # not 503, which doubles make of it
        ((10, 7, 1), 0.25, 17),
        ((10, 7, 4), 0.25, 28),
        ((10, 7, 1), 1e-9, 7),
        ((10, 7, 10), 1.0, 70),
    ],
)
def test_the_number_of_rows(size: tuple[int, int, int], ratio: float, rows: int) -> None:
    assert encoder_rows(*size, ratio) == rows


@pytest.mark.parametrize("reuse", ["tokens", "frames"])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.77, "auto"])
@pytest.mark.parametrize("blocks", [[0], [0, 4, 8]])
def test_rows_and_what_stands_for_the_others(reuse: Any, ratio: Any, blocks: list[int]) -> None:
    """As `Reuse` has it, of the number that is promised, and not beyond a block."""
    t, places = 11, 3
    levels = noise(t)
    chosen = choose(levels, blocks, FlashVidConfig(encoder_ratio=ratio, encoder_reuse=reuse))
    rows, source = chosen.rows, chosen.source
    assert rows.dtype == source.dtype == torch.int64
    assert bool((rows.diff() > 0).all())
    assert torch.equal(rows[source[rows]], rows)
    stands = rows[source]
    assert torch.equal(stands % places, torch.arange(t * places) % places)
    block = torch.bucketize(torch.arange(t), torch.tensor(blocks), right=True)
    assert torch.equal(block[stands // places], block.repeat_interleave(places))
    if ratio == "auto":
        left = (levels.flatten(0, 1).long() - levels.flatten(0, 1)[stands].long()).abs().sum()
        assert left <= UNEXPLAINED * levels.numel()
        assert places * len(blocks) < len(rows) < t * places
    elif reuse == "frames":
        assert len(rows) == places * max(len(blocks), int(ratio * t))
        assert torch.equal(stands // places, (stands // places)[::places].repeat_interleave(places))
    else:
        assert len(rows) == max(places * len(blocks), int(ratio * t * places))
        assert torch.equal(stands // places, choose_rows(levels, blocks, len(rows)).flatten())


def test_every_second_frame() -> None:
    """Without cuts, from the middle of what each stands for."""
    assert choose_frames(scenes(8), [0], 4).tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert choose_frames(scenes(9), [0], 3).tolist() == [1, 1, 1, 4, 4, 4, 7, 7, 7]
    assert choose_frames(scenes(7), [0, 4], 3).tolist() == [0, 0, 2, 2, 5, 5, 5]


def test_nothing_is_copied_over_a_cut() -> None:
    assert choose_frames(scenes(3, 5), [0], 4).tolist() == [0, 1, 1, 3, 3, 6, 6, 6]
    assert choose_frames(scenes(3, 5), [0], 2).tolist() == [1, 1, 1, 5, 5, 5, 5, 5]
    # more cuts than frames: the sharpest count
    levels = scenes(2, 2, 2)
    levels[4:] = 200
    assert choose_frames(levels, [0], 2).tolist() == [1, 1, 1, 1, 4, 4]
    # as much as a cut is none yet
    fade = torch.arange(0, 5 * CUT, CUT, dtype=torch.uint8)[:, None, None].expand(5, 3, 4)
    assert choose_frames(fade, [0], 1).tolist() == choose_frames(scenes(5), [0], 1).tolist()
    assert choose_frames(fade, [0], 2).tolist() == choose_frames(scenes(5), [0], 2).tolist()


def test_auto_follows_the_video() -> None:
    """Still: one frame. Noise: nearly all. Between them as many as there are pictures."""
    for reuse in ("tokens", "frames"):
        config = FlashVidConfig(encoder_ratio="auto", encoder_reuse=reuse)
        assert choose(scenes(12), [0], config).rows.tolist() == ([0, 1, 2] if reuse == "tokens" else [15, 16, 17])
        assert len(choose(scenes(5, 4, 3), [0], config).rows) == 3 * 3
        loud = torch.randint(0, 256, (9, 3, 40), dtype=torch.uint8)
        assert len(choose(loud, [0], config).rows) > 0.9 * 27
