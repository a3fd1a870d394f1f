# SPDX-License-Identifier: MIT
"""Tests that run kernels in Triton's interpreter; tests/ops/test_triton.py starts them in a process of their own.

Interpreted and compiled kernels cannot share a process, so nothing here is collected elsewhere. Of a matrix of shapes
and dtypes `make test` takes a sample (`sampled`), the same every time, `make test-full` one twice as large.
"""

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from tests.support.interpreter import hasten

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FULL = os.environ.get("FLASHVID_TESTS") == "full"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def sampled(*axes: Iterable[Any]) -> list[Any]:
    """Parameters out of the product of ``axes``: each value of the first, the longest, with what comes next in the
    product of the others, shuffled; in full with what comes after what `make test` has tried."""
    longest, *others = (list(axis) for axis in axes)
    rest = list(itertools.product(*others))
    random.Random(0).shuffle(rest)
    tried = len(longest) + (len(longest) % len(rest) == 0) if FULL else 0
    take = itertools.islice(itertools.cycle(rest), tried, None)
    return [
        pytest.param(value, *more, id="-".join(map(str, (value, *more))))
        for value, more in zip(longest, take, strict=False)
    ]


@pytest.fixture(autouse=True, scope="session")
def _as_a_gpu_computes() -> Iterator[None]:
    """Let the interpreter round fp32 to bf16 as a GPU does (it truncates), and give equal rows equal products.

    NumPy's BLAS sums the elements at a tile's edges in another order than those inside, and which these are depends on
    the CPU; in double precision all orders round to the same float.
    """
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

    def dot(self, a, b, d, *_):  # type: ignore[no-untyped-def]
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    names = [name for name, value in vars(InterpreterBuilder).items() if name == "create_fp_trunc"]
    patch = pytest.MonkeyPatch()
    patch.setattr(InterpreterBuilder, "cast_impl", cast)
    patch.setattr(InterpreterBuilder, "create_dot", dot)
    for name in names:
        patch.setattr(InterpreterBuilder, name, lambda self, source, target: cast(self, source, target))
    patch.setattr(
        InterpreterBuilder,
        "create_fp_to_fp",
        lambda self, source, target, mode: cast(self, source, target),
    )
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def _faster() -> None:
    hasten()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` returns with values that no kernel may rely on."""
    import torch

    empty = torch.empty

    def poisoned_empty(*args, **kwargs):  # type: ignore[no-untyped-def]
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77 if tensor.itemsize == 1 else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
