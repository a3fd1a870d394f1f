# SPDX-License-Identifier: MIT
"""Compile before the first request what any video may call for: Triton compiles a kernel for each class of arguments.

The wrappers themselves are asked, on "meta" tensors: nothing is allocated or runs. Frames of all sizes have the
same kernels (`launch.Tiles`); of the number of frames some know the power of 2 that holds it.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass

import torch
import triton

from . import means, pipeline, triton_backend
from .launch import compile_only, frame_block

SELECTIONS = ("attention_diversity", "attention_diversity_event", "attention", "diversity")
MATCHINGS = ("tree", "position")
MOST_THREADS = 16
MOST_FRAMES = 4096  # of an hour at one a second; a video of more compiles two kernels of its own


@dataclass(frozen=True)
class Videos:
    """The videos that a server may meet.

    Attributes:
        dtype: of the features, and of the encoder's q and k.
        channels: of a visual token [D].
        least_tokens, most_tokens: visual tokens of a frame [N].
        longest: visual tokens of a video [T * N] at most; a frame of more is one video.
        heads, head_channels: of the vision encoder's attention: heads of this rank, channels of each.
        ranks: processes of this machine that compile the same at the same time.
    """

    dtype: torch.dtype
    channels: int
    least_tokens: int
    most_tokens: int
    longest: int
    heads: int
    head_channels: int
    ranks: int = 1


def compile_all(videos: Videos) -> None:
    """Compile every kernel that compressing such a video on the current device may launch.

    Raises:
        Whatever Triton raises where a kernel does not compile for this device.
    """
    copy_context().run(_compile_all, videos)  # Triton may leave its mode behind where a kernel fails


def _compile_all(videos: Videos) -> None:
    with ExitStack() as stack:
        threads = min(MOST_THREADS, len(os.sched_getaffinity(0)) // videos.ranks)
        if threads > 1 and hasattr(triton, "AsyncCompileMode") and torch.version.hip is None:  # LLVM for ROCm aborts
            executor = stack.enter_context(ThreadPoolExecutor(threads))
            stack.enter_context(triton.AsyncCompileMode(executor))
        stack.enter_context(compile_only())
        compress_one_of_each(videos)


def compress_one_of_each(videos: Videos) -> None:
    """Call the wrappers for a video of each class, on "meta"."""
    for n in {videos.least_tokens, videos.most_tokens}:
        for selection in SELECTIONS:
            for matching in MATCHINGS:
                _compress(videos, 1, n, n // 2, selection, matching)
        for selected in {0, n // 2}:
            _compress(videos, most_frames(videos, n), n, selected)  # more than the workspace holds at a time
    n = max(2, videos.least_tokens)  # so that one is selected, and its frame's events are looked at
    for num_frames in frame_classes(most_frames(videos, videos.least_tokens)):
        for selection in SELECTIONS:
            _compress(videos, num_frames, n, n // 2, selection)
    _merge(videos, n)
    query = torch.empty((1, 1, videos.heads, videos.head_channels), dtype=videos.dtype, device="meta").transpose(1, 2)
    triton_backend.UNREGISTERED["received_attention"](query, query)


def most_frames(videos: Videos, n: int) -> int:
    """Temporal positions of the longest video with ``n`` tokens at each."""
    return min(max(1, videos.longest // n), MOST_FRAMES)


def frame_classes(most: int) -> Iterator[int]:
    """A number of frames for each block that holds up to ``most``."""
    num_frames = 1
    while num_frames <= most:
        yield min(frame_block(num_frames), most)
        num_frames = frame_block(num_frames) + 1


def _compress(
    videos: Videos, num_frames: int, n: int, selected: int, selection: str = SELECTIONS[0], matching: str = MATCHINGS[0]
) -> None:
    features = torch.empty((num_frames, n, videos.channels), dtype=videos.dtype, device="meta")
    attention = torch.empty((num_frames, n), device="meta")
    merged = (n - selected) * num_frames // 2
    pipeline.compress_video(features, attention, selected, merged, selection, matching, 0.8, 0.9, 4)


def _merge(videos: Videos, n: int) -> None:
    """What `adaptive` launches, and what averages in every method that merges; the number of frames is no matter."""
    features = torch.empty((2, n, videos.channels), dtype=videos.dtype, device="meta")
    triton_backend.UNREGISTERED["explain_tokens"](features, n, 0.7)
    label = torch.empty((2, n), dtype=torch.int64, device="meta")
    index, mean = label[:1].int(), torch.empty((1, n, videos.channels), device="meta")
    for forest in (False, True):
        means.tree_means(features, label, index, index[0, :1], mean, index, known=False, forest=forest)
