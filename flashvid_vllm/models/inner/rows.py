# SPDX-License-Identifier: MIT
"""A mark on each row of a video that the encoder gives the LLM: a visual token, or what stands between them.

Which rows are separators is known where a video is compressed, on the device, and cached and cut into chunks with
them. So each row brings it, in one more channel behind all others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MARKS = "flashvid_visual"  # an embedding's marks once they are taken off it


def mark_rows(rows: Tensor, places: Tensor | None) -> Tensor:
    """``rows`` [n, C] of a video with one more channel: 1 for those at ``places``, None for all, else 0."""
    marks = rows.new_ones(len(rows), 1) if places is None else rows.new_zeros(len(rows), 1)
    if places is not None:
        marks.index_fill_(0, places.to(rows.device), 1)
    return torch.cat([rows, marks], dim=1)


def take_marks(embeddings: Sequence[Tensor], width: int) -> list[Tensor]:
    """``embeddings``, media's [n, width] or marked rows [n, > width], the latter without their marks, which go along
    with the tensor."""
    return [keep_marks(e[:, :-1], e[:, -1] > 0) if e.shape[1] > width else e for e in embeddings]


def keep_marks(embedding: Tensor, marks: Tensor | None) -> Tensor:
    """``embedding``, with which its ``marks`` go along."""
    if marks is not None:
        setattr(embedding, _MARKS, marks)
    return embedding


def marks_of(embedding: Tensor) -> Tensor | None:
    """The marks that go along with an embedding: [n] bool, or None."""
    return getattr(embedding, _MARKS, None)


def visual_tokens(embeddings: Sequence[Tensor], is_media: Tensor, device: torch.device) -> Tensor:
    """Which tokens of a step are a video's: [L] bool, from the embeddings that were put where ``is_media`` [L] says."""
    found = []
    for embedding in embeddings:
        marks = marks_of(embedding)
        found.append(torch.zeros(len(embedding), dtype=torch.bool, device=device) if marks is None else marks)
    visual = torch.zeros(len(is_media), dtype=torch.bool, device=device)
    visual[is_media] = torch.cat(found)  # is_media is on the CPU: nothing waits for the device
    return visual
