# SPDX-License-Identifier: MIT
"""Compile what a run would launch, for GPUs that are not there: registers, spills, shared memory, instructions.

    python -m tests.ops.compile_gate [sm_90 gfx942 ...]      a line for every kernel and target

`launches` asks the launch wrappers themselves (on meta tensors), so the block sizes and signatures are those of a real
run. Shared memory is not checked by the compiler without a device, hence the table of limits. Must run in a process
without TRITON_INTERPRET=1.
"""

import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashvid_vllm import FlashVidConfig
from flashvid_vllm.core.budget import plan
from flashvid_vllm.models.attention import SCORE_CHANNELS
from flashvid_vllm.ops.launch import Launch, record

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)}
TARGETS |= {name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")}
# KiB of shared memory that one block may have (CUDA C++ programming guide, "Technical Specifications")
SHARED_KIB = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160,
}  # fmt: skip
# Bytes spilled at most, stack included, with fp32 features. A tf32x3 product holds each operand three times in
# registers, and smaller tiles cost more than a few bytes to L1. fp32 encoders are a matter of tests, not of serving.
FP32_SPILLS = {"match_kernel": 32, "log_sum_exp_kernel": 16, "tree_mean_kernel": 16}
MATRIX = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma|v_smfmac"
# (T, N, D, heads, patches of a frame in the encoder, channels of a head)
SHAPES = {
    "LLaVA-OneVision": (32, 196, 3584, 16, 729, 72),
    "Qwen2.5-VL": (32, 360, 3584, 16, 1440, 80),
    "Qwen3-VL 4B": (32, 256, 2560, 16, 1024, 64),
    "Qwen3-VL 8B": (32, 256, 4096, 16, 1024, 72),
    "Qwen2.5-VL, beyond 4K": (2, 16384, 3584, 16, 65536, 80),  # a chunk of frames is less than the video
}


@dataclass(frozen=True)
class Report:
    """One kernel for one target.

    Attributes:
        registers: of a thread (CUDA), vector registers (ROCm).
        spilled: bytes (CUDA: stores, loads and stack; ROCm: scratch) that did not fit into registers.
        shared: bytes of shared memory.
        matrix: matrix instructions in the code.
        plain_tf32: fp32 products whose operands are rounded to 10 bits.
        copies: asynchronous copies to shared memory, by which a loop loads ahead of what it computes (CUDA).
        narrow: loads of 2 bytes a thread (CUDA): rows that are not known to be aligned.
        seconds: of this process and the assembler's, by the wall clock. Reported; nothing is judged by it.
    """

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    matrix: int
    plain_tf32: int
    copies: int
    narrow: int
    seconds: float
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        fault = f"   {'; '.join(self.faults)}" if self.faults else ""
        return (
            f"{self.kernel:24} {self.target:7} {self.registers:4d} registers {self.spilled:5d} B spilled "
            f"{self.shared / 1024:6.1f} KiB shared {self.matrix:4d} matrix {self.copies:3d} copies "
            f"{self.narrow:3d} narrow {self.seconds:5.1f} s{fault}"
        )


