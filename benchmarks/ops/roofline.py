# SPDX-License-Identifier: MIT
"""The tables of ROOFLINE.md: what each Triton kernel moves and computes, and how fast an H100 could.

    python -m benchmarks.ops.roofline       half a minute: the kernels are compiled for sm_90

Nothing here is measured. Programs are those that the wrappers launch, registers and shared memory the compiler's;
ceilings are the data sheet's, but for the L2's bandwidth and the times of a step, which are assumed. Trees are counted
at their most, every token that ADTS leaves, each alone in its tree.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan
from flashvid_vllm.ops import DPC_NEIGHBOURS, pipeline, segment, triton_backend
from flashvid_vllm.ops.attention import channel_blocks
from flashvid_vllm.ops.launch import Launch, cdiv, record, tiles
from flashvid_vllm.ops.means import OTHERS_TOGETHER, ROWS_AT_A_TIME
from tests.ops.compile_gate import Report, compile_launch, served

BYTES_PER_S, L2_BYTES_PER_S = 3.35e12, 5.5e12
BF16, TF32X3, FP32 = 989e12, 165e12, 67e12
MULTIPROCESSORS, REGISTERS, SHARED, WARPS, BLOCKS = 132, 65536, 227 * 1024, 64, 32  # the last four of one of them
EXP_PER_S = MULTIPROCESSORS * 16 * 1.7e9
EFFICIENCY_BYTES, EFFICIENCY_FLOPS, LAUNCH_S = 0.8, 0.5, 2e-6
STEP_S = 0.8e-6  # a load from L2 that the next thing waits for, and a reduction over a program's warps
AHEAD_S = 0.1e-6  # a tile of a matrix product that was loaded ahead
SHAPES = [(32, 196, 3584, 16, 729, 72), (160, 360, 3584, 16, 1440, 80)]  # T, N, D; heads, patches, channels


@dataclass(frozen=True)
class Work:
    """Of one launch: bytes from HBM (each once) and from L2 (each time), FLOPs at ``rate``, exponentials, and what
    one program does after one another: steps that wait for a load, and tiles that were loaded ahead."""

    bytes: int
    l2_bytes: int
    flops: int
    rate: float
    steps: float
    ahead: int = 0
    exponentials: int = 0


@dataclass(frozen=True)
class Row:
    """A launch, its work, and what was compiled for it."""

    name: str
    launch: Launch
    work: Work
    report: Report

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        warps = self.launch.options["num_warps"]
        of_registers = REGISTERS // (cdiv(self.report.registers, 8) * 8 * 32 * warps)
        return min(of_registers, SHARED // (self.report.shared + 1024), WARPS // warps, BLOCKS)

    @property
    def waves(self) -> float:
        """How often all multiprocessors are filled; below 1 some are idle."""
        return self.launch.programs / (MULTIPROCESSORS * self.resident)

    def times(self) -> dict[str, float]:
        """Seconds by what limits, the launch apart."""
        work = self.work
        return {
            "HBM": work.bytes / BYTES_PER_S / EFFICIENCY_BYTES,
            "L2": work.l2_bytes / L2_BYTES_PER_S / EFFICIENCY_BYTES,
            "arithmetic": work.flops / work.rate / EFFICIENCY_FLOPS + work.exponentials / EXP_PER_S,
            "latency": max(1.0, self.waves) * (work.steps * STEP_S + work.ahead * AHEAD_S),
        }

    @property
    def floor_s(self) -> float:
        work = self.work
        return max(
            work.bytes / BYTES_PER_S, work.l2_bytes / L2_BYTES_PER_S, work.flops / work.rate,
            work.exponentials / EXP_PER_S,
        )  # fmt: skip

    @property
    def predicted_s(self) -> float:
        return LAUNCH_S + max(self.times().values())


def compression(t: int, n: int, d: int) -> Iterator[tuple[str, Work]]:
    """The launches of one compress of bf16 features at R = 10 %, in order."""
    budget = plan(t, n, FlashVidConfig(retention_ratio=0.1))
    k, kept, slots, tile = budget.selected_per_frame, budget.tokens, n - budget.selected_per_frame, tiles()
    tokens, trees, blocks = t * n, t * slots, cdiv(n, 64)
    x, gram, means, products = 2 * tokens * d, 4 * t * n * n, 4 * trees * d, 4 * t * slots * slots
    parts, again = segment.num_parts(d), segment.frames_per_program(t, segment.num_parts(d))
    columns = cdiv(slots, tile.columns)
    flat = cdiv(tokens, 2 * tile.tokens)  # tiles of the guarantee, if the video is one segment
    yield "frame_statistics", Work(x, x * (again + 1) // again, 4 * tokens * d, FP32, (again + 1) * cdiv(n, 16))
    yield "segment", Work(8 * t * d, 8 * t * d, 0, FP32, parts // 4 + 7 + t // 4)
    yield "relevance", Work(x, x, 2 * tokens * d, FP32, cdiv(d, 256))
    tiles_of_frames = t * blocks * (blocks + 1) // 2 * 2 * 64 * d
    yield "gram of features", Work(x + gram, 2 * tiles_of_frames + gram, tokens * (n + 1) * d, BF16, 3, cdiv(d, 32))
    yield "nearest", Work(gram, gram, 0, FP32, 2 + cdiv(n, tile.columns))
    yield "select", Work(4 * tokens * (k + 3), 4 * tokens * (k + 3), 0, FP32, 2 + k * cdiv(n, 2 * tile.tokens))
    pairs = t * cdiv(n, 64) * cdiv(n, 128)
    steps = 3 + cdiv(n, 128) * parts // 4
    yield "match", Work(
        x + 13 * tokens, pairs * (64 + 128) * d * 2, 2 * pairs * 64 * 128 * d, BF16, steps,
        cdiv(n, 128) * cdiv(d, 64),
    )  # fmt: skip
    yield "guarantee", Work(40 * tokens, 12 * 7 * tokens, 0, FP32, 6 * flat + cdiv(t, 8))
    yield "roots", Work(30 * tokens, 30 * tokens, 0, FP32, 3 + t.bit_length() + cdiv(n, tile.tokens))
    copies, searches = cdiv(slots, ROWS_AT_A_TIME), cdiv(slots, OTHERS_TOGETHER.value)  # programs; the latter find none
    steps_of_means = (3 * copies + searches) / (copies + searches)
    yield "tree_mean", Work(x * slots // n + means, x * slots // n + means, 0, FP32, steps_of_means)
    tiles_of_means = t * cdiv(slots, 64) * (cdiv(slots, 64) + 1) // 2 * 2 * 64 * d
    yield (
        "gram of means",
        Work(means + products, 4 * tiles_of_means + products, trees * (slots + 1) * d, TF32X3, 3, cdiv(d, 32)),
    )
    passes = DPC_NEIGHBOURS * products
    yield "density", Work(products, passes, 0, FP32, 3 + DPC_NEIGHBOURS * columns)
    yield "score", Work(products, products, 0, FP32, 3 + columns)
    yield "rank", Work(8 * trees, 4 * trees * slots // tile.rows, 0, FP32, 2 + columns)
    yield "assign", Work(products, products, 0, FP32, 3 + columns)
    read = means * (kept - t * k) // max(1, trees) + 4 * kept * d  # the trees that clusters are made of: all
    yield "tokens", Work(means + 2 * kept * d, means + read, 0, FP32, 6 + cdiv(slots, tile.tokens))


def attention(t: int, heads: int, patches: int, channels: int) -> Iterator[tuple[str, Work]]:
    """The launches of received attention, in order."""
    blocks, tiles_of_others, width = cdiv(patches, 128), cdiv(patches, 64), sum(channel_blocks(channels))
    rows, logits = t * heads * patches, t * heads * blocks * 128 * tiles_of_others * 64
    one, tiled = 2 * rows * channels, 2 * t * heads * blocks * (tiles_of_others * 64 + 128) * channels
    for name in ("log_sum_exp", "column_sum"):
        yield name, Work(2 * one + 4 * rows, tiled, 2 * logits * width, BF16, 3, tiles_of_others, logits)
    yield "head_mean", Work(4 * rows, 4 * rows, 0, FP32, 3)


def rows(t: int, n: int, d: int, heads: int, patches: int, channels: int) -> Iterator[Row]:
    """Every launch of one video with its received attention."""
    budget = plan(t, n, FlashVidConfig(retention_ratio=0.1))
    features, scores, query, key = served(t, n, d, heads, patches, channels, torch.bfloat16)
    with record(run=False, hip=False) as launches:
        triton_backend.UNREGISTERED["received_attention"](query, key)
        sizes = (budget.selected_per_frame, budget.merged)
        pipeline.compress_video(features, scores, *sizes, "attention_diversity_event", "tree", 0.8, 0.9, 8)
    works = [*attention(t, heads, patches, channels), *compression(t, n, d)]
    for launch, (name, work) in zip(launches, works, strict=True):
        if not launch.name.startswith(name.split()[0]):
            raise RuntimeError(f"{launch.name} was launched where {name} was expected: mend benchmarks/ops/roofline.py")
        yield Row(name, launch, work, compile_launch(launch, "sm_90"))


def main() -> int:
    for shape in SHAPES:
        t, n, d, heads, patches, channels = shape
        print(
            f"\n### {t} x {n} x {d}, bf16, R = 10 %; {heads} heads of {channels} channels, {patches} patches a frame\n"
        )
        heading = ("kernel", "MB", "L2 MB", "GFLOP", "programs", "registers", "KiB", "waves", "steps", "floor, us",
                   "predicted, us", "limit")  # fmt: skip
        print("| " + " | ".join(heading) + " |\n|---|" + "---:|" * (len(heading) - 2) + "---|")
        sums: dict[bool, list[float]] = {True: [0.0, 0.0], False: [0.0, 0.0]}
        for place, row in enumerate(rows(*shape)):
            work, times = row.work, row.times()
            steps = f"{work.steps:.3g}" + (f" + {work.ahead} ahead" if work.ahead else "")
            cells = (
                row.name, f"{work.bytes / 1e6:.1f}", f"{work.l2_bytes / 1e6:.0f}", f"{work.flops / 1e9:.1f}",
                f"{row.launch.programs}", f"{row.report.registers}", f"{row.report.shared / 1024:.0f}",
                f"{row.waves:.1f}", steps, f"{1e6 * row.floor_s:.1f}", f"{1e6 * row.predicted_s:.1f}",
                max(times, key=lambda limit: times[limit]),
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)
            of = sums[place < 3]
            of[0] += 1e6 * row.floor_s
            of[1] += 1e6 * row.predicted_s
        for name, first in (("received attention", True), ("compression", False)):
            print(f"| **{name}** |{' |' * 8} **{sums[first][0]:.0f}** | **{sums[first][1]:.0f}** | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
