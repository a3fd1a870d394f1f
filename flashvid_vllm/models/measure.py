# SPDX-License-Identifier: MIT
"""The videos on which start-up measures memory, beside vLLM's: the longest one, in whatever way takes most."""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from ..core.budget import plan
from ..core.config import ENCODER_SETTINGS, FlashVidConfig
from ..core.reuse import Reuse, leaving_out
from ..core.settings import ENCODER_SHARES, KEY, MAX_VIDEO_TOKENS, REQUEST_OVERRIDES, in_force
from . import FAMILIES
from .encode_less import PIXELS, ROWS, SOURCE
from .pieces import blocks
from .processor import MEASURE
from .processor_cache import FIELD
from .reuse import why_not
from .settings_row import pack_settings


def encode_longest_video(model: Any) -> None:
    """Encode and compress the longest video that may come, whole or, where it may be asked for, nearly so.

    What a share of the encoder's work takes beyond the whole's (keys and values of all rows beside those of the
    computed ones, copies of features) grows with the share, and is largest next to 1. Where a piece of the longest
    video is a single temporal position, nothing in it is a copy: it is encoded whole.
    """
    vllm = model.flashvid_vllm_config
    server = vllm.model_config.multimodal_config.mm_processor_kwargs[KEY]
    config = in_force(server, FAMILIES[vllm.model_config.architecture].preset)
    kwargs = _dummy_video(vllm)
    times = max(1, server[MAX_VIDEO_TOKENS] // model.flashvid_piece)
    num_frames, n = model.video_grids(**kwargs)[0]
    num_frames *= times
    if plan(num_frames, n, config).is_identity:  # a request may ask for less
        config = FlashVidConfig(backend=config.backend, **{name: getattr(config, name) for name in ENCODER_SETTINGS})
    settings = {FIELD: pack_settings(config)[None]}
    first = blocks(num_frames, model.frames_per_piece(n), server.get(ENCODER_SHARES, 1))
    copied = next((a + 1 for a, b in zip(first, [*first[1:], num_frames], strict=True) if b - a > 1), None)
    kinds = list(_asked_for(server, config)) if copied is not None else []
    if why_not(model.attentions(), model.encoder_is_compiled()) is not None:
        kinds = [kind for kind in kinds if kind == "frames"]
    if not kinds:
        model.embed_multimodal(**{**model.repeat_video(times, **kwargs), **settings})
        return
    kwargs = model.by_rows(**kwargs)
    assert copied is not None
    for kind in kinds:  # either takes more than the whole video
        reuse = leaving_out(num_frames, model.rows_per_frame(n), copied, whole=kind == "frames")
        model.embed_multimodal(**{**_with(reuse, model, model.repeat_video(times, **kwargs)), **settings})


def _asked_for(server: Mapping[str, Any], config: FlashVidConfig) -> Iterator[str]:
    """The values of ``encoder_reuse`` that a video may come with."""
    if server.get(REQUEST_OVERRIDES, True):
        yield from ("tokens", "frames")
    elif config.encodes_less:
        yield config.encoder_reuse


def _dummy_video(vllm: Any) -> dict[str, Any]:
    """The arguments of `embed_multimodal` for the video on which vLLM measures."""
    processor = MULTIMODAL_REGISTRY.create_processor(vllm.model_config)
    dummy = processor.get_dummy_mm_inputs({"video": 1})["mm_kwargs"]["video"]
    _, _, kwargs = next(iter(group_and_batch_mm_kwargs([("video", dummy[0])], device=vllm.device_config.device)))
    return {name: value for name, value in kwargs.items() if name != MEASURE}


def _with(reuse: Reuse, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A video by rows with the pixels of as many as are computed: which ones makes no difference here."""
    pixels = kwargs[PIXELS]
    rows = len(reuse.rows) * model.pixel_rows()
    pixels = pixels[:rows] if pixels.dim() == 2 else pixels[:, :rows]
    return {**kwargs, PIXELS: pixels, ROWS: [reuse.rows], SOURCE: [reuse.source]}
