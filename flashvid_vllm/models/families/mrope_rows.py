# SPDX-License-Identifier: MIT
"""The Qwen-VL towers on some of a video's units of 2 x 2 patches (see ``reuse``)."""

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer
from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer

from ...core.reuse import Reuse
from ..reuse import attending_to_all, gather, uploaded
from ..upload import upload


class RowsTower:
    """A tower that is called with the pixels of one video's computed units and returns the rows of all its tokens.

    Args:
        metadata: what the tower derives from the video's size, for its computed units.
        reuse: of the video, its units in raster order, as pixels and output have them.
        inside: the same in the order in which the tower's blocks have them.
    """

    def __init__(
        self,
        tower: Qwen2_5_VisionTransformer | Qwen3_VisionTransformer,
        metadata: dict[str, Tensor],
        reuse: Reuse,
        inside: Reuse,
    ) -> None:
        self._tower = tower
        self._metadata = metadata
        self._source = upload(reuse.source, tower.device)
        self._inside = inside
        self._tables = uploaded(inside, tower.device)
        self.out_hidden_size = int(tower.out_hidden_size)

    def __call__(self, pixels: Tensor, grids: list[list[int]]) -> Tensor:
        attentions = [block.attn.attn for block in self._tower.blocks]
        with attending_to_all(attentions, self._inside, self._tables, self._tower.spatial_merge_unit, None):
            rows = self._tower(pixels, grids, encoder_metadata=self._metadata)
        return rows.index_select(0, self._source)

    def gather(self, x: Tensor) -> Tensor:
        """The queries or keys of all patches, from those of the computed ones: [patches, heads, d]."""
        return gather(x, self._tables["source"], self._tower.spatial_merge_unit)


def in_raster_order(tower: Qwen3_VisionTransformer, thw: list[int], reuse: Reuse) -> RowsTower:
    """Qwen3-VL's and Qwen3.5's: position embeddings and rotary tables are those of the computed patches."""
    metadata = tower.prepare_encoder_metadata([thw])
    rows = upload(reuse.rows, tower.device)
    for name in ("pos_embeds", "rotary_pos_emb_cos", "rotary_pos_emb_sin"):
        metadata[name] = gather(metadata[name], rows, tower.spatial_merge_unit)
    return RowsTower(tower, metadata, reuse, reuse)


def in_window_order(tower: Qwen2_5_VisionTransformer, thw: list[int], reuse: Reuse) -> RowsTower:
    """Qwen2.5-VL's: its blocks have a frame window after window, and what is computed of each stays in place."""
    metadata = tower.prepare_encoder_metadata([thw])
    unit_at = tower.get_rope_by_thw(*thw)[2]  # slot of the window order -> unit
    is_computed = torch.zeros(len(reuse.source), dtype=torch.bool)
    is_computed[reuse.rows] = True
    slots = is_computed[unit_at].nonzero().flatten()
    window_index = reuse.source[unit_at[slots]]  # of the computed units alone
    reverse_indices = window_index.argsort()
    inside = Reuse(slots, reverse_indices[reuse.source[unit_at]])
    for name, table in (("window_index", window_index), ("reverse_indices", reverse_indices)):
        metadata[name] = upload(table, tower.device)
    on_device = upload(slots, tower.device)
    for name in ("rotary_pos_emb_cos", "rotary_pos_emb_sin"):
        metadata[name] = gather(metadata[name], on_device, tower.spatial_merge_unit)
    return RowsTower(tower, metadata, reuse, inside)
