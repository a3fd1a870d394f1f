# SPDX-License-Identifier: MIT
"""Kept tokens over a clip's frames, drawn by viz's own code."""

import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.settings import check_server, resolve
from ..errors import UserError
from .clips import Clip

PAGES = 4  # drawn pages that are held
ENCODED = 2  # encoded clips that are held; a frame of 1080p takes 6 MB


class Drawer:
    """Draws what a clip's compression keeps, as `flashvid viz` does; one at a time.

    Args:
        tower: a model's directory or hub name.
        clip: whether it is a CLIP tower, not a video LLM's own.
        frames: how many to sample.
    """

    def __init__(self, tower: str, clip: bool, frames: int) -> None:
        self.tower, self.clip, self.frames = tower, clip, frames
        self.pages: dict[str, str] = {}  # the oldest first, as in the next one
        self._encoded: dict[str, tuple[Any, Any]] = {}
        self._one_at_a_time = threading.Lock()

    def draw(self, clip: Clip, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Draw ``clip`` under a request's ``settings`` and the family's preset. Blocks for seconds.

        Returns:
            {"id": of the page, "kept", "total": tokens}.

        Raises:
            UserError: a bad setting, a tower that cannot be loaded, or a clip that OpenCV cannot read.
        """
        import torch

        from ..viz.page import page
        from ..viz.scene import make_scene

        with self._one_at_a_time:
            try:
                checked = check_server(settings)
                frames, encoded = self._encode(clip)
                config = resolve(checked, None, encoded.preset)
                scene = text = None
                if config is not None:
                    with torch.inference_mode():
                        scene = make_scene(clip.name, Path(self.tower).name, frames, encoded, config)
                        text = page(scene)
            except (UserError, ValueError) as error:
                raise UserError(f"Cannot draw: {error}") from None
            if scene is None:
                raise UserError("the plain model keeps every token: nothing to draw")
            id = secrets.token_hex(8)
            _hold(self.pages, id, text, PAGES)
        return {"id": id, "kept": len(scene.video.size), "total": scene.video.assignment.numel()}

    def _encode(self, clip: Clip) -> tuple[Any, Any]:
        """Frames and features of ``clip``."""
        import torch

        from ..viz.features import encode_with_clip, encode_with_model
        from ..viz.video import read_frames

        if clip.id not in self._encoded:
            frames = read_frames(clip.path, self.frames)
            with torch.inference_mode():
                encoded = (encode_with_clip if self.clip else encode_with_model)(self.tower, frames.pictures)
            _hold(self._encoded, clip.id, (frames, encoded), ENCODED)
        return self._encoded[clip.id]


def _hold(held: dict[str, Any], key: str, value: Any, most: int) -> None:
    held[key] = value
    for old in list(held)[:-most]:
        del held[old]
