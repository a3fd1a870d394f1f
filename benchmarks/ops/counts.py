# SPDX-License-Identifier: MIT
"""Bytes and floating-point operations that each op cannot avoid: what its time is held against.

Bytes: every input read once, every output written once; what an implementation reads again or keeps between its
kernels is its own affair. FLOPs: 2 per multiply-add of the matrix products; the Gram matrix counts its triangle.
"""

from dataclasses import dataclass

from flashvid_vllm.core.budget import Budget

INDEX, FP32 = 8, 4  # bytes


@dataclass(frozen=True)
class Work:
    """What one op must move and compute.

    Attributes:
        bytes: read and written.
        flops: of matrix products.
    """

    bytes: int
    flops: int

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """No implementation is faster: the larger of the two times, in seconds."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def count(
    budget: Budget, d: int, itemsize: int, heads: int = 16, patches: int = 0, channels: int = 80
) -> dict[str, Work]:
    """The work of every op for one video of T frames of N tokens of ``d`` channels.

    ``patches`` per frame, ``heads`` and ``channels`` are the encoder's, for received attention (4 patches a token,
    if 0). The number of trees depends on the data; every token beyond ADTS counts as one, the worst case.
    """
    t, n, k = budget.num_frames, budget.tokens_per_frame, budget.selected_per_frame
    patches = patches or 4 * n
    features, slots = t * n * d * itemsize, n - k
    trees = t * slots
    gram = t * n * (n + 1) * d
    match = 2 * (t - 1) * slots * slots * d
    distances = t * slots * (slots + 1) * d
    return {
        "segment_frames": Work(t * d * FP32 + t * INDEX, 2 * t * d),
        "event_relevance": Work(features + t * n * FP32, 2 * t * n * d),
        "select_tokens": Work(features + t * n * FP32 + t * k * INDEX, gram),
        "match_tokens": Work(features + t * n * (1 + FP32 + INDEX), match),
        "tree_roots": Work(2 * t * n * INDEX, 0),
        "pool_trees": Work(features + t * n * (1 + INDEX) + trees * (d * FP32 + 2 * INDEX), t * n * d),
        "cluster_tokens": Work(trees * (d * FP32 + 2 * INDEX), distances),
        "received_attention": Work(
            2 * t * patches * heads * channels * itemsize + t * patches * FP32, 4 * t * heads * patches**2 * channels
        ),
        "adaptive": Work(features + budget.tokens * (d * itemsize + 2 * INDEX) + t * n * INDEX, gram),
        "compress": Work(
            features + t * n * FP32 + budget.tokens * (d * itemsize + 2 * INDEX) + t * n * INDEX,
            gram + match + distances,
        ),
    }
