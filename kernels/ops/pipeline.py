# SPDX-License-Identifier: MIT
"""The whole compression on the device: 16 launches at most, no host synchronisation, CUDA-graph capturable.

Every size is known before the first launch. What depends on the data (segments, roots of a frame, clusters of
a frame) stays on the device, as counts of padded lists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import DPC_NEIGHBOURS, cluster, forest, gram, guarantee, match, means, segment, select, tokens
from .launch import cdiv
from .layout import Layout

WORKSPACE_BYTES = 2**30  # beyond the features


@dataclass(frozen=True)
class Chunks:
    """Frames per launch: of the inner products that selection reads, and of the tree means."""

    select_frames: int
    merge_frames: int

    @classmethod
    def fit(cls, num_frames: int, n: int, d: int, selected: int, merged: int, itemsize: int) -> "Chunks":
        """As many as the workspace holds: all where that is possible, else so many that the output fits too.

        Chunks of tree means are in memory two at a time, as one is computed beside the output of the other.
        """
        slots = n - selected
        per_token = 4 * segment.num_parts(d) + 84  # squares; indices and scalars
        fixed = num_frames * (n * per_token + 8 * d)
        products, per_frame = 4 * n * n, 4 * slots * (d + slots)
        if fixed + num_frames * max(products, per_frame) <= WORKSPACE_BYTES:
            return cls(num_frames, num_frames)
        output = (num_frames * selected + merged) * (d * itemsize + 16) + 8 * num_frames * n
        room = max(WORKSPACE_BYTES - fixed - output, WORKSPACE_BYTES // 4)
        merge_frames = num_frames
        if num_frames * per_frame > room:
            merge_frames = max(1, min(num_frames, room // (2 * per_frame - 4 * slots * slots)))
        return cls(max(1, min(num_frames, room // products)), merge_frames)

    def most_launches(self, num_frames: int) -> int:
        """16, 3 more for each further chunk of frames in selection, 6 more for each in merging."""
        more_selected = cdiv(num_frames, self.select_frames) - 1
        return 16 + 3 * more_selected + 6 * (cdiv(num_frames, self.merge_frames) - 1)


# native.compress_on_device takes the same, in this order. torch.library makes an op's schema of it, so it is no object.
def compress_video(
    features: Tensor,
    attention: Tensor | None,
    selected: int,
    merged: int,
    selection: str,
    matching: str,
    merge_threshold: float,
    segment_threshold: float,
    min_segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compress the tokens of one video.

    Args:
        features: [T, N, D] fp32, fp16 or bf16, any strides.
        attention: [T, N] fp32, fp16 or bf16, any strides; None only if ``selection`` is "diversity".
        selected: tokens that ADTS selects in each frame [K], below N.
        merged: tokens that TSTM leaves in the whole video [M].
        selection, matching, merge_threshold, segment_threshold, min_segments: as in ``FlashVidConfig``.

    Returns:
        tokens [B, D], source_index [B] int64, size [B] int64, assignment [T, N] int64, as in
        ``CompressedVideo``; B = K*T + M.
    """
    t, n, d = features.shape
    slots, parts = n - selected, segment.num_parts(d)
    chunks = Chunks.fit(t, n, d, selected, merged, features.element_size())

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=features.device)

    # 1. Segments, with all that is read from the features alone.
    frames, squares, transitions = empty(t, d), empty(parts, t, n), empty(parts, 2, t)
    segment_id = empty(t, dtype=torch.int64)
    weight = None if selection == "diversity" or not selected else attention
    events = empty(t, d) if selection == "attention_diversity_event" and selected else None
    segment.frame_statistics(features, frames, squares, transitions)
    segment.segment(frames, transitions, segment_id, events, segment_threshold, min_segments)
    if events is not None:
        weight = empty(t, n)
        segment.relevance(features, segment_id, events, attention, weight)

    # 2. ADTS.
    candidate = empty(t, n, dtype=torch.uint8)
    _select(features, weight, selected, candidate, chunks.select_frames if selection != "attention" else None)

    # 3. TSTM: links, the root guarantee, roots.
    similarity, parent, root = empty(t, n), empty(t, n, dtype=torch.int64), empty(t, n, dtype=torch.int64)
    count, clusters = empty(t, dtype=torch.int32), empty(t, dtype=torch.int32)
    row_base = empty(t + 1, dtype=torch.int64)
    match.match(features, squares, candidate, segment_id, merge_threshold, matching, similarity, parent)
    linked = empty(t, n, dtype=torch.uint8)
    links = (parent, similarity, candidate, segment_id)
    guarantee.guarantee(*links, selected, merged, root, linked, count, clusters, row_base)
    slot = empty(t, n, dtype=torch.int32)
    slot_token, slot_center, tree_size = (empty(t, slots, dtype=torch.int32) for _ in range(3))
    forest.roots(root, candidate, linked, slot, slot_token, tree_size)

    # 4. and 5. Tree means, DPC-kNN and the output, a chunk of frames at a time.
    total = t * selected + merged
    out = torch.empty((total, d), dtype=features.dtype, device=features.device)
    source_index, size = empty(total, dtype=torch.int64), empty(total, dtype=torch.int64)
    assignment = empty(t, n, dtype=torch.int64)
    layout = Layout(candidate, root, count, row_base, slot, slot_token, tree_size, slot_center, source_index)
    step = chunks.merge_frames
    products, lengths = empty(step, slots, slots), empty(step, slots)
    scores = cluster.Scores.empty(step, slots, features.device)
    mean = empty(step, slots, d)
    spare = empty(step, slots, d) if step < t else None
    means.tree_means(features, root, slot_token, count, mean, tree_size)
    for start in range(0, t, step):
        stop = min(start + step, t)
        here = stop - start
        of_chunk = (products[:here], lengths[:here])
        gram.gram(mean[:here], *of_chunk, frames[start:stop], count[start:stop])
        cluster.cluster(*of_chunk, scores, count, clusters, d, DPC_NEIGHBOURS, assignment, layout=layout, start=start)
        following = spare[: min(step, t - stop)] if spare is not None and stop < t else None
        tokens.write_tokens(features, layout, mean, following, out, size, assignment, start, stop)
        if spare is not None:
            mean, spare = spare, mean
    return out, source_index, size, assignment


def _select(
    features: Tensor, weight: Tensor | None, selected: int, candidate: Tensor, frames_at_a_time: int | None
) -> None:
    """Sec. 2; in a function of its own, so that its workspace is free again when the next one is allocated."""
    t, n, _ = features.shape
    if frames_at_a_time is None or not selected:  # no distances: the highest weights, or nothing
        nearest = torch.empty((t, n), dtype=torch.float32, device=features.device)
        select.select(None, None, nearest, weight, selected, candidate, None)
        return
    shapes = ((frames_at_a_time, n, n), *[(frames_at_a_time, n)] * 3)  # each aligned, so no view of one
    products, lengths, nearest, inverse = (
        torch.empty(shape, dtype=torch.float32, device=features.device) for shape in shapes
    )
    for start in range(0, t, frames_at_a_time):
        now = slice(start, min(start + frames_at_a_time, t))
        of_chunk = products[: now.stop - start]
        gram.gram(features[now], of_chunk, lengths)
        select.nearest_others(of_chunk, lengths, nearest, inverse)
        weight_now = None if weight is None else weight[now]
        select.select(of_chunk, inverse, nearest, weight_now, selected, candidate[now], None)
