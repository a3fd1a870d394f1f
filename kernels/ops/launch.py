# SPDX-License-Identifier: MIT
"""The one place that launches Triton kernels: on the tensors' device, counted where someone listens.

``record`` lists what the wrappers launch; with ``run=False`` and tensors on the "meta" device it is a dry
run, so that a compile gate sees the very kernels, block sizes and signatures of a real run. ``compile_only``
compiles what such a run calls for, and launches nothing.

A launch lists its kernel's arguments again, in order: a kernel takes them one by one, and each is specialised alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as the wrapper asked for it.

    Attributes:
        kernel: the function under ``triton.jit``.
        programs: number of programs.
        signature: argument name: Triton type ("*bf16", "i32", "constexpr").
        constants: the value of every "constexpr" argument, arguments specialised to 1 and None among them.
        aligned: the arguments that are divisible by 16.
        options: num_warps, num_stages and, where limited, maxnreg.
    """

    kernel: Any
    programs: int
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class Tiles:
    """What of a frame a program holds at a time. A loop does the rest, so one variant serves frames of all sizes.

    Attributes:
        tokens: of a list of a frame's tokens, a power of 2, at least 2.
        rows, columns: of a matrix of all tokens of a frame with each other, powers of 2.
    """

    tokens: int = 1024
    rows: int = 16
    columns: int = 128


TILES = Tiles()


@dataclass(frozen=True)
class _Recorder:
    launches: list[Launch]
    run: bool
    hip: bool


_recorders: list[_Recorder] = []
_compiling: ContextVar[bool] = ContextVar("flashvid_compiling", default=False)


@contextmanager
def record(run: bool = True, hip: bool = torch.version.hip is not None) -> Iterator[list[Launch]]:
    """List the launches made inside the block.

    Args:
        run: False to list them without running them.
        hip: whether to list what would be launched on ROCm, rather than on CUDA; only with ``run=False``.
    """
    recorder = _Recorder([], run, hip)
    _recorders.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.remove(recorder)


@contextmanager
def compile_only() -> Iterator[None]:
    """Compile what is launched inside the block, for the current device, and launch nothing."""
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)


def launch(
    kernel: Any,
    programs: int,
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
    **constants: Any,
) -> None:
    """Launch ``programs`` programs of ``kernel``; no program at all is no launch.

    The grid has one axis: the others end at 65535. The tensors name the device. ``max_registers`` of a thread
    is for CUDA: without it the assembler may spill to fit more programs on a processor.
    """
    if programs == 0:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if max_registers is not None and not _for_hip():
        options["maxnreg"] = max_registers
    for recorder in _recorders:
        recorder.launches.append(_describe(kernel, programs, args, constants, options))
    if not all(recorder.run for recorder in _recorders):
        return
    if _compiling.get():
        kernel.warmup(*args, grid=(programs,), **constants, **options)
        return
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[(programs,)](*args, **constants, **options)


def _for_hip() -> bool:
    return _recorders[-1].hip if _recorders else torch.version.hip is not None


def _describe(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any], options: dict[str, int]
) -> Launch:
    signature, known, aligned = {}, dict(constants), []
    parameters = {p.name: p for p in getattr(kernel, "params", [])}
    for name, value in zip(kernel.arg_names, args, strict=False):
        parameter = parameters.get(name)
        special = parameter is None or not parameter.do_not_specialize
        align = special and (parameter is None or not parameter.do_not_specialize_on_alignment)
        if value is None or (special and type(value) is int and value == 1):
            known[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            address = value.storage_offset() * value.itemsize if value.is_meta else value.data_ptr()
            if align and address % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if align and value % 16 == 0:
                aligned.append(name)
    signature |= dict.fromkeys(known, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    return Launch(kernel, programs, ordered, known, tuple(aligned), options)


def tiles() -> Tiles:
    """The tiles of every kernel whose lists and matrices are as long as a frame has tokens."""
    return TILES


def frame_block(num_frames: int) -> int:
    """The block that holds a video's frames. One for all up to 64: a kernel is compiled for each that a server meets,
    while a request waits."""
    return power_of_2(num_frames, least=64)


def power_of_2(size: int, least: int = 1) -> int:
    """The block that holds ``size`` elements."""
    return max(least, triton.next_power_of_2(size))


def dot_precision() -> str:
    """Never plain TF32 for fp32 operands: its 10 bits of mantissa would change which index wins."""
    return "ieee" if _for_hip() else "tf32x3"  # AMD compiles no tf32x3; operands of half precision ignore it


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


__all__ = [
    "Launch", "Tiles", "cdiv", "compile_only", "dot_precision", "frame_block", "interpreted", "launch", "power_of_2",
    "record", "tiles",
]  # fmt: skip
cdiv = triton.cdiv
INTERPRETED = tl.constexpr(interpreted())
