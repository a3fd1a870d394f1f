# SPDX-License-Identifier: MIT
"""Many short videos, no two alike, cut out of the real clips of `benchmarks.common.clips`: what a load benchmark sends.

vLLM caches by content, so a clip that no request has sent yet is encoded and prefilled from the start. A clip is a
window of a real video: another start, another crop, mirrored or not. Those of one source look alike to an eye.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..common.clips import CLIPS, cache_directory, clip, probe, read, write
from ..common.record import fingerprint_of

WIDTH, FPS = 320, 15.0  # of the files: pixels, frames a second
STRIDE = 6  # frames between two windows of a source
SHARE = 0.8  # of the height and the width that a crop keeps
CROPS = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # where it lies: from the top left corner, 0 to 1


@dataclass(frozen=True)
class Window:
    """``frames`` frames, evenly spaced from ``start`` to before ``start + length``, of a crop of a clip."""

    source: str
    start: int
    length: int
    frames: int
    crop: tuple[float, float]
    mirrored: bool


def windows(lengths: dict[str, int], count: int, length: int, frames: int) -> list[Window]:
    """``count`` different windows of sources that have ``lengths`` frames, the sources taking turns.

    Raises:
        ValueError: so many different ones cannot be had.
    """

    def of(source: str) -> Iterator[Window]:
        starts = range(0, lengths[source] - length + 1, STRIDE)
        for mirrored, crop, start in itertools.product((False, True), CROPS, starts):
            yield Window(source, start, length, frames, crop, mirrored)

    turns = itertools.zip_longest(*(of(source) for source in lengths))
    found = [window for turn in turns for window in turn if window is not None]
    if len(found) < count:
        raise ValueError(
            f"{count} different clips of {length} frames are wanted and {len(found)} can be cut; take fewer requests "
            "or let clips repeat (--repeat-clips)"
        )
    return found[:count]


def cut(video: np.ndarray, window: Window) -> np.ndarray:
    """The frames [frames, h, WIDTH, 3] of a window; h is even."""
    import cv2

    index = window.start + np.linspace(0, window.length - 1, window.frames).round().astype(int)
    height, width = (math.floor(SHARE * size) for size in video.shape[1:3])
    top, left = (
        round(place * (size - kept))
        for place, size, kept in zip(window.crop[::-1], video.shape[1:3], (height, width), strict=True)
    )
    frames = video[index, top : top + height, left : left + width]
    if window.mirrored:
        frames = frames[:, :, ::-1]
    size = (WIDTH, 2 * round(height * WIDTH / width / 2))
    return np.stack([cv2.resize(np.ascontiguousarray(frame), size, interpolation=cv2.INTER_AREA) for frame in frames])


def make_clips(count: int, length: int = 48, frames: int | None = None, folder: Path | None = None) -> list[Path]:
    """The paths of ``count`` different clips; those that are not there yet are made.

    Args:
        count: how many.
        length: frames of the source that a clip spans; only sources that have as many take part.
        frames: frames of the clip, evenly spaced in that span; None: all of them.
        folder: where; default: .cache/load-clips.

    Raises:
        ValueError: so many different ones cannot be had. RuntimeError: a source cannot be fetched, or written.
    """
    frames = frames or length
    lengths = {name: kept for name in CLIPS if (kept := probe(clip(name)).frames) >= length}
    folder = folder or cache_directory().parent / "load-clips"
    folder.mkdir(parents=True, exist_ok=True)
    paths, videos = [], {}
    for window in windows(lengths, count, length, frames):
        what = (asdict(window), CLIPS[window.source].sha256, WIDTH, FPS, SHARE)
        path = folder / f"{window.source}-{frames}-{fingerprint_of(what)}.mp4"
        paths.append(path)
        if not path.exists():
            if window.source not in videos:
                videos[window.source] = read(window.source, 480)
            write(cut(videos[window.source], window), path, FPS)
    return paths
