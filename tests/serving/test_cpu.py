# SPDX-License-Identifier: MIT
"""CPUs without products in bf16, where it is up to 30 times slower than float32: said by the server, avoided by us.

What a CPU can is made up here, so that the tests are the same on every machine.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import machine
from flashvid_vllm.serving.cpu import slow_products

AVX2 = {"cpu_name": "A CPU", "architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
AMX = AVX2 | {"avx512_bf16": True, "amx_bf16": True}
ARM, ARM_BF16 = {"architecture": "arm64", "neon": True}, {"architecture": "arm64", "neon": True, "bf16": True}
OTHER = {"architecture": "ppc64le"}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called with capabilities: this CPU has them."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine.model_dtype.cache_clear()
    yield lambda found: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    machine.model_dtype.cache_clear()


@pytest.mark.parametrize(
    ("found", "slow"),
    [(AVX2, True), (AMX, False), (AVX2 | {"avx512_bf16": True}, False), (ARM, True), (ARM_BF16, False), (OTHER, False)],
)
def test_products_in_bf16(cpu: Any, found: dict[str, Any], slow: bool) -> None:
    cpu(found)
    assert bool(slow_products(torch.bfloat16)) == slow
    assert bool(slow_products(torch.float16)) == (found is not OTHER)
    assert slow_products(torch.float32) is None


def test_a_limit_of_onednn_counts(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(AMX)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert "on this CPU (A CPU): ONEDNN_MAX_CPU_ISA=AVX2" in str(slow_products(torch.bfloat16))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert slow_products(torch.bfloat16) is None
    cpu(ARM_BF16)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert slow_products(torch.bfloat16) is None


@pytest.mark.parametrize(("found", "dtype", "why"), [(AVX2, "float32", "none of avx512_bf16"), (AMX, "bfloat16", "")])
def test_our_own_models_get_the_faster_one_and_it_is_said_once(
    cpu: Any, found: dict[str, Any], dtype: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu(found)
    assert machine.dtype_option() == ["--dtype", dtype]
    machine.dtype_option()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dtype {dtype}: ")
    assert why in line


@pytest.mark.parametrize(
    ("found", "dtype", "warned"),
    [(AVX2, "bfloat16", True), (AVX2, "float16", True), (AVX2, "float32", False), (AMX, "bfloat16", False)],
)
def test_a_server_says_at_its_start_that_it_will_be_slow(
    cpu: Any, sharp_model: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], dtype: str, warned: bool
) -> None:
    """Once, with the remedy; nothing where there is none, and nothing without the plugin."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from flashvid_vllm import engine_args

    cpu(found)
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "handle", lambda record: said.append(record.getMessage()))
    options: dict[str, Any] = {"model": str(sharp_model), "max_model_len": 1024, "dtype": dtype}
    EngineArgs(**options).create_engine_config()  # the first one of a process sets up vLLM's loggers
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    try:
        EngineArgs(**options).create_engine_config()
        assert not [line for line in said if "products" in line]
        EngineArgs(**options, **engine_args()).create_engine_config()
    finally:
        logger.removeHandler(handler)
    lines = [line for line in said if "products" in line]
    assert len(lines) == (warned and current_platform.is_cpu())
    assert all(f"in {dtype} take" in line and "--dtype float32" in line for line in lines)
