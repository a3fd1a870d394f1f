# SPDX-License-Identifier: MIT
"""M-RoPE positions of a compressed prompt: kept tokens and text keep those of the full prompt.

vLLM asks twice. Before the encoder has run it asks for the whole prompt, when nobody knows
which tokens of a video will be kept: `compress_positions` gives every text token and the delta
their final values and leaves a mark on each video token. When a chunk with video tokens is
about to run it asks again, with those tokens' embeddings: they carry their position inside the
video (`append_positions`), and `fill_positions` replaces the marks of that chunk. A position
that is not a mark is final, so asking again changes nothing.

Which prompt tokens a chunk's embeddings stand for vLLM does not say, and ids do not tell: a
user may write any of them. So a mark says which row of its video waits there, and an embedding
which row it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGITS = 3  # base 256; bf16 and fp16 hold every integer up to 256 exactly
LIMIT = 256**_DIGITS
"""Positions inside a compressed video are below it."""
CHANNELS = 4 * _DIGITS  # a position's three rows, and which row of its video it is

# The delta of the request whose positions Model Runner V2 has read last, if nobody has taken it yet: `delta_of` the
# positions would wait for the device. serving/compat.py puts it here.
LAST_DELTA: list[int] = []


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
        tokens, whose marks are -(base + 1), -(extent), -(row + 1) where base is the video's first
        position, extent the number of position ids it spans and row counts what is kept of it;
        and the delta that continues decoding after the full prompt's largest id.
    """
    parts, start = [], 0
    for span in spans:
        video = full[:, span.offset : span.offset + span.length]
        base = int(video.min())
        mark = torch.empty(3, span.kept, dtype=full.dtype)
        mark[0] = -base - 1
        mark[1] = base - 1 - int(video.max())
        mark[2] = -1 - torch.arange(span.kept)
        parts += [full[:, start : span.offset], mark]
        start = span.offset + span.length
    positions = torch.cat([*parts, full[:, start:]], dim=1)
    return positions, int(full.max()) + 1 - positions.shape[1]


def append_positions(tokens: Tensor, positions: Tensor) -> Tensor:
    """Append to the rows ``tokens`` [B, D] of a video their ``positions`` [3, B] (from 0 at the video's start, below
    LIMIT) and which rows they are, as CHANNELS more channels of the same dtype: [B, D + CHANNELS]."""
    numbers = torch.cat([positions.to(tokens.device), torch.arange(len(tokens), device=tokens.device)[None]])
    digits = [(numbers >> (8 * place)) & 255 for place in range(_DIGITS)]
    return torch.cat([tokens, torch.cat(digits).T.to(tokens.dtype)], dim=1)


def take_positions(channels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions [3, n] and the rows [n], int64, that `append_positions` wrote, from its channels [n, CHANNELS]."""
    digits = channels.to(torch.int64).T.reshape(_DIGITS, 4, -1)
    numbers = sum((digits[place] << (8 * place) for place in range(1, _DIGITS)), digits[0])
    return numbers[:3], numbers[3]


def fill_positions(
    positions: Tensor,
    marks: Tensor,
    embeddings: Sequence[Tensor],
    width: int,
    num_computed_tokens: int,
) -> Tensor:
    """Replace the marks of the video tokens that ``embeddings`` belong to.

    Args:
        positions: [3, L'] as from `compress_positions`, some videos perhaps filled already.
        marks: [3, L'], the same before any was filled; ``positions`` will do where no token at or behind
            ``num_computed_tokens`` is filled.
        embeddings: the media embeddings of the chunk that starts at ``num_computed_tokens``,
            in prompt order: [n, width] without, [n, width + CHANNELS] with positions.
        width: channels of an embedding proper.
        num_computed_tokens: where the chunk starts.

    Returns:
        [3, L'], a copy; tokens of this chunk are final. Embeddings shifted by one token, as drafters ask
        for once the chunk itself is filled, make nothing wrong: each is taken for the token where it
        belongs, or for one before it, whose mark is another.
    """
    placed = [embedding[:, width:] for embedding in embeddings if embedding.shape[1] == width + CHANNELS]
    if not placed:
        return positions.clone()
    relative, rows = (x.to(positions.device, positions.dtype) for x in take_positions(torch.cat(placed)))
    # the chunk's rows are those of its marks, in order; nothing here waits for the device
    waiting = (marks[2] < 0) & (torch.arange(marks.shape[1], device=marks.device) >= num_computed_tokens)
    place = waiting.cumsum(0) - 1
    waiting &= place < len(rows)
    place = place.clamp(0, len(rows) - 1)
    waiting &= (positions[2] < 0) & (marks[2] == -1 - rows[place])
    return torch.where(waiting, relative[:, place] - marks[0] - 1, positions)


def delta_of(marks: Tensor) -> int:
    """The delta of a prompt, from its positions [3, L'] before its last token is filled in."""
    last = marks[:, -1]
    largest = int(-last[0] - 1 - last[1]) - 1 if int(last[2]) < 0 else int(last.max())
    return largest + 1 - marks.shape[1]
