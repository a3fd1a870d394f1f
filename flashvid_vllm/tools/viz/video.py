# SPDX-License-Identifier: MIT
"""Frames of a video file."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from . import need


@dataclass(frozen=True)
class Frames:
    """Frames at even distances.

    Attributes:
        pictures: [F, height, width, 3] uint8, RGB.
        index: which frames of the file they are.
        fps: frames a second of the file, 0 if it does not say.
    """

    pictures: np.ndarray
    index: list[int]
    fps: float

    def label(self, first: int, last: int) -> str:
        """When the frames from ``first`` to ``last`` are seen."""
        if self.fps <= 0:
            name = [str(self.index[first]), str(self.index[last])]
            return f"frame {name[0]}" if first == last else f"frames {name[0]}, {name[1]}"
        seconds = [f"{self.index[i] / self.fps:.2f}" for i in (first, last)]
        return f"{seconds[0]} s" if first == last else f"{seconds[0]}, {seconds[1]} s"


def read_frames(path: Path, count: int) -> Frames:
    """``count`` frames from the first to the last, or all of a video that has fewer.

    A frame that cannot be decoded is left out, one of another size is resized to the first one's; a line on stderr
    says so. Raises UserError.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # our message suffices
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    cv2 = need("cv2")
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a video" if path.is_dir() else f"no such file: {path}")
    capture = cv2.VideoCapture(str(path))
    total, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), float(capture.get(cv2.CAP_PROP_FPS))
    capture.release()
    for told in (total, None):  # files tell their length wrongly; how many there were at the first pass is the truth
        wanted = np.linspace(0, max(total, 1) - 1, min(count, max(total, 1))).round().astype(int).tolist()
        pictures, found = _read(cv2, path, set(wanted))
        if found == told:
            break
        total = found
    if not pictures:
        raise UserError(f"not a video that OpenCV can read: {path}")
    if lost := [i for i in wanted if i not in pictures]:
        print(f"{path}: frames that cannot be decoded are left out: {', '.join(map(str, lost))}", file=sys.stderr)
    return Frames(_of_one_size(cv2, path, list(pictures.values())), list(pictures), fps)


def _read(cv2: Any, path: Path, wanted: set[int]) -> tuple[dict[int, np.ndarray], int]:
    """The wanted frames that can be decoded, by their number, and how many frames there are in all."""
    capture = cv2.VideoCapture(str(path))
    pictures, index = {}, 0
    while capture.grab():
        if index in wanted:
            done, picture = capture.retrieve()
            if done:
                pictures[index] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        index += 1
    capture.release()
    return pictures, index


def _of_one_size(cv2: Any, path: Path, pictures: list[np.ndarray]) -> np.ndarray:
    """The pictures [F, height, width, 3], all in the first one's size."""
    height, width = pictures[0].shape[:2]
    if others := {picture.shape[:2] for picture in pictures} - {(height, width)}:
        sizes = ", ".join(f"{w} x {h}" for h, w in sorted(others))
        print(f"{path}: frames of {sizes} are resized to the first one's {width} x {height}", file=sys.stderr)
    return np.stack([cv2.resize(p, (width, height), interpolation=cv2.INTER_AREA) for p in pictures])
