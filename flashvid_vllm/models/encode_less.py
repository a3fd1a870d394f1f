# SPDX-License-Identifier: MIT
"""A processed video without the pixels that its encoder will not look at.

What is chosen and what it stands for (``core.reuse.Reuse``) goes to the model in two fields beside the pixels, on the
CPU: ``ROWS`` [M] and ``SOURCE`` [T * P], int64. The pixels of a video that has them are those of its M rows, in the
order of ``ROWS``: for Qwen [M * 4, C * 2 * 14 * 14], as the processor has patches, for LLaVA patches [M, 3, p, p]
instead of frames [T, 3, H, W].
"""

import hashlib
import json
from collections.abc import Sequence

from torch import Tensor
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

from ..core.choice import choose
from ..core.config import ENCODER_SETTINGS, FlashVidConfig
from ..core.levels import PixelScale
from . import counting

PIXELS = "pixel_values_videos"
ROWS = "flashvid_rows"
SOURCE = "flashvid_source"


def encode_less(
    item: MultiModalKwargsItem, rows: Tensor, scale: PixelScale, blocks: Sequence[int], config: FlashVidConfig
) -> MultiModalKwargsItem:
    """A processed video whose pixels are those that are computed: a new item.

    Args:
        item: the video as the processor has it.
        rows: [T, P, U, channels, K, S, S], its pixels by rows of U patches.
        scale: of these pixels.
        blocks: as for `flashvid_vllm.core.choice.choose`.
        config: what the request asks for.
    """
    with counting.time_choice():
        reuse = choose(scale.levels(rows), blocks, config)
    computed = rows.flatten(0, 1)[reuse.rows]
    patches = computed.flatten(0, 1)  # [M * U, channels, K, S, S]
    given = item[PIXELS]
    pixels = patches.flatten(1) if given.data.dim() == 2 else patches.squeeze(2)
    cpu = MultiModalBatchedField(keep_on_cpu=True)
    return MultiModalKwargsItem(
        {
            **item,
            PIXELS: MultiModalFieldElem(data=pixels, field=given.field),
            ROWS: MultiModalFieldElem(data=reuse.rows, field=cpu),
            SOURCE: MultiModalFieldElem(data=reuse.source, field=cpu),
        }
    )


def name_of_pixels(video: str, config: FlashVidConfig, piece: Sequence[int]) -> str:
    """What a video's chosen pixels are called in the caches of processed videos, from vLLM's hash of the video, what
    the choice was asked for, and what its blocks were made from."""
    asked = json.dumps([*(getattr(config, name) for name in ENCODER_SETTINGS), *piece])
    return f"{video}-encoder-{hashlib.sha256(asked.encode()).hexdigest()}"
