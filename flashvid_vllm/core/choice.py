# SPDX-License-Identifier: MIT
"""What of a video its encoder computes, chosen from its pixels alone, before it runs: integers only.

With ``encoder_reuse`` "tokens" each row for itself (``flashvid_vllm.ops.reuse``); with "frames" whole temporal
positions, evenly spread between cuts, each in the middle of those that it stands for.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flashvid_vllm.core.budget import encoder_rows
from flashvid_vllm.core.config import AUTO, FlashVidConfig
from flashvid_vllm.core.reuse import Reuse
from flashvid_vllm.ops.reuse import UNEXPLAINED, choose_rows

CHOICE_FRAMES = 128  # of a block at the most: what choosing among them costs grows with the third power
CUT = 24  # levels: mean distance of neighbouring frames above which nothing is copied from one to the other


def choose(levels: Tensor, blocks: Sequence[int], config: FlashVidConfig) -> Reuse:
    """The rows that are computed, and what stands for the others.

    Args:
        levels: [T, P, C] uint8 on the CPU, the pixels of the P rows of T temporal positions in 256 levels.
        blocks: the first temporal position of each part that the encoder gets in a call of its own: nothing is
            copied from one to another, and each has at least P rows.
        config: gives ``encoder_ratio`` f and ``encoder_reuse``. With "tokens" exactly
            max(P * len(blocks), floor(f * T * P)) rows are computed, with "frames" those of max(len(blocks),
            floor(f * T)) temporal positions; with f "auto" as few as leave ``UNEXPLAINED`` levels in the mean, and with
            "tokens" no row more than ``FARTHEST`` (`flashvid_vllm.ops.reuse`).

    Raises:
        ValueError: ``levels`` or ``blocks`` are not as described, or ``config.backend`` is not to be had.
    """
    ratio = None if config.encoder_ratio == AUTO else float(config.encoder_ratio)
    num_frames, rows_per_frame = levels.shape[:2]
    whole = config.encoder_reuse == "frames"
    counted = 1 if whole else rows_per_frame
    num = encoder_rows(num_frames, counted, len(blocks), ratio) if ratio is not None else None
    if whole:
        position = choose_frames(levels, blocks, num)[:, None].expand(num_frames, rows_per_frame)
    else:
        # both choose the same rows: a name is a wish for tests, and one for a GPU none for the host
        backend = "auto" if config.backend == "triton" else config.backend
        position = choose_rows(levels, blocks, num, backend)
    computed = (position == torch.arange(num_frames)[:, None]).flatten()
    stands = (position * rows_per_frame + torch.arange(rows_per_frame)).flatten()
    return Reuse(computed.nonzero().flatten(), (computed.cumsum(0) - 1)[stands])


def choose_frames(levels: Tensor, blocks: Sequence[int], num: int | None) -> Tensor:
    """The temporal position [T] that stands for each, ``num`` of them for themselves (None: `choose`'s "auto").

    Shots are what cuts leave of the blocks, the sharpest first where there are more than ``num`` allow. Each has one
    frame; the others go one by one to where a frame stands for most, the earliest of such shots.
    """
    frames = [frame.flatten().short() for frame in levels]
    change = [0] + [_distance(a, b) for a, b in pairwise(frames)]
    sharp = [t for t, total in enumerate(change) if total > CUT * frames[0].numel() and t not in blocks]
    sharp.sort(key=lambda t: (-change[t], t))

    def spread(num: int) -> Tensor:
        return _spread(len(frames), sorted([*blocks, *sharp[: num - len(blocks)]]), num)

    if num is not None:
        return spread(num)
    fewest, most = len(blocks), len(frames)  # the least of them is looked for by halving
    while fewest < most:
        middle = (fewest + most) // 2
        left = sum(_distance(frame, frames[at]) for frame, at in zip(frames, spread(middle).tolist(), strict=True))
        fewest, most = (fewest, middle) if left <= UNEXPLAINED * levels.numel() else (middle + 1, most)
    return spread(most)


def _distance(a: Tensor, b: Tensor) -> int:
    return int((a - b).abs().sum(dtype=torch.int64))


def _spread(num_frames: int, shots: list[int], num: int) -> Tensor:
    """``num`` frames over shots that begin at ``shots``."""
    lengths = [b - a for a, b in zip(shots, [*shots[1:], num_frames], strict=True)]
    counts = [1] * len(shots)
    for _ in range(num - len(shots)):
        open_shots = [i for i, (n, k) in enumerate(zip(lengths, counts, strict=True)) if k < n]
        longest = open_shots[0]
        for i in open_shots[1:]:
            longest = i if lengths[i] * counts[longest] > lengths[longest] * counts[i] else longest
        counts[longest] += 1
    position = torch.empty(num_frames, dtype=torch.int64)
    for first, n, k in zip(shots, lengths, counts, strict=True):
        for i in range(k):
            a, b = first + i * n // k, first + (i + 1) * n // k
            position[a:b] = (a + b - 1) // 2
    return position
