# SPDX-License-Identifier: MIT
"""The Triton backend: its tests in the interpreter, in processes of their own, and who runs when."""

import importlib.util
import logging
import os
import sys

import pytest
import torch

import flashvid_vllm
from flashvid_vllm import FlashVidConfig, compress, env_info, ops

from ..support.inner import run_inside

CPU, GPU = torch.device("cpu"), torch.device("cuda")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="starts interpreted tests, and is none"
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.slow
@pytest.mark.longer
@pytest.mark.parametrize(
    "files", [("test_ops.py", "test_tiles.py"), ("test_pipeline.py", "test_bounds.py")], ids="+".join
)
def test_in_the_interpreter(files: tuple[str, ...]) -> None:
    run_inside("-x", *(f"ops/interpreted/{name}" for name in files), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def test_auto_is_triton_on_a_gpu_and_never_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_HAS_TRITON", True)
    assert ops.choose_backend("auto", GPU) == ops.choose_backend("triton", GPU) == "triton"
    assert ops.choose_backend("auto", CPU) in ("native", "torch")
    monkeypatch.setattr(ops, "_HAS_TRITON", False)
    assert ops.choose_backend("auto", GPU) == ops.choose_backend("torch", GPU) == "torch"


def test_what_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    features, attention = torch.ones(2, 3, 4), torch.ones(2, 3)
    monkeypatch.setattr(ops, "_HAS_TRITON", True)
    message = "'triton' cannot run: it needs a tensor on a CUDA or ROCm device, or TRITON_INTERPRET=1; got .*cpu"
    with pytest.raises(ValueError, match=message):
        ops.tree_roots(torch.full((2, 3), -1), backend="triton")
    with pytest.raises(ValueError, match=message):
        compress(features, attention, FlashVidConfig(backend="triton"))
    monkeypatch.setattr(ops, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="'triton' cannot run: triton is not installed"):
        ops.select_tokens(features, None, 1, backend="triton")


def test_the_backend_that_ran_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_used", [])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            compress(torch.ones(2, 3, 4), torch.ones(2, 3))
    lines = [(r.name, r.getMessage()) for r in caplog.records if "backend" in r.getMessage()]
    assert lines == [
        ("flashvid_vllm", f"FlashVID compresses with its {ops.choose_backend('auto', CPU)} backend on cpu")
    ]


def test_env_info() -> None:
    ops.tree_roots(torch.full((2, 3), -1))
    info = env_info()
    assert set(info) == {"flashvid_vllm", "torch", "triton", "vllm", "device", "backends", "backend"}
    assert info["flashvid_vllm"] == flashvid_vllm.__version__
    assert info["torch"] == torch.__version__
    assert info["backends"][0] == "torch"
    assert info["backend"] in info["backends"]
