# SPDX-License-Identifier: MIT
"""No kernel touches memory outside the tensors that it was given.

A checker of our own: it looks at every address that an interpreted kernel really loads or stores. triton-viz
3.0's sanitizer reasons about addresses symbolically and cannot follow these kernels (no integer division in
loop bounds), nor can it be imported with Triton 3.9.
"""

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from benchmarks.gpu import kernels
from flashvid_vllm.ops import launch as launching
from flashvid_vllm.ops import pipeline, triton_backend
from flashvid_vllm.ops.launch import Tiles, launch, record
from tests.ops.interpreted.conftest import FULL
from tests.ops.test_reference import OPS, op_inputs
from tests.support.cases import video


def extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


@pytest.fixture(autouse=True)
def _bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[tuple[int, int]] = []
    prepare = GridExecutor._init_args_hst

    def remember(self: Any, args: Any, kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        allowed[:] = [extent(tensor) for tensor in tensors if tensor.numel()]
        return prepare(self, args, kwargs)

    def check(pointers: Any, mask: Any) -> None:
        address = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(address.shape, dtype=bool)
        for start, stop in allowed:
            inside |= (address >= start) & (address + size <= stop)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} addresses out of bounds")

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(launching, "TILES", Tiles(tokens=16, rows=16, columns=16))  # 33 tokens are several, and a bit
    monkeypatch.setattr(GridExecutor, "_init_args_hst", remember)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


@triton.jit
def _without_mask(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * 2)


def test_the_checker_sees_a_missing_mask() -> None:
    x = torch.randn(128)
    launch(_without_mask, 2, x, torch.empty(128), BLOCK=64)
    with pytest.raises(Exception, match="28 addresses out of bounds"):
        launch(_without_mask, 2, x[:100], torch.empty(128), BLOCK=64)


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvid_vllm.ops.choose_backend", lambda _requested, _device: "triton")
    OPS[op](op_inputs(dtype, 3, 33, 130))


@pytest.mark.parametrize("room", [2**30, 1] if FULL else [1])
def test_pipeline(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "WORKSPACE_BYTES", room)
    features, attention = video("scene", 3, 33, 130)
    ran = set()
    for selection, matching in (("attention_diversity_event", "tree"), ("attention", "position")):
        with record() as launches:
            pipeline.compress_video(features, attention, 2, 9, selection, matching, 0.5, 0.9, 2)
        ran |= {launch.name for launch in launches}
    with record(run=False) as launches:
        query = torch.empty(3, 2, 33, 80)
        triton_backend.UNREGISTERED["received_attention"](query, query)
        triton_backend.UNREGISTERED["explain_tokens"](features.to("meta"), 9, 0.7)
    every = {one.name for one in triton_backend.launch_plan(3, 33, 130, torch.float32, 2, 9)}
    assert ran == every - ({one.name for one in launches} - {"gram_kernel"})


@pytest.mark.skipif(not FULL, reason="make test-full")
def test_what_a_gpus_sanitizer_watches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its program (`make gpu`) launches every kernel that is known, and fails where one is left out."""
    small = ["--shape", "2,5,24", "--dtype", "float32"]
    assert kernels.main(small) == 0
    assert capsys.readouterr().out.startswith(f"{kernels.DONE}: {len(kernels.known())} in ")
    monkeypatch.setattr(kernels, "known", lambda: {"another_kernel"})
    monkeypatch.setattr(kernels, "run_ops", lambda *_: None)
    assert kernels.main(small) == 1
    assert capsys.readouterr().err == "not launched: another_kernel\n"
