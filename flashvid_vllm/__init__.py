# SPDX-License-Identifier: MIT
"""FlashVID for vLLM: a video LLM's visual tokens, cut to a quarter or a tenth before prefill.

``vllm serve MODEL --plugin flashvid`` on the command line, ``vllm.LLM(MODEL, **engine_args(...))``
in Python, ``compress(features, attention, config)`` without vLLM.

The way of a video, one direction and no way back:

    request with a video           serving/cli.py, compat.py   the server's settings, and what a request may change
    -> how many placeholders?      models/processor.py         core/settings.py, core/budget.py: integers only
    -> vision encoder, in pieces   models/families/*.py        models/pieces.py; models/attention.py: who is attended to
    -> compress(...)               models/base.py              core/compress.py over ops/ (kernels/ops in the sources)
    -> tokens and positions        models/full_positions.py    models/positions.py: those of the uncompressed prompt
    -> prefill                     vLLM's own

Imports run one way too: ops <- core <- models <- serving, and ``tools`` (the commands) on top
(tests/house/test_rooms.py).
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .core.compress import CompressedVideo, compress
from .core.config import FlashVidConfig
from .ops.env import env_info

__all__ = ["CompressedVideo", "FlashVidConfig", "compress", "engine_args", "env_info", "register"]

try:
    __version__ = version("flashvid-vllm")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def register() -> None:
    """vLLM's plugin hook: runs in every vLLM process, any number of times, and changes nothing
    for engines that were not asked for FlashVID."""
    from .serving import compat

    compat.install()


def engine_args(*, mm_processor_kwargs: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM`` (or ``EngineArgs``) that switch FlashVID on.

    Args:
        mm_processor_kwargs: further arguments for the model's own processor.
        **settings: any of FlashVidConfig's; what is not given follows the model family's
            preset. Also ``enabled`` (False: off unless a request asks for it),
            ``request_overrides`` (False: requests may not change anything) and ``positions``
            ("original": LLaVA's kept tokens keep theirs in the uncompressed prompt).

    Raises:
        ValueError: an unknown or a bad setting.
    """
    from .core.settings import KEY, check_server
    from .serving.cli import PRUNING_ON

    if mm_processor_kwargs and KEY in mm_processor_kwargs:
        raise ValueError(f"give FlashVID's settings to engine_args itself, not as {KEY!r} inside it")
    return {
        "mm_processor_kwargs": {**(mm_processor_kwargs or {}), KEY: check_server(settings)},
        "video_pruning_rate": PRUNING_ON,
    }
