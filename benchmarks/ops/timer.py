# SPDX-License-Identifier: MIT
"""Times of functions in turns, and the memory that one takes."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Calls = dict[str, Callable[[], Any]]


class Timer:
    """Times functions in turns: what disturbs the machine disturbs them all."""

    def __init__(self, seconds: float) -> None:
        self.device, self.seconds = torch.device("cuda" if torch.cuda.is_available() else "cpu"), seconds

    def once(self, function: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def all(self, functions: Calls) -> dict[str, list[float]]:
        """At least 5 turns each, and as many as the time allows, up to 50; the first, a warm-up, is dropped."""
        first = {name: self.once(function) for name, function in functions.items()}
        turns = max(5, min(50, int(self.seconds / max(1e-9, sum(first.values())))))
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(turns):
            for name, function in functions.items():
                times[name].append(self.once(function))
        return times

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """How much more memory ``function`` takes at most than before; None where the system does not tell."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            function()
            return torch.cuda.max_memory_allocated(self.device) - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is free
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory is what it is now
            before = _resident("VmHWM")
            function()
            return _resident("VmHWM") - before
        except (OSError, AttributeError):
            return None


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(key))


def times_of(row: dict[str, Any]) -> dict[str, str]:
    """The columns of a row's median, fastest and slowest seconds."""
    median, fastest, slowest = (
        f"{1e3 * s:.0f}" if s >= 0.1 else f"{1e3 * s:.3g}"
        for s in (row["median_s"], row["fastest_s"], row["slowest_s"])
    )
    return {"median, ms": median, "spread": f"{fastest} to {slowest}"}