def served(
    t: int, n: int, d: int, heads: int, patches: int, channels: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [T, N, D], scores, q and k [T, heads, patches, channels] on "meta", laid out as a model serves them:
    beside the features ride scores (Qwen), and q and k are parts of one product."""
    features = torch.empty(t, n, d + SCORE_CHANNELS, dtype=dtype, device="meta")[..., :d]
    product = torch.empty(t, patches, 3 * heads * channels, dtype=dtype, device="meta")
    query, key = (x.unflatten(-1, (heads, channels)).transpose(1, 2) for x in product.chunk(3, dim=-1)[:2])
    return features, torch.empty(t, n, device="meta"), query, key


def launches(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, hip: bool) -> list[Launch]:
    """Every kernel that compressing one video of this shape launches, received attention included."""
    from flashvid_vllm.ops import pipeline, triton_backend

    t, n = shape[:2]
    features, attention, query, key = served(*shape, dtype)
    with record(run=False, hip=hip) as found:
        budget = plan(t, n, FlashVidConfig(retention_ratio=0.1))
        for selection in ("attention_diversity_event", "attention"):
            for matching in ("tree", "position"):
                sizes = (budget.selected_per_frame, budget.merged, selection, matching, 0.8, 0.9, 8)
                pipeline.compress_video(features, attention, *sizes)
        triton_backend.UNREGISTERED["explain_tokens"](features, budget.tokens, 0.7)
        triton_backend.UNREGISTERED["received_attention"](query, key)
    return list({variant(launch): launch for launch in found}.values())


def variant(launch: Launch) -> tuple[str, ...]:
    """What Triton compiles one kernel for."""
    return (launch.name, *map(str, (launch.signature, launch.constants, launch.aligned, launch.options)))


def compile_launch(launch: Launch, target: str) -> Report:
    """Compile one kernel for one target, as a launch on it would. Raises what Triton raises."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing would be compiled")
    names = list(launch.signature)
    aligned: dict[tuple[int, ...], list[list[object]]] = {
        (names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned
    }
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs=aligned,
    )
    log, start = io.StringIO(), time.perf_counter()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True  # Triton's own flags: ptxas run by hand spills elsewhere
        knobs.compilation.always_compile = True  # a cache hit prints no log
        compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
    seconds = time.perf_counter() - start
    if TARGETS[target].backend == "cuda":
        text, code = log.getvalue(), compiled.asm["ptx"]
        registers = _number(r"Used (\d+) registers", text)
        found = (r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"(\d+) bytes stack frame")
        spilled = sum(_number(pattern, text) for pattern in found)
    else:
        code = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", code)
        spilled = _number(r"\.private_segment_fixed_size:\s+(\d+)", code)
    report = Report(
        launch.name, target, registers, spilled, compiled.metadata.shared, len(re.findall(MATRIX, code)),
        sum(_is_plain_tf32(line) for line in compiled.asm["ttir"].splitlines()),
        len(re.findall(r"cp\.async\.c[ag]", code)), len(re.findall(r"ld\.global\S*\.[ub]16 ", code)), seconds,
    )  # fmt: skip
    report.faults.extend(faults(report, launch))
    return report


def faults(report: Report, launch: Launch) -> Iterator[str]:
    """What is wrong with a compiled kernel."""
    if report.spilled > (0 if is_half(launch) else FP32_SPILLS.get(report.kernel, 0)):
        yield f"{report.spilled} bytes spilled"
    if report.shared > SHARED_KIB[report.target] * 1024:
        yield f"{report.shared} bytes of shared memory, above {SHARED_KIB[report.target]} KiB"
    if wants_matrix(launch) and not report.matrix:
        yield "no matrix instructions"
    if report.plain_tf32:
        yield "plain TF32"
    if report.narrow:
        yield f"{report.narrow} loads of 2 bytes"
    if report.target.startswith("sm_") and wants_matrix(launch) and not report.copies:
        yield "loads nothing ahead"


def wants_matrix(launch: Launch) -> bool:
    """Whether the kernel multiplies half-precision matrices: the Gram, the match and received attention."""
    names = ("gram_kernel", "match_kernel", "log_sum_exp_kernel", "column_sum_kernel")
    return is_half(launch) and launch.name in names


def is_half(launch: Launch) -> bool:
    """Whether the kernel reads features of 16 bits."""
    return any(kind in ("*bf16", "*fp16") for kind in launch.signature.values())


def _is_plain_tf32(line: str) -> bool:
    return "tt.dot " in line and "xf32>" in line.split("->")[0] and bool(re.search(r"inputPrecision = tf32\b", line))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler did not print {pattern!r}:\n{text[-2000:]}")
    return int(found.group(1))


def main(targets: list[str]) -> int:
    bad = 0
    for target in targets or TARGETS:
        seen = set()
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for shape in SHAPES.values():
                for launch in launches(shape, dtype, TARGETS[target].backend == "hip"):
                    if variant(launch) not in seen:
                        seen.add(variant(launch))
                        report = compile_launch(launch, target)
                        bad += bool(report.faults)
                        print(report, flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
