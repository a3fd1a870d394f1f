# SPDX-License-Identifier: MIT
"""What a video costs by its number of frames: time and memory of each method of ours."""

import multiprocessing
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from flashvid_vllm import FlashVidConfig, compress, env_info
from flashvid_vllm.core.config import Method
from tests.support.cases import video

from .timer import Timer, times_of

FRAMES, SHAPE = (16, 64, 256, 1024, 4096), (196, 1152)
METHODS: tuple[Method, ...] = ("flashvid", "adaptive")


def measure(dtype: str, ratio: float, frames: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each method and number of ``frames``, which are multiples of 16."""
    todo = [(t, dtype, method, ratio) for method in METHODS for t in frames]
    # Processes find no function of a package's __main__, and wait for it for ever: so this is a module of its own.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(measure_one, todo, chunksize=1)


def measure_one(t: int, dtype: str, method: Method, ratio: float) -> dict[str, Any]:
    """The cost of t frames, in a process of its own: what an earlier video left in a workspace would hide its need."""
    timer, config = Timer(2), FlashVidConfig(retention_ratio=ratio, method=method)
    features, attention = (x.to(timer.device) for x in video("scene", 16, *SHAPE, getattr(torch, dtype)))
    compress(features[:2, :8], attention[:2, :8], config)  # loads what is loaded once
    features, attention = features.repeat(t // 16, 1, 1), attention.repeat(t // 16, 1)
    peak = timer.peak_bytes(lambda: compress(features, attention, config))
    times = timer.all({"compress": lambda: compress(features, attention, config)})["compress"]
    return {
        "video": f"{t} x {SHAPE[0]} x {SHAPE[1]} scene",
        "dtype": dtype,
        "frames": t,
        "method": method,
        "by": env_info()["backend"],
        "median_s": statistics.median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "features_bytes": features.nbytes,
        "peak_bytes": peak,
    }


def line_of(row: dict[str, Any]) -> dict[str, str]:
    """The columns of the table."""
    line = {"T": str(row["frames"]), "method": row["method"], "by": row["by"], **times_of(row)}
    line |= {"us a frame": f"{1e6 * row['median_s'] / row['frames']:.0f}"}
    return line | {
        name: "" if row[key] is None else f"{row[key] / 2**20:.1f}"
        for name, key in (("features, MiB", "features_bytes"), ("peak beside them, MiB", "peak_bytes"))
    }
