# SPDX-License-Identifier: MIT
"""Time the whole compression and every op: medians of interleaved runs, as ratios to named peers in the same run.

    python -m benchmarks.ops                         the cases of `make bench`
    python -m benchmarks.ops --all --json rows.json  every shape, number of frames and op

A row is one implementation of one op on one video: a "scene" drifts and merges into trees, in "noise" nothing matches
and every token is clustered. Peers are the torch reference, vLLM's VidCom2 and EVS at the same ratio, and the two
batched products of the same shape that no implementation avoids; FlashVID is `adaptive`'s. The floor is the larger of
bytes / bandwidth and FLOPs / rate, both measured in this run on this device: the GPU, or the CPU where there is none.
The last table is the cost in T.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flashvid_vllm import FlashVidConfig, compress, env_info, ops
from flashvid_vllm.core.budget import plan
from flashvid_vllm.ops import native
from tests.support.cases import video

from ..common.machine import model_dtype
from . import lengths
from .counts import Work, count
from .timer import Calls, Timer, times_of

# (N, D, heads, patches of a frame in the encoder, channels of a head)
SHAPES = {
    "LLaVA-OneVision-7B": (196, 3584, 16, 729, 72),
    "small": (49, 896, 12, 196, 64),
    "Qwen2.5-VL-7B": (360, 3584, 16, 1440, 80),
    "Qwen3-VL-4B": (256, 2560, 16, 1024, 64),
    "Qwen3-VL-8B": (256, 4096, 16, 1024, 72),
}
CASES = {"LLaVA-OneVision-7B": 32, "small": 16}  # frames, where none are asked for
ALL_FRAMES = (16, 32, 64, 160, 512)
KINDS = ("scene", "noise")
RATIO = 0.1
CONFIG, ADAPTIVE = (FlashVidConfig(retention_ratio=RATIO, method=method) for method in lengths.METHODS)
WHOLE = ("compress", "adaptive")  # among the ops
PEERS = ("torch", "two bmm", "VidCom2", "EVS", "FlashVID")


@dataclass
class Row:
    """One implementation of one op on one video; ``ratios`` are to the medians of peers."""

    video: str
    op: str
    by: str
    median_s: float
    fastest_s: float
    slowest_s: float
    floor_s: float
    launches: int | None
    as_torch: float | None
    ratios: dict[str, float]


def ceilings(dtype: torch.dtype, timer: Timer) -> tuple[float, float]:
    """Bytes and FLOPs a second that this device reaches: a copy far larger than its caches, a square product."""
    gpu = timer.device.type == "cuda"
    big = torch.ones((2**30 if gpu else 2**27) // 4, device=timer.device)
    other, size = torch.empty_like(big), 8192 if gpu else 2048
    a, b = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = timer.all({"copy": lambda: other.copy_(big), "product": lambda: torch.mm(a, b, out=out)})
    return 2 * big.numel() * 4 / min(times["copy"]), 2 * size**3 / min(times["product"])


def by_backend(features: Tensor, attention: Tensor | None, config: FlashVidConfig) -> Calls:
    """The whole compression by each backend that runs here."""
    return {by: partial(compress, features, attention, replace(config, backend=by)) for by in env_info()["backends"]}


def compressions(features: Tensor, attention: Tensor) -> Calls:
    """The whole compression by each backend that runs here, and by its peers."""

    found = by_backend(features, attention, CONFIG)
    turned = features.transpose(1, 2)
    found["two bmm"] = lambda: (torch.bmm(features, turned), torch.bmm(features[1:], turned[:-1]))
    try:
        from vllm.multimodal.video_prune import evs, vidcom2
    except ImportError:
        return found
    flat, drop = features.flatten(0, 1), 1 - RATIO
    grid: Any = (*features.shape[:2], 1)  # merge size 1: the same tokens, whatever their layout in a frame
    found["VidCom2"] = lambda: flat[vidcom2.compute_retention_mask(flat, grid, 1, drop)]
    found["EVS"] = lambda: flat[evs.compute_retention_mask(flat, grid, 1, drop)]
    return found


def adaptive(features: Tensor) -> Calls:
    """The method of this project by each backend that runs here, and FlashVID by the best of them."""
    attention = features.new_ones(features.shape[:2], dtype=torch.float32)
    return by_backend(features, None, ADAPTIVE) | {"FlashVID": partial(compress, features, attention, CONFIG)}


def op_calls(features: Tensor, attention: Tensor, encoder: list[int]) -> dict[str, Calls]:
    """Every op by each backend that has it here, on the reference's own inputs: all do the same work."""
    t, n, _ = features.shape
    frames = features.float().mean(1)
    segment_id = ops.segment_frames(frames, CONFIG.segment_threshold, CONFIG.min_segments, "torch")
    k = plan(t, n, CONFIG).selected_per_frame
    candidate = torch.ones(t, n, dtype=torch.bool, device=features.device)
    candidate.scatter_(1, ops.select_tokens(features, attention, k, "torch"), False)
    link = (features, candidate, segment_id, CONFIG.merge_threshold, CONFIG.matching)
    parent = ops.match_tokens(*link, "torch")[1]
    root = ops.tree_roots(parent, "torch")
    index, mean, _ = ops.pool_trees(features, root, candidate, "torch")
    trees = mean[index < n]
    sizes = max(1, len(trees) // 8), min(7, len(trees))
    heads, patches, d = encoder
    query, key = (torch.randn(t, heads, patches, d, device=features.device).to(features.dtype) for _ in range(2))
    cuts = (frames, CONFIG.segment_threshold, CONFIG.min_segments)
    calls: dict[str, Callable[[str], Any]] = {
        "segment_frames": lambda backend: ops.segment_frames(*cuts, backend),
        "event_relevance": lambda backend: ops.event_relevance(features, segment_id, backend),
        "select_tokens": lambda backend: ops.select_tokens(features, attention, k, backend),
        "match_tokens": lambda backend: ops.match_tokens(*link, backend),
        "tree_roots": lambda backend: ops.tree_roots(parent, backend),
        "pool_trees": lambda backend: ops.pool_trees(features, root, candidate, backend),
        "cluster_tokens": lambda backend: ops.cluster_tokens(trees, *sizes, backend),
        "received_attention": lambda backend: ops.received_attention(query, key, backend),
    }

    def backends(op: str) -> list[str]:
        return env_info()["backends"] + (["native"] if features.is_cuda and op in native.cuda_ops() else [])

    return {op: {by: partial(call, by) for by in backends(op)} for op, call in calls.items()}


def launches_of(function: Callable[[], Any], by: str) -> int | None:
    """Kernel launches of one run, where our own launcher counts them."""
    if by != "triton":
        return None
    from flashvid_vllm.ops.launch import record

    with record() as found:
        function()
    return len(found)


def as_torch(calls: Calls, by: str) -> float | None:
    """Share of the original tokens that a backend's compression sends to the same place as the reference's."""
    if by in PEERS:
        return None
    found = [calls[who]() for who in (by, "torch")]
    places = [torch.where(x.assignment >= 0, x.source_index[x.assignment], -1) for x in found]
    return float((places[0] == places[1]).float().mean())


def measure(
    shape: str, t: int, kind: str, dtype: torch.dtype, timer: Timer, roof: tuple[float, float], each_op: bool
) -> list[Row]:
    """The rows of one video."""
    n, d, *encoder = SHAPES[shape]
    features, attention = (x.to(timer.device) for x in video(kind, t, n, d, dtype))
    work = count(plan(t, n, CONFIG), d, features.element_size(), *encoder)
    work["cluster_tokens"] = Work(work["cluster_tokens"].bytes // t, work["cluster_tokens"].flops // t)  # one frame
    groups = {"compress": compressions(features, attention), "adaptive": adaptive(features)}
    groups |= op_calls(features, attention, encoder) if each_op else {}
    rows = []
    for op, calls in groups.items():
        times = timer.all(calls)
        medians = {by: statistics.median(found) for by, found in times.items()}
        for by, found in times.items():
            more = launches_of(calls[by], by), as_torch(calls, by) if op in WHOLE else None
            ratios = {peer: medians[by] / medians[peer] for peer in PEERS if peer in medians and peer != by}
            span = medians[by], min(found), max(found)
            rows.append(Row(f"{t} x {n} x {d} {kind}", op, by, *span, work[op].floor_s(*roof), *more, ratios))
    return rows


def table(title: str, lines: list[dict[str, str]]) -> Table:
    """A table without the columns that no line has."""
    shown = Table(title=title, title_justify="left")
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    for name in columns:
        shown.add_column(name, justify="left" if name in ("video", "op", "method", "by") else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*(line[name] for name in columns))
    return shown


def line_of(row: Row) -> dict[str, str]:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.5g}"

    line = {"video": row.video, "op": row.op, "by": row.by, **times_of(asdict(row))}
    line |= {"/ floor": f"{row.median_s / row.floor_s:.1f}"}
    line |= {f"/ {peer}": f"{row.ratios[peer]:.2f}" if peer in row.ratios else "" for peer in PEERS}
    return line | {"as torch": text(row.as_torch), "launches": text(row.launches)}


def commit() -> str:
    """The commit that was measured, with a + if the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every shape, number of frames and op")
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--frames", type=int, nargs="+", help="default: 32, and 16 for the small shape")
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths.FRAMES, help="of the last table")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: by this CPU")
    parser.add_argument("--seconds", type=float, default=5, help="time for the turns of one op; default 5")
    parser.add_argument("--json", type=Path, help="append a JSON row for each row to this file")
    return parser


def main() -> int:
    options = make_parser().parse_args()
    options.dtype = options.dtype or model_dtype()
    timer, dtype = Timer(options.seconds), getattr(torch, options.dtype)
    console = Console()
    console.width = max(console.width, 160)
    roof = ceilings(dtype, timer)
    console.print(f"ceilings of this run: {roof[0] / 1e9:.0f} GB/s, {roof[1] / 1e12:.2f} TFLOP/s in {options.dtype}")
    rows: list[Row] = []
    for shape in options.shape or (SHAPES if options.all else CASES):
        for t in options.frames or (ALL_FRAMES if options.all else [CASES.get(shape, 32)]):
            for kind in KINDS:
                console.print(f"{shape}, {t} frames of {kind} ...", highlight=False)
                each_op = kind == "scene" and (options.all or shape != "small")
                rows += measure(shape, t, kind, dtype, timer, roof, each_op)
    costs = lengths.measure(options.dtype, RATIO, options.lengths)
    about = env_info() | {"commit": commit(), "dtype": options.dtype, "threads": torch.get_num_threads()}
    about["isa"] = None if native.MISSING else native.isa()
    del about["backend"]  # each row has its own
    machine = (
        f"{about['device']}, {about['threads']} threads, {about['isa']}, torch {about['torch']}, {about['commit']}"
    )
    console.print(table(f"compress to {RATIO:.0%}: {machine}", [line_of(row) for row in rows if row.op in WHOLE]))
    if each := [line_of(row) for row in rows if row.op not in WHOLE]:
        console.print(table(f"op by op, {options.dtype}", each))
    size = f"T x {lengths.SHAPE[0]} x {lengths.SHAPE[1]}, {options.dtype}"
    console.print(
        table(f"cost in the number of frames, {size}; the result counts as memory", list(map(lengths.line_of, costs)))
    )
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(about | row) + "\n" for row in [*map(asdict, rows), *costs])
    return 0


if __name__ == "__main__":
    sys.exit(main())
