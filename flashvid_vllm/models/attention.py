# SPDX-License-Identifier: MIT
"""Received attention from the vision encoder: the weight of ADTS.

A vision tower computes it as it runs: `ScoringTower` stands in for the tower for one call, takes
the q and k of its last full-attention layer where they enter the attention kernel (after
rotary), and returns the score of each output token as further channels of the tower's
output. So the score goes wherever the features go, also where only one tensor-parallel rank
encodes a video (``--mm-encoder-tp-mode data``) and the others receive its output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

# Channels that a score travels in, though it fills one or two: rows whose length is not divisible by 16 are not known
# to be aligned, and every kernel would load them two bytes at a time
SCORE_CHANNELS = 16


def append_scores(features: Tensor, scores: Tensor) -> Tensor:
    """Append fp32 ``scores`` [n] to ``features`` [n, D] as bits, in 1 (fp32) or 2 (bf16, fp16) of SCORE_CHANNELS more
    channels: rounding them to 16 bits would change which tokens are kept."""
    bits = scores.to(torch.float32).contiguous().view(features.dtype).view(len(scores), -1)
    return torch.cat([features, bits, features.new_zeros(len(scores), SCORE_CHANNELS - bits.shape[1])], dim=1)


def take_scores(features: Tensor) -> tuple[Tensor, Tensor]:
    """Split what `append_scores` joined: features [n, D], a view, and fp32 scores [n]."""
    features, bits = features[:, :-SCORE_CHANNELS], features[:, -SCORE_CHANNELS:]
    return features, bits[:, : 4 // bits.itemsize].contiguous().view(torch.float32).flatten()


@contextmanager
def watch_attention(attention: Any) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """Watch one run of vLLM's attention module: afterwards the yielded function returns its q and k, after
    rotary, [tokens, heads of this rank, d]."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(query_and_key(*args, **kwargs))

    def query_and_key(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        shape = (-1, attention.num_heads, attention.head_size)
        return query.reshape(shape), key.reshape(shape)

    def result() -> tuple[Tensor, Tensor]:
        if len(seen) != 1:
            raise RuntimeError(f"the vision tower's last attention layer ran {len(seen)} times in one call, expected 1")
        return seen[0]

    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield result
    finally:
        hook.remove()


class ScoringTower:
    """A vision tower whose output carries the received attention of each token.

    Args:
        tower: vLLM's vision tower, called as ``tower(pixels, grids)`` -> [n, D].
        attention: vLLM's attention module of its last full-frame layer.
        score: (query, key [patches, heads, d], grids) -> scores [n] of the output tokens,
            the mean over this rank's heads.
        all_reduce: sums over the ranks that share the heads, or None where each rank has all.
    """

    def __init__(
        self,
        tower: Any,
        attention: Any,
        score: Callable[[Tensor, Tensor, Sequence[Sequence[int]]], Tensor],
        all_reduce: Callable[[Tensor], Tensor] | None,
        ranks: int,
    ) -> None:
        self._tower = tower
        self._attention = attention
        self._score = score
        self._all_reduce = all_reduce
        self._ranks = ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)

    @property
    def out_hidden_size(self) -> int:
        """Channels of the output, as a rank without a video of its own must know them."""
        return int(self._tower.out_hidden_size) + SCORE_CHANNELS

    def __call__(self, pixels: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        with watch_attention(self._attention) as seen:
            features = self._tower(pixels, grids)
        query, key = seen()
        scores = self._score(query, key, grids)
        if self._all_reduce is not None:
            scores = self._all_reduce(scores) / self._ranks
        return append_scores(features, scores)


def frame_attention(query: Tensor, key: Tensor, num_frames: int, backend: str) -> Tensor:
    """Received attention of every patch of one video.

    Args:
        query, key: [num_frames * patches, heads, d], frame after frame.

    Returns:
        [num_frames, patches] fp32, the mean over heads and queries.
    """
    query, key = (x.unflatten(0, (num_frames, -1)).transpose(1, 2) for x in (query, key))
    return ops.received_attention(query, key, backend=backend)
