# SPDX-License-Identifier: MIT
"""Every kernel compiles for every GPU generation, as it would be launched: no spills, shared memory that the device
has, matrix instructions where they belong, loads that are wide and ahead, never plain TF32. And the gate can fail."""

import os
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from flashvid_vllm.ops import gram
from flashvid_vllm.ops.launch import Launch, record

from .compile_gate import SHAPES, TARGETS, compile_launch, launches, variant, wants_matrix

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("interpreted and compiled modes do not share a process", allow_module_level=True)

# bf16 for every target; fp16, whose code is alike, fp32, which no server uses on a GPU, and other models' widths for
# one of each vendor. Frames of all sizes have the same kernels (test_variants.py), but for the one that chunks add.
OTHER_DTYPES = {"sm_90": (torch.float16, torch.float32), "gfx942": (torch.float16, torch.float32)}


def all_launches(target: str) -> Iterator[Launch]:
    seen = set()
    for dtype in (torch.bfloat16, *OTHER_DTYPES.get(target, ())):
        for name, shape in SHAPES.items():
            if name != "Qwen2.5-VL" and dtype != torch.bfloat16:
                continue
            if not name.startswith("Qwen2.5-VL") and target not in OTHER_DTYPES:
                continue
            for launch in launches(shape, dtype, TARGETS[target].backend == "hip"):
                if variant(launch) not in seen:
                    seen.add(variant(launch))
                    yield launch


# sm_86 and sm_89 have sm_80's instructions and sm_120's little shared memory, gfx950 has gfx942's and more of it: those
# are left to `python -m tests.ops.compile_gate`
TRIED = [name for name in TARGETS if name not in ("sm_86", "sm_89", "gfx950")]


@pytest.mark.slow  # not an engine, but a minute of one core
@pytest.mark.longer("compiles")
@pytest.mark.parametrize("target", TRIED)
def test_every_kernel(target: str) -> None:
    reports = [compile_launch(launch, target) for launch in all_launches(target)]
    assert len({report.kernel for report in reports}) >= 13
    bad = [str(report) for report in reports if report.faults]
    assert not bad, "\n" + "\n".join(bad)


def test_the_kernels_that_multiply_matrices_are_known() -> None:
    names = {launch.name for launch in launches(SHAPES["Qwen2.5-VL"], torch.bfloat16, False) if wants_matrix(launch)}
    assert names == {"gram_kernel", "match_kernel", "log_sum_exp_kernel", "column_sum_kernel"}


@triton.jit
def greedy_kernel(x, out, SIZE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiplies matrices with as many registers, as much shared memory and as little precision as it is told."""
    at = tl.arange(0, SIZE)
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for start in tl.range(0, 4096, 64, num_stages=STAGES):
        a = tl.load(x + at[:, None] * 4096 + start + tl.arange(0, 64)[None, :])
        acc = tl.dot(a, tl.trans(a), acc, input_precision=PRECISION)
    tl.store(out + at[:, None] * SIZE + at[None, :], acc)


@triton.jit
def gram_kernel(x, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Has the name of one that must use matrix instructions, and does not."""
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(tl.float32))


def greedy(size: int, stages: int, precision: str, warps: int = 4) -> Launch:
    signature = {"x": "*fp32", "out": "*fp32", "SIZE": "constexpr", "STAGES": "constexpr", "PRECISION": "constexpr"}
    constants = {"SIZE": size, "STAGES": stages, "PRECISION": precision}
    return Launch(greedy_kernel, 1, signature, constants, ("x", "out"), {"num_warps": warps, "num_stages": stages})


def unaligned() -> Launch:
    """The Gram kernel on rows that are two channels longer than their features."""
    x, out = torch.empty(2, 64, 66, dtype=torch.bfloat16, device="meta"), torch.empty(2, 64, 64, device="meta")
    with record(run=False, hip=False) as found:
        gram.gram(x[..., :64], out, out[:, 0])
    return found[0]


@pytest.mark.parametrize(
    ("launch", "target", "fault"),
    [
        (greedy(128, 1, "tf32", warps=2), "sm_80", "spilled"),
        (greedy(128, 6, "tf32x3"), "sm_86", "shared memory"),
        (greedy(64, 2, "tf32"), "sm_80", "plain TF32"),
        (
            Launch(gram_kernel, 1, {"x": "*bf16", "out": "*fp32", "SIZE": "constexpr"}, {"SIZE": 64}, ("x",),
                   {"num_warps": 4, "num_stages": 2}),
            "sm_90",
            "no matrix instructions",
        ),
        (unaligned(), "sm_90", "loads of 2 bytes"),
        (unaligned(), "sm_90", "loads nothing ahead"),
    ],
    ids=["spills", "shared memory", "plain TF32", "no matrix instructions", "unaligned", "no pipeline"],
)  # fmt: skip
def test_the_gate_can_fail(launch: Launch, target: str, fault: str) -> None:
    assert any(fault in found for found in compile_launch(launch, target).faults)


def test_tf32x3_is_not_taken_for_plain_tf32() -> None:
    assert not compile_launch(greedy(64, 2, "tf32x3"), "sm_80").plain_tf32
