# SPDX-License-Identifier: MIT
"""A video through the vision tower of the Qwen-VL families: piece by piece, on every rank's share, all of its tokens'
rows or those that are computed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.vision import run_dp_sharded_mrope_vision_model

from ...core.reuse import Reuse
from ..attention import SCORE_CHANNELS, ScoringTower, frame_attention, take_scores
from ..base import FlashVidModel
from ..pieces import encode_in_pieces
from ..reuse import copied, part, whole_frames
from .mrope_rows import RowsTower


def grid_of(thw: Sequence[int], merge: int) -> tuple[int, int]:
    """(T, N) of a video of ``thw`` patches, of which ``merge`` x ``merge`` make one token."""
    return int(thw[0]), (int(thw[1]) // merge) * (int(thw[2]) // merge)


class MRopeEncoder(FlashVidModel):
    """Mixin for the family's model. What a family may have to say is in the methods without an underscore."""

    visual: Any
    config: Any
    use_data_parallel: bool

    def scoring_block(self) -> Any:
        """The tower's last block whose attention sees whole frames."""
        return self.visual.blocks[-1]

    def raster_order(self, scores: Tensor, thw: Sequence[int]) -> Tensor:
        """The scores [n] of one video's tokens as the last block has them, in the order of the tower's output."""
        return scores

    def rows_tower(self, reuse: Reuse, thw: list[int]) -> RowsTower:
        """The tower on the computed rows of one video."""
        raise NotImplementedError

    def pixel_rows(self) -> int:
        return int(self.visual.spatial_merge_unit)

    def encoder_attention(self) -> Any:
        return self.scoring_block().attn.attn

    def attentions(self) -> list[Any]:
        return [block.attn.attn for block in self.visual.blocks]

    def encoder_is_compiled(self) -> bool:
        return not all(block.do_not_compile for block in self.visual.blocks)

    def _video_grid(self, thw: Sequence[int]) -> tuple[int, int]:
        return grid_of(thw, self.config.vision_config.spatial_merge_size)

    def _encode(
        self, pixels: Tensor, thw: Sequence[int], scored: bool, reuse: Reuse | None = None
    ) -> tuple[Tensor, ...]:
        """Features [T * N, D] of one video, and if ``scored`` its received attention [T * N].

        ``pixels`` are those of the rows that ``reuse`` computes, if it is given.
        """
        num_frames, n = self._video_grid(thw)
        if reuse is not None and (frames := whole_frames(reuse, n)) is not None:
            computed = self._encode(pixels, [len(reuse.rows) // n, *thw[1:]], scored)
            by_frame = tuple(x.unflatten(0, (-1, n)) for x in computed)
            return tuple(x.flatten(0, 1) for x in copied(by_frame, frames))
        if reuse is not None:
            self.refuse_rows()
        ranks = get_tensor_model_parallel_world_size()

        def encode(start: int, stop: int) -> tuple[Tensor, ...]:
            if reuse is not None:
                rows = self._encode_rows(pixels, [stop - start, *thw[1:]], scored, reuse, start)
                return take_scores(rows) if scored else (rows,)
            tower = self._scoring(self.visual, self._score) if scored else self.visual
            piece = pixels[start * thw[1] * thw[2] : stop * thw[1] * thw[2]]
            if self.use_data_parallel:  # a piece for each rank
                share = math.ceil((stop - start) / ranks)
                grids = [[min(share, stop - first), *thw[1:]] for first in range(start, stop, share)]
                rows = torch.cat(run_dp_sharded_mrope_vision_model(tower, piece, grids, rope_type="rope_3d"))
            else:
                rows = tower(piece, [[stop - start, *thw[1:]]])
            return take_scores(rows) if scored else (rows,)

        most = self.frames_per_piece(n)
        return encode_in_pieces(encode, num_frames, most * ranks if self.use_data_parallel else most)

    def _scoring(self, tower: Any, score: Callable[..., Tensor]) -> ScoringTower:
        ranks = get_tensor_model_parallel_world_size()
        reduce = tensor_model_parallel_all_reduce if ranks > 1 and not self.use_data_parallel else None
        return ScoringTower(tower, self.encoder_attention(), score, reduce, ranks)

    def _encode_rows(self, pixels: Tensor, thw: Sequence[int], scored: bool, reuse: Reuse, start: int) -> Tensor:
        """What the tower gives for ``thw[0]`` temporal positions from ``start`` on: [T * N, C], scores with it."""
        num_frames, n = self._video_grid(thw)

        def encode(first: int, last: int) -> Tensor:
            computed, own = part(reuse, n, first, last)
            rows = self.rows_tower(own, [last - first, *thw[1:]])
            tower = self._scoring(rows, lambda q, k, grids: self._score(rows.gather(q), rows.gather(k), grids))
            unit = self.visual.spatial_merge_unit
            return (tower if scored else rows)(
                pixels[computed.start * unit : computed.stop * unit], [[last - first, *thw[1:]]]
            )

        if not self.use_data_parallel:
            return encode(start, start + num_frames)
        # a piece for each rank; of unequal numbers of computed rows, but equal ones of tokens
        share = math.ceil(num_frames / get_tensor_model_parallel_world_size())
        first = start + share * get_tensor_model_parallel_rank()
        last = min(first + share, start + num_frames)
        width = int(self.visual.out_hidden_size) + (SCORE_CHANNELS if scored else 0)
        own = pixels.new_zeros(share * n, width, dtype=self.visual.dtype)
        if first < last:
            own[: (last - first) * n] = encode(first, last)
        return tensor_model_parallel_all_gather(own, dim=0)[: num_frames * n]

    def _score(self, query: Tensor, key: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Mean received attention of the patches of each output token: [n]."""
        scores, start = [], 0
        for thw in grids:
            end = start + math.prod(thw)
            patches = frame_attention(query[start:end], key[start:end], thw[0], self.flashvid_backend)
            merged = patches.flatten().unflatten(0, (-1, self.visual.spatial_merge_unit)).mean(1)
            scores.append(self.raster_order(merged, thw))
            start = end
        return torch.cat(scores)
