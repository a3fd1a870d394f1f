# SPDX-License-Identifier: MIT
"""What Triton would compile, by its own keys, for a GPU that is not there; nothing is compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from flashvid_vllm.ops.launch import compile_only

SM_90 = GPUTarget("cuda", 90, 32)


class _NoDevice:
    """A driver that knows what to compile for, and no more."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextmanager
def compiled(target: GPUTarget) -> Iterator[set[tuple[str, Any]]]:
    """The kernels, each with the key under which Triton keeps it, that what is launched in the block calls for."""
    found: set[tuple[str, Any]] = set()

    def keep(*, key: Any, fn: Any, **_: Any) -> bool:
        found.add((fn.name, str(key)))
        return True  # do not compile

    before = driver._active  # asking for `active` would look for a device
    driver.set_active(_NoDevice(target))
    try:
        with knobs.runtime.scope(), compile_only():
            knobs.runtime.jit_cache_hook = keep
            yield found
    finally:
        driver._active = before
