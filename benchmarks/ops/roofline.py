# SPDX-License-Identifier: MIT
"""The table of ROOFLINE.md: what each Triton kernel moves and computes, and how fast an H100 could.

    python -m benchmarks.ops.roofline

Nothing here is measured. Ceilings are the data sheet's (H100 SXM: 3.35 TB/s, 989 TFLOP/s in bf16, 495 in TF32 of which
tf32x3 gets a third); trees are counted at their most, every token that ADTS leaves.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan

BYTES_PER_S, BF16, TF32X3 = 3.35e12, 989e12, 165e12
SHAPES = [(32, 196, 3584), (160, 360, 3584)]
EFFICIENCY_BYTES, EFFICIENCY_FLOPS, LAUNCH_S = 0.8, 0.5, 2e-6
STEP_S = 0.8e-6  # one dependent step of a single program: a load from L2 and a reduction over its warps


@dataclass(frozen=True)
class Kernel:
    """One launch: bytes, FLOPs at ``rate``, and steps that must follow each other in one program."""

    name: str
    bytes: int
    flops: int
    rate: float
    steps: int
    limit: str

    @property
    def floor_s(self) -> float:
        return max(self.bytes / BYTES_PER_S, self.flops / self.rate)

    @property
    def predicted_s(self) -> float:
        streaming = max(self.bytes / BYTES_PER_S / EFFICIENCY_BYTES, self.flops / self.rate / EFFICIENCY_FLOPS)
        return LAUNCH_S + max(streaming, self.steps * STEP_S)


def kernels(t: int, n: int, d: int) -> Iterator[Kernel]:
    """The launches of one compress of bf16 features at R = 10 %, in order."""
    budget = plan(t, n, FlashVidConfig(retention_ratio=0.1))
    k, b = budget.selected_per_frame, budget.tokens
    slots = n - k
    x, gram, means, products = 2 * t * n * d, 4 * t * n * n, 4 * t * slots * d, 4 * t * slots * slots
    per_token = t * n
    yield Kernel("frame_statistics", x + 4 * t * d, 4 * per_token * d, 67e12, 0, "HBM: the first read of the features")
    yield Kernel("segment", 2 * 4 * t * d, 0, BF16, 8, "latency: T transitions ranked by one program")
    yield Kernel("relevance", x + 4 * per_token, 2 * per_token * d, 67e12, 0, "HBM, or L2 where the features fit")
    yield Kernel("gram of features", x + gram, t * n * (n + 1) * d, BF16, 0, "HBM / L2: the triangle alone is computed")
    yield Kernel("select", gram + per_token, 0, BF16, k + 1, "latency: K picks, one after the other")
    yield Kernel(
        "match", x + 13 * per_token, 2 * (t - 1) * n * n * d, BF16, 0, "L2: each frame is read by both neighbours"
    )
    yield Kernel(
        "guarantee", 12 * per_token, 0, BF16, 5 * max(1, per_token // 8192), "latency: 4 passes over a segment"
    )
    yield Kernel("roots", 20 * per_token, 0, BF16, 8, "latency: pointer jumping, log of the depth")
    yield Kernel("tree_mean", x * slots // n + means, per_token * d, 67e12, 0, "HBM: fp32 means written")
    yield Kernel(
        "gram of means", means + products, t * slots * (slots + 1) * d, TF32X3, 0, "HBM: fp32 means read; tf32x3"
    )
    yield Kernel("cluster", 3 * products, 0, BF16, 40, "L2, then latency: ranks and nearest centres of a frame")
    yield Kernel("tokens", means + 4 * b * d, 2 * t * slots * d, 67e12, 0, "HBM: fp32 means read again")


def main() -> int:
    for t, n, d in SHAPES:
        rows = list(kernels(t, n, d))
        print(f"\n### {t} x {n} x {d}, bf16, R = 10 %\n")
        print("| kernel | MB | GFLOP | floor, us | predicted, us | what limits it |\n|---|---:|---:|---:|---:|---|")
        for row in rows:
            cells = (row.bytes / 1e6, row.flops / 1e9, 1e6 * row.floor_s, 1e6 * row.predicted_s)
            print(f"| {row.name} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {row.limit} |")
        total = [1e6 * sum(row.floor_s for row in rows), 1e6 * sum(row.predicted_s for row in rows)]
        print(f"| **all** | | | **{total[0]:.0f}** | **{total[1]:.0f}** | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
