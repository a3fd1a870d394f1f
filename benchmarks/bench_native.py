# SPDX-License-Identifier: MIT
"""Time the whole compression on a CPU: native and torch backends beside peers, interleaved in one run.

``python -m benchmarks.bench_native [--json FILE] [--frames 16 64 256 1024]`` checks that the backends agree, prints
medians as ratios to the peers, and writes one JSON row per measurement.
"""

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import flashvid_vllm
from flashvid_vllm import CompressedVideo, FlashVidConfig
from flashvid_vllm.budget import plan
from flashvid_vllm.ops import native
from tests.cases import video

RETENTION = 0.1
WARM_UP_S = 0.5


@dataclass(frozen=True)
class Case:
    """A video: the shapes of LLaVA-OneVision-7B and of a small model, where overhead rules."""

    num_frames: int
    n: int
    d: int
    repetitions: int

    def __str__(self) -> str:
        return f"{self.num_frames} x {self.n} x {self.d}"


CASES = (Case(32, 196, 3584, 9), Case(16, 49, 896, 41))
KINDS = ("scene", "noise")  # trees over whole segments; no tree at all, so that DPC-kNN meets every token


def compress_natively(features: Tensor, attention: Tensor, config: FlashVidConfig) -> CompressedVideo:
    budget = plan(features.shape[0], features.shape[1], config)
    sizes = (budget.selected_per_frame, budget.merged, config.selection, config.matching)
    thresholds = (config.merge_threshold, config.segment_threshold, config.min_segments)
    return CompressedVideo(*native.compress_on_device(features, attention, *sizes, *thresholds))


def contestants(features: Tensor, attention: Tensor, config: FlashVidConfig) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; the peers of vLLM only where it is installed."""
    num_frames, n, _ = features.shape
    transposed = features.transpose(1, 2)
    torch_config = FlashVidConfig(**config.to_dict() | {"backend": "torch"})
    found: dict[str, Callable[[], Any]] = {
        "native": lambda: compress_natively(features, attention, config),
        "torch": lambda: flashvid_vllm.compress(features, attention, torch_config),
        "two bmm": lambda: (torch.bmm(features, transposed), torch.bmm(features[1:], transposed[:-1])),
    }
    try:
        from vllm.multimodal.video_prune import evs, vidcom2
    except ImportError:
        return found
    side, flat = math.isqrt(n), features.flatten(0, 1)
    grid: Any = (num_frames, 2 * side, 2 * side)
    found["VidCom2"] = lambda: vidcom2.compute_retention_mask(flat, grid, 2, 1 - RETENTION)
    found["EVS"] = lambda: evs.compute_retention_mask(flat, grid, 2, 1 - RETENTION)
    return found


def interleaved(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of each call, one after the other in every round."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    while time.perf_counter() - start < WARM_UP_S:
        calls["native"]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def agree(one: CompressedVideo, other: CompressedVideo) -> float:
    """Share of the original tokens that two results send to the same place."""
    places = [torch.where(x.assignment >= 0, x.source_index[x.assignment], -1) for x in (one, other)]
    return float((places[0] == places[1]).float().mean())


def environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": platform.processor() or platform.machine(),
        "isa": native.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flashvid_vllm": flashvid_vllm.__version__,
        "commit": commit,
    }


def bench(case: Case, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    features, attention = video(kind, case.num_frames, case.n, case.d, dtype)
    config = FlashVidConfig(retention_ratio=RETENTION)
    calls = contestants(features, attention, config)
    same = agree(calls["native"](), calls["torch"]())
    times = interleaved(calls, case.repetitions)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "case": str(case),
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "agreement": round(same, 5),
        "median_ms": {name: round(value, 3) for name, value in median.items()},
        "least_ms": {name: round(min(values), 3) for name, values in times.items()},
        "ratio": {name: round(value / median["native"], 2) for name, value in median.items()},
        **environment(),
    }


def bench_length(num_frames: int) -> dict[str, Any]:
    """Time and peak memory beside the number of frames."""
    features, attention = video("scene", 16, 196, 1152, torch.bfloat16)
    features = features.repeat(num_frames // 16, 1, 1)
    attention = attention.repeat(num_frames // 16, 1)
    config = FlashVidConfig(retention_ratio=RETENTION)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = interleaved({"native": lambda: compress_natively(features, attention, config)}, 5)["native"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "case": f"{num_frames} x 196 x 1152",
        "median_ms": round(statistics.median(times), 2),
        "us_per_frame": round(1e3 * statistics.median(times) / num_frames, 1),
        "features_mib": features.numel() * 2 >> 20,
        "peak_grew_mib": grown >> 10,
        **environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there, one a line")
    parser.add_argument("--frames", type=int, nargs="*", default=[16, 64, 256, 1024], help="for the cost in T")
    arguments = parser.parse_args()
    console, rows = Console(), []

    table = Table(title="compress, R = 10 %, bf16: median ms, and how many times native's", title_justify="left")
    for name in ("case", "kind", "agreement", "native", "torch", "two bmm", "VidCom2", "EVS"):
        table.add_column(name, justify="left" if name in ("case", "kind") else "right")
    for case in CASES:
        for kind in KINDS:
            row = bench(case, kind, torch.bfloat16)
            rows.append(row)
            cells = [
                f"{row['median_ms'][name]:.2f} ({row['ratio'][name]:.2f})" if name in row["median_ms"] else "-"
                for name in ("native", "torch", "two bmm", "VidCom2", "EVS")
            ]
            table.add_row(row["case"], kind, f"{row['agreement']:.4f}", *cells)
    console.print(table)

    lengths = Table(title="cost in the number of frames", title_justify="left")
    for name in ("case", "median ms", "us per frame", "features MiB", "peak memory grew by MiB"):
        lengths.add_column(name, justify="right")
    for num_frames in arguments.frames:
        row = bench_length(num_frames)
        rows.append(row)
        lengths.add_row(*(str(row[key]) for key in list(row)[:5]))
    console.print(lengths)
    console.print(environment())
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
