# SPDX-License-Identifier: MIT
"""What compression keeps of a video, to look at: ``flashvid viz VIDEO --model DIR -o out.html``.

The way of the data: ``video`` samples frames, ``features`` encodes them, ``scene`` compresses and gathers
what is drawn, ``page`` (HTML) and ``sheet`` (PNG) draw it. Nothing heavy is imported before it is used.
"""

import importlib
from typing import Any

from ..errors import UserError

_PACKAGES = {"cv2": "opencv-python-headless", "transformers": "transformers", "matplotlib": "matplotlib"}


def need(module: str) -> Any:
    """Import an optional module. Raises UserError that names what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES[module.split(".")[0]]
        why = str(error).strip().split("\n")[0]
        raise UserError(f"this needs {package}: pip install '.[viz]' in a clone of flashvid-vllm ({why})") from None
