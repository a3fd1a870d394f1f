# SPDX-License-Identifier: MIT
"""A few small frames of a video, for the report."""

import base64
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..viz import need
from ..viz.video import read_frames
from .data import Video, frames_in

FRAMES = 6
LONGEST_SIDE = 160  # pixels
_QUALITY = 72


def frames_of(video: Video) -> list[str]:
    """JPEG data URIs; none of a URL, which is not fetched again. Raises UserError: no OpenCV, or it cannot read it."""
    if isinstance(video.source, str):
        return []
    cv2 = need("cv2")
    if video.source.is_dir():
        files = frames_in(video.source)
        chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(FRAMES, len(files))).round().astype(int)]
        return [_jpeg(cv2, _read(cv2, path)) for path in chosen]
    return [_jpeg(cv2, picture[..., ::-1]) for picture in read_frames(video.source, FRAMES).pictures]


def _read(cv2: Any, path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    if picture is None:
        raise UserError(f"not an image that OpenCV can read: {path}")
    return np.asarray(picture)


def _jpeg(cv2: Any, picture: np.ndarray) -> str:
    """A picture [height, width, 3] uint8, BGR."""
    scale = min(1.0, LONGEST_SIDE / max(picture.shape[:2]))
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    small = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
