# SPDX-License-Identifier: MIT
"""SigLIP and CLIP, as LLaVA has them, on some of a video's patches (see ``reuse``)."""

import math

import torch
from torch import Tensor
from vllm.model_executor.models.clip import CLIPVisionEmbeddings, CLIPVisionModel
from vllm.model_executor.models.siglip import SiglipVisionModel

from ...core.reuse import Reuse
from ..reuse import attending_to_all, gather, standing_in, uploaded
from ..upload import upload


def frames_of(patches: Tensor, per_frame: int) -> Tensor:
    """Whole frames [F, 3, side, side] from all of their patches [F * per_frame, 3, p, p]; pixels on the right and at
    the bottom that make no patch are of no use to a tower, and are not there."""
    side = math.isqrt(per_frame)
    grid = patches.unflatten(0, (-1, side, side))  # frame, y, x, channel, inner y, inner x
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def with_class_tokens(reuse: Reuse, num_frames: int) -> tuple[Reuse, Tensor, Tensor]:
    """A reuse of patches, with a class token in front of each frame's, which is computed.

    Returns:
        it; the order [T + M] in which T class tokens and M patches, one after the other, are its computed rows; and
        where among these the patches are, [M].
    """
    per_frame = len(reuse.source) // num_frames
    length = per_frame + 1
    classes, frame = torch.arange(num_frames) * length, reuse.rows // per_frame
    rows, order = torch.cat([classes, reuse.rows + frame + 1]).sort()
    place = order.argsort()
    source = torch.cat([place[:num_frames, None], place[num_frames:][reuse.source].unflatten(0, (num_frames, -1))], 1)
    return Reuse(rows, source.flatten()), order, place[num_frames:]


class RowsTower:
    """A tower that is called with the computed patches [M, 3, p, p] of T frames and returns their features [M, D]."""

    def __init__(self, tower: CLIPVisionModel | SiglipVisionModel, reuse: Reuse, num_frames: int) -> None:
        self._tower = tower
        self._num_frames = num_frames
        self._inside, order, patches = reuse, None, None
        if isinstance(tower.vision_model.embeddings, CLIPVisionEmbeddings):
            self._inside, order, patches = with_class_tokens(reuse, num_frames)
        self._tables = uploaded(self._inside, tower.device)
        self._order, self._patches = (x if x is None else upload(x, tower.device) for x in (order, patches))
        self._positions = upload(self._inside.rows % (len(self._inside.source) // num_frames), tower.device)

    def _embed(self, patches: Tensor, **_: bool) -> Tensor:
        """In place of the embedding of whole frames: [1, M, D], with class tokens where a tower has them."""
        embeddings = self._tower.vision_model.embeddings
        rows = embeddings.patch_embedding(patches.to(embeddings.patch_embedding.weight.dtype)).flatten(1)
        if isinstance(embeddings, CLIPVisionEmbeddings):
            rows = torch.cat([embeddings.class_embedding.expand(self._num_frames, -1), rows])[self._order]
        return (rows + embeddings.position_embedding(self._positions))[None]

    def __call__(self, patches: Tensor) -> Tensor:
        vision = self._tower.vision_model
        attentions = [layer.self_attn.attn for layer in vision.encoder.layers]
        with (
            standing_in(vision.embeddings, self._embed),
            attending_to_all(attentions, self._inside, self._tables, 1, self._num_frames),
        ):
            rows = self._tower(patches)[0]
        return rows if self._patches is None else rows.index_select(0, self._patches)

    def gather(self, x: Tensor) -> Tensor:
        """The queries or keys of all tokens of the frames, class tokens too, from those of the computed ones."""
        return gather(x, self._tables["source"])
