# SPDX-License-Identifier: MIT
"""Time every op and the whole compression: medians of interleaved runs, against named peers in the same run.

    python -m benchmarks.bench_ops                         the pipeline at two shapes, every op at one
    python -m benchmarks.bench_ops --all --json rows.json  every shape and number of frames

A row is one implementation of one op; its ratios are to the torch reference and to vLLM's EVS and VidCom2 at the same
shape, measured in turns with it. The floor is the larger of bytes / bandwidth and FLOPs / rate, with both ceilings
measured in this run on this device. Where there is no GPU it runs on the CPU, and says so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flashvid_vllm import FlashVidConfig, compress, env_info, ops
from flashvid_vllm.budget import plan

from .counts import count

# (N, D, heads, patches of a frame in the encoder, channels of a head)
SHAPES = {
    "LLaVA-OneVision-7B": (196, 3584, 16, 729, 72),
    "Qwen2.5-VL-7B": (360, 3584, 16, 1440, 80),
    "Qwen3-VL-4B": (256, 2560, 16, 1024, 64),
    "Qwen3-VL-8B": (256, 4096, 16, 1024, 72),
    "small": (49, 896, 12, 196, 64),
}
FRAMES = (16, 32, 64, 160, 512)
RATIO = 0.1


@dataclass
class Row:
    """One implementation of one op at one shape; times in seconds."""

    shape: str
    frames: int
    op: str
    implementation: str
    median_s: float
    fastest_s: float
    slowest_s: float
    floor_s: float
    bytes: int
    flops: int
    launches: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)


class Timer:
    """Times functions in turns: what disturbs the machine disturbs them all."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def once(self, function: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def all(self, functions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """At least 3 turns each, and as many as the time allows, up to 50; the first, a warm-up, is dropped."""
        first = {name: self.once(function) for name, function in functions.items()}
        turns = max(3, min(50, int(self.seconds / max(1e-9, sum(first.values())))))
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(turns):
            for name, function in functions.items():
                times[name].append(self.once(function))
        return times


def ceilings(device: torch.device, dtype: torch.dtype, timer: Timer) -> tuple[float, float]:
    """Bytes and FLOPs a second that this device reaches: a copy far larger than its caches, a square product."""
    big = torch.empty((2**30 if device.type == "cuda" else 2**27) // 4, dtype=torch.float32, device=device).fill_(1)
    other = torch.empty_like(big)
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    best: dict[str, Callable[[], Any]] = {"copy": lambda: other.copy_(big), "product": lambda: torch.mm(a, b, out=out)}
    times = {name: min(found) for name, found in timer.all(best).items()}
    return 2 * big.numel() * 4 / times["copy"], 2 * size**3 / times["product"]


def video(t: int, n: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features [T, N, D] and attention [T, N] of a scene that moves: neighbours alike, noise beneath, two cuts."""
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(3, n, d, generator=generator)
    features = torch.stack([scene[3 * i // t].roll(i // 4, 0) for i in range(t)])
    features += 0.4 * torch.randn(t, n, d, generator=generator)
    attention = torch.rand(t, n, generator=generator).pow(4)
    return features.to(device, dtype), attention.to(device)


def op_calls(features: Tensor, attention: Tensor, encoder: tuple[int, int, int], backend: str) -> dict[str, Any]:
    """Every op on the reference's own inputs, so that all backends do the same work."""
    t, n, _ = features.shape
    config = FlashVidConfig(retention_ratio=RATIO)
    budget = plan(t, n, config)
    frames = features.float().mean(1)
    segment_id = ops.segment_frames(frames, 0.9, 8, "torch")
    k = budget.selected_per_frame
    selected = ops.select_tokens(features, attention, k, "torch")
    candidate = torch.ones(t, n, dtype=torch.bool, device=features.device).scatter_(1, selected, False)
    _, parent = ops.match_tokens(features, candidate, segment_id, 0.8, "tree", "torch")
    root = ops.tree_roots(parent, "torch")
    index, mean, _ = ops.pool_trees(features, root, candidate, "torch")
    first = mean[index < n]
    heads, patches, channels = encoder
    q, key = (torch.randn(t, heads, patches, channels, device=features.device).to(features.dtype) for _ in range(2))
    return {
        "segment_frames": lambda: ops.segment_frames(frames, 0.9, 8, backend),
        "event_relevance": lambda: ops.event_relevance(features, segment_id, backend),
        "select_tokens": lambda: ops.select_tokens(features, attention, k, backend),
        "match_tokens": lambda: ops.match_tokens(features, candidate, segment_id, 0.8, "tree", backend),
        "tree_roots": lambda: ops.tree_roots(parent, backend),
        "pool_trees": lambda: ops.pool_trees(features, root, candidate, backend),
        "cluster_tokens": lambda: ops.cluster_tokens(first, max(1, len(first) // 8), min(7, len(first)), backend),
        "received_attention": lambda: ops.received_attention(q, key, backend),
    }


def peers(features: Tensor) -> dict[str, Callable[[], Any]]:
    """Whole-video peers: vLLM's prunings at the same ratio, and the two batched products that cannot be avoided."""
    t, n, _ = features.shape
    flat, turned = features.flatten(0, 1), features.transpose(1, 2).contiguous()
    found: dict[str, Callable[[], Any]] = {
        "2 x torch.bmm": lambda: (torch.bmm(features, turned), torch.bmm(features[1:], turned[:-1]))
    }
    try:
        from vllm.multimodal.video_prune import evs, vidcom2
    except ImportError:
        return found
    grid = (t, n, 1)  # merge size 1: the same tokens, whatever their layout in a frame
    found["vLLM EVS"] = lambda: flat[evs.compute_retention_mask(flat, grid, 1, 1 - RATIO)]
    found["vLLM VidCom2"] = lambda: flat[vidcom2.compute_retention_mask(flat, grid, 1, 1 - RATIO)]
    return found


def launches_of(function: Callable[[], Any], backend: str) -> int | None:
    """Kernel launches of one run, where our own launcher counts them."""
    if backend != "triton":
        return None
    from flashvid_vllm.ops.launch import record

    with record() as found:
        function()
    return len(found)


def measure(
    name: str, t: int, dtype: torch.dtype, device: torch.device, timer: Timer, roof: tuple[float, float], each_op: bool
) -> list[Row]:
    """The rows of one shape."""
    n, d, *encoder = SHAPES[name]
    features, attention = video(t, n, d, dtype, device)
    work = count(plan(t, n, FlashVidConfig(retention_ratio=RATIO)), d, features.element_size(), *encoder)
    backends = env_info()["backends"]

    def pipeline(backend: Any) -> Callable[[], Any]:
        config = FlashVidConfig(retention_ratio=RATIO, min_segments=4, selection="attention_diversity", backend=backend)
        return lambda: compress(features, attention, config)

    groups: dict[str, dict[str, Callable[[], Any]]] = {
        "compress": {backend: pipeline(backend) for backend in backends} | peers(features)
    }
    if each_op:
        heads, patches, channels = encoder
        for backend in backends:
            for op, call in op_calls(features, attention, (heads, patches, channels), backend).items():
                groups.setdefault(op, {})[backend] = call
    rows = []
    for op, calls in groups.items():
        times = timer.all(calls)
        medians = {who: statistics.median(found) for who, found in times.items()}
        for who, found in times.items():
            of_op = work[op]
            if op == "cluster_tokens":  # one frame
                of_op = type(of_op)(of_op.bytes // t, of_op.flops // t)
            row = Row(
                name, t, op, who, medians[who], min(found), max(found), of_op.floor_s(*roof), of_op.bytes, of_op.flops,
                launches_of(calls[who], who),
            )  # fmt: skip
            others = ("torch", "vLLM EVS", "vLLM VidCom2", "2 x torch.bmm")
            row.ratios = {other: medians[who] / medians[other] for other in others if other in medians and other != who}
            rows.append(row)
    return rows


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table."""
    shown = Table(title=title, title_justify="left")
    for column in ("shape", "T", "op", "by", "median", "spread", "floor", "/ floor", "ratio to", "launches"):
        shown.add_column(column, justify="left" if column in ("shape", "op", "by", "ratio to") else "right")
    for row in rows:
        ratios = ", ".join(f"{who} {ratio:.2f}" for who, ratio in row.ratios.items())
        shown.add_row(
            row.shape, str(row.frames), row.op, row.implementation, _ms(row.median_s),
            f"{_ms(row.fastest_s)} to {_ms(row.slowest_s)}", _ms(row.floor_s), f"{row.median_s / row.floor_s:.1f}",
            ratios, "" if row.launches is None else str(row.launches),
        )  # fmt: skip
    return shown


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def commit() -> str:
    """The commit that was measured, with a + if the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every shape and number of frames")
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append", help="default: LLaVA-OneVision-7B, small")
    parser.add_argument("--frames", type=int, nargs="+", help="default: 32, and 16 for the small shape")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=5, help="time for the turns of one op; default 5")
    parser.add_argument("--json", type=Path, help="append a JSON row for each row to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    timer = Timer(device, options.seconds)
    about = env_info() | {"commit": commit(), "dtype": options.dtype, "threads": torch.get_num_threads()}
    console = Console()
    if device.type == "cpu":
        console.print("No GPU here: these are the CPU's times.")
    roof = ceilings(device, dtype, timer)
    console.print(f"ceilings of this run: {roof[0] / 1e9:.0f} GB/s, {roof[1] / 1e12:.2f} TFLOP/s in {options.dtype}")
    shapes = options.shape or (list(SHAPES) if options.all else ["LLaVA-OneVision-7B", "small"])
    rows: list[Row] = []
    for name in shapes:
        for t in options.frames or (FRAMES if options.all else [16 if name == "small" else 32]):
            console.print(f"{name}, {t} frames ...", highlight=False)
            rows += measure(name, t, dtype, device, timer, roof, each_op=options.all or name != "small")
    title = f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}, R = {RATIO}"
    console.print(table(rows, title))
    if options.json:
        with options.json.open("a") as file:
            for row in rows:
                file.write(json.dumps(asdict(row) | about) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
