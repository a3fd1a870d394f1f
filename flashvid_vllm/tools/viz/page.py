# SPDX-License-Identifier: MIT
"""A scene as one HTML file that needs nothing else."""

import base64
import html
import json
import re
from importlib.resources import files
from typing import Any

import numpy as np

from . import need
from .scene import PALETTE, Scene

LONGEST_SIDE = 640  # of an embedded frame, in pixels
JPEG_QUALITY = 82


def page(scene: Scene) -> str:
    """The HTML file's text."""
    parts = {name: (files(__package__) / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    # a title or a label with </script> in it must not end the block
    data = json.dumps(page_data(scene), separators=(",", ":")).replace("<", "\\u003c")
    values = {"CSS": parts["css"], "JS": parts["js"], "TITLE": html.escape(scene.title), "DATA": data}
    return re.sub("@@([A-Z]+)@@", lambda match: values[match[1]], parts["html"])


def page_data(scene: Scene) -> dict[str, Any]:
    """What page.js reads. Arrays over tokens are flat, [T*N]; those over kept tokens [B]."""
    single, several = scene.kept()
    return {
        "title": scene.title,
        "facts": scene.facts,
        "grid": scene.grid,
        "frames": [
            {"label": label, "source": _data_uri(picture)}
            for label, picture in zip(scene.labels, scene.pictures, strict=True)
        ],
        "flashvid": bool(scene.segment),
        "segment": scene.segment,
        "single": single.tolist(),
        "several": several.tolist(),
        "assignment": scene.video.assignment.flatten().tolist(),
        "source_index": scene.video.source_index.tolist(),
        "size": scene.video.size.tolist(),
        "colour": [PALETTE[i] if i >= 0 else "#ffffff" for i in scene.colour.tolist()],
        "copied": [] if scene.computed is None else (~scene.computed).astype(int).tolist(),  # [T][rows][columns]
        "attention": [round(float(value), 3) for value in scene.attention],
    }


def _data_uri(picture: np.ndarray) -> str:
    cv2 = need("cv2")
    scale = LONGEST_SIDE / max(picture.shape[:2])
    if scale < 1:
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
