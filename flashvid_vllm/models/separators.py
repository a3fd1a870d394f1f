# SPDX-License-Identifier: MIT
"""Text between a compressed video's frames, embedded for each request as its own text is.

Where in a video that text stands is known once its tokens are chosen, by the encoder, whose output is cached and
shared. A LoRA adapter of the embedding changes what text is for the requests that have it. So a row of text brings its
id to the step that embeds the prompt, where every token is embedded with its request's adapter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DIGITS = 3  # base 256, as in `positions`
_TEXT = "flashvid_text"  # an embedding's ids once they are taken off it


def append_text(rows: Tensor, ids: Tensor, is_text: Tensor) -> Tensor:
    """Append to ``rows`` [n, C] the ``ids`` [n] (below 2**24 - 1) of those that are text: [n, C + 3]."""
    digits = torch.where(is_text, ids + 1, 0)
    return torch.cat([rows, torch.stack([(digits >> (8 * i)) & 255 for i in range(_DIGITS)], 1).to(rows.dtype)], 1)


def take_text(embeddings: Sequence[Tensor], full: Sequence[Tensor], width: int) -> None:
    """Give each of ``embeddings`` [n, D] what `append_text` put behind the first ``width`` channels of ``full``."""
    for embedding, rows in zip(embeddings, full, strict=True):
        if rows.shape[1] > width:
            digits = rows[:, width:].to(torch.int64)
            setattr(embedding, _TEXT, sum(digits[:, i] << (8 * i) for i in range(_DIGITS)))


def embed_text(
    embeds: Tensor, media: Sequence[Tensor] | None, is_media: Tensor | None, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """``embeds`` [L, D] of a step's tokens with the text in ``media``, the embeddings that were put where ``is_media``
    [L] says, as ``embed`` has it: ids [L] -> [L, D], row by row with the adapter of the token's request."""
    if is_media is None or not any(hasattr(embedding, _TEXT) for embedding in media or ()):
        return embeds
    assert media is not None
    text = [getattr(e, _TEXT, torch.zeros(len(e), dtype=torch.int64, device=embeds.device)) for e in media]
    ids = torch.zeros(len(embeds), dtype=torch.int64, device=embeds.device)
    ids[is_media] = torch.cat(text)  # is_media is on the CPU: nothing waits for the device
    return torch.where((ids > 0)[:, None], embed((ids - 1).clamp(min=0)), embeds)
