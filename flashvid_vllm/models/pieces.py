# SPDX-License-Identifier: MIT
"""A video through the vision encoder piece by piece, so that what the encoder needs does not grow with its length.

A temporal position (a frame, or a pair of them) attends only within itself in every tower that is served, and
position embeddings know height and width alone: cut between positions, a video gives what it gives in one call.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..core.choice import CHOICE_FRAMES
from ..core.settings import MAX_VIDEO_TOKENS

LONGEST_TOKENS = 65_536  # 334 frames of LLaVA-OneVision's; Qwen's own limit for a video is 57,600
LONGEST_BYTES = 2**30  # of features, which are wide with DeepStack


def longest_video(vllm_config: VllmConfig, settings: Mapping[str, Any]) -> int:
    """The most visual tokens that a video to be compressed may have: the server's setting, or what its features
    take. vLLM takes an uncompressed one of ``max_num_batched_tokens``, so these are allowed in any case."""
    if MAX_VIDEO_TOKENS in settings:
        return int(settings[MAX_VIDEO_TOKENS])
    model = vllm_config.model_config
    vision = model.hf_config.vision_config
    width = getattr(vision, "out_hidden_size", None) or model.hf_text_config.hidden_size
    levels = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    fit = LONGEST_BYTES // (width * levels * model.dtype.itemsize)
    return max(min(LONGEST_TOKENS, fit), vllm_config.scheduler_config.max_num_batched_tokens)


def measured_tokens(vllm_config: VllmConfig) -> int:
    """Visual tokens of the video on which vLLM measures memory at the start; 0 where it takes none."""
    model = vllm_config.model_config
    if not model.get_multimodal_config().get_limit_per_prompt("video"):
        return 0
    return int(MULTIMODAL_REGISTRY.create_processor(model).piece)


def frames_per_piece(piece: int, tokens_per_frame: int) -> int:
    """Temporal positions that the encoder gets in one call: as many as start-up measured memory for (``piece``
    tokens), at least 1."""
    return max(1, piece // tokens_per_frame)


def blocks(num_frames: int, most: int, shares: int) -> list[int]:
    """The first temporal position of each part of a video that no row is copied into or out of: what the encoder gets
    in a call of its own, and of that at most CHOICE_FRAMES.

    Args:
        num_frames: temporal positions of the video.
        most: as many as one call gets at the most.
        shares: ranks that take turns in the calls, each with a share of ``shares`` * ``most`` positions.
    """
    first: list[int] = []
    for start in range(0, num_frames, most * shares):
        stop = min(start + most * shares, num_frames)
        first += range(start, stop, -(-(stop - start) // shares))
    ends = [*first[1:], num_frames]
    return [at for start, stop in zip(first, ends, strict=True) for at in range(start, stop, CHOICE_FRAMES)]


def encode_in_pieces(
    encode: Callable[[int, int], tuple[Tensor, ...]], num_frames: int, most: int
) -> tuple[Tensor, ...]:
    """What ``encode(0, num_frames)`` returns, from calls with at most ``most`` temporal positions each.

    Args:
        encode: (start, stop) -> tensors of [(stop - start) * rows, ...] each, for positions start to stop.
    """
    whole: tuple[Tensor, ...] = ()
    for start in range(0, num_frames, most):
        stop = min(start + most, num_frames)
        piece = encode(start, stop)
        if stop - start == num_frames:
            return piece
        if not whole:  # in one allocation: torch.cat of all pieces would need twice as much
            whole = tuple(x.new_empty(len(x) // stop * num_frames, *x.shape[1:]) for x in piece)
        for into, rows in zip(whole, piece, strict=True):
            per_frame = len(into) // num_frames
            into[start * per_frame : stop * per_frame] = rows
    return whole
