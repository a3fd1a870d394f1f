# SPDX-License-Identifier: MIT
"""M-RoPE positions of a compressed prompt: kept tokens and text keep those of the full prompt.

vLLM asks twice. Before the encoder has run it asks for the whole prompt, when nobody knows
which tokens of a video will be kept: `compress_positions` gives every text token and the delta
their final values and leaves a negative mark on each video token. When a chunk with video
tokens is about to run it asks again, with those tokens' embeddings: they carry their position
inside the video (`append_positions`), and `fill_positions` replaces the marks of that chunk.
A position that is not negative is final, so asking again changes nothing.

Which prompt tokens a chunk's embeddings stand for must be found from ids: vLLM does not say. A
compressed video begins with a media id and all its tokens take an embedding, text between its
frames included; of anything else, images say, only media ids do.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGITS = 3  # base 256, so below 2**24; bf16 and fp16 hold every integer up to 256 exactly
CHANNELS = 3 * _DIGITS + 1  # and whether it is the first token of its video


@dataclass(frozen=True)
class Span:
    """One video in the full prompt, separators between its frames included: where it starts, its tokens, and how
    many are left of them."""

    offset: int
    length: int
    kept: int


def compress_positions(full: Tensor, spans: Sequence[Span]) -> tuple[Tensor, int]:
    """Positions of the compressed prompt, before the kept tokens are known.

    Args:
        full: [3, L] int64, vLLM's own positions of the full prompt.
        spans: the compressed videos, by ascending offset.

    Returns:
        positions [3, L'] int64 with L' = L - sum(length - kept): final but for the videos'
        tokens, which are -(base + 1), -(extent), -1 where base is the video's first position and
        extent the number of position ids it spans; and the delta that continues decoding
        after the full prompt's largest id.
    """
    parts, start = [], 0
    for span in spans:
        video = full[:, span.offset : span.offset + span.length]
        base = int(video.min())
        extent = int(video.max()) + 1 - base
        mark = torch.tensor([-base - 1, -extent, -1], dtype=full.dtype)
        parts += [full[:, start : span.offset], mark[:, None].expand(3, span.kept)]
        start = span.offset + span.length
    positions = torch.cat([*parts, full[:, start:]], dim=1)
    return positions, int(full.max()) + 1 - positions.shape[1]


def append_positions(tokens: Tensor, positions: Tensor) -> Tensor:
    """Append to ``tokens`` [B, D] their ``positions`` [3, B] (from 0 at the video's start, below
    2**24) as CHANNELS more channels of the same dtype, in base-256 digits: [B, D + CHANNELS]."""
    positions = positions.to(tokens.device)
    digits = [(positions >> (8 * place)) & 255 for place in range(_DIGITS)]
    first = torch.arange(len(tokens), device=tokens.device)[None] == 0
    return torch.cat([tokens, torch.cat([*digits, first]).T.to(tokens.dtype)], dim=1)


def take_positions(channels: Tensor) -> Tensor:
    """The positions [3, n] int64 that `append_positions` wrote, from its channels [n, CHANNELS]."""
    digits = channels[:, :-1].to(torch.int64).T.reshape(_DIGITS, 3, -1)
    return sum((digits[place] << (8 * place) for place in range(1, _DIGITS)), digits[0])


def fill_positions(
    positions: Tensor,
    is_media: Tensor,
    embeddings: Sequence[Tensor],
    width: int,
    num_computed_tokens: int,
) -> Tensor:
    """Replace the marks of the video tokens that ``embeddings`` belong to.

    Args:
        positions: [3, L'] as from `compress_positions`, some videos perhaps filled already.
        is_media: [L'] bool, which prompt tokens have the id of an image or a video.
        embeddings: the media embeddings of the chunk that starts at ``num_computed_tokens``,
            in prompt order: [n, width] without, [n, width + CHANNELS] with positions.
        width: channels of an embedding proper.
        num_computed_tokens: where the chunk starts.

    Returns:
        [3, L'], a copy; tokens of this chunk are final. With embeddings shifted by one token,
        as drafters ask for, only tokens filled before can be out of step, and those stay.
    """
    filled = positions.clone()
    media = is_media.nonzero().flatten().tolist()
    cursor = num_computed_tokens
    for embedding in embeddings:
        if embedding.shape[1] == width:
            start = bisect_left(media, cursor)
            cursor = media[min(start + len(embedding), len(media)) - 1] + 1
            continue
        if embedding[0, -1]:  # else the chunk starts inside this video
            start = bisect_left(media, cursor)
            cursor = media[start] if start < len(media) else positions.shape[1]
        slot = slice(cursor, cursor + len(embedding))
        cursor += len(embedding)
        current = filled[:, slot]
        relative = take_positions(embedding[: current.shape[1], width:]).to(positions.device, positions.dtype)
        filled[:, slot] = torch.where(current[0] < 0, -current[0] - 1 + relative, current)
    return filled


def delta_of(positions: Tensor) -> int:
    """The delta of a prompt, from its positions before its last token is filled in."""
    last = positions[:, -1]
    largest = int(-last[0] - 1 - last[1]) - 1 if int(last[0]) < 0 else int(last.max())
    return largest + 1 - positions.shape[1]
