# SPDX-License-Identifier: MIT
"""Tests that run kernels in Triton's interpreter; tests/test_triton.py starts them in a process of their own.

Interpreted and compiled kernels cannot share a process, so nothing here is collected elsewhere.
"""

import os
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FULL = os.environ.get("FLASHVID_TESTS") == "full"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _round_to_nearest() -> Iterator[None]:
    """Let the interpreter round fp32 to bf16 as a GPU does; it truncates."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.cast_impl

    def cast(self, source, target):  # type: ignore[no-untyped-def]
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return original(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    names = [name for name, value in vars(InterpreterBuilder).items() if name == "create_fp_trunc"]
    patch = pytest.MonkeyPatch()
    patch.setattr(InterpreterBuilder, "cast_impl", cast)
    for name in names:
        patch.setattr(InterpreterBuilder, name, lambda self, source, target: cast(self, source, target))
    patch.setattr(
        InterpreterBuilder,
        "create_fp_to_fp",
        lambda self, source, target, mode: cast(self, source, target),
    )
    yield
    patch.undo()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` returns with values that no kernel may rely on."""
    import torch

    empty = torch.empty

    def poisoned_empty(*args, **kwargs):  # type: ignore[no-untyped-def]
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77 if tensor.itemsize == 1 else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
