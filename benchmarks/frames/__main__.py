# SPDX-License-Identifier: MIT
"""More frames under one budget: what 16 to 160 frames of a video cost plain vLLM, and FlashVID with a fixed budget.

    make frames                                           the whole programme, into benchmarks/results/frames.*
    python -m benchmarks.frames --frames 16,64 --requests 2
    python -m benchmarks.frames --frames 160 --encoder-ratios 0.25,auto    with further servers that encode less
    python -m benchmarks.frames --model llava-hf/llava-onevision-qwen2-7b-ov-hf --token-budget 3136

The budget is what 16 frames have uncompressed, so FlashVID's prompt stays as long as plain vLLM's at 16 frames. A
request's videos are the same 160 frames of a real clip, of which 16 to 160 are taken, evenly spaced; no two requests
share a clip. One server each, the same options for both, one request at a time, from few frames to many.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..common.clips import cache_directory
from ..common.options import listed
from ..common.record import RESULTS, Cell, machine, markdown_table
from ..load.clips import make_clips
from ..load.measure import Load
from ..load.report import PARTS, STYLES, provenance, split, split_row
from ..load.runs import Group, Run, benchmark, run_all, store, vllm_variables
from ..load.servers import ENCODERS, SHAPES, common_arguments, target_of_model, target_of_shape

FRAMES = (16, 32, 64, 96, 128, 160)
SPAN = 160  # frames of the source that a video spans
REQUESTS = 3
ALL = -1  # num_frames: all that a file has
COLUMNS = (
    "frames", "server", "prompt tokens", "TTFT [s], median [least, most]", "x plain",
    "encoder / compression / prefill / the rest [ms]", "KV peak [tokens]", "memory of a request [MiB]",
    "peak memory [MiB]",
)  # fmt: skip
LEGEND = """\
{about}.
{requests} clips a cell, one request at a time, {max_tokens} tokens an answer; FlashVID keeps at most {budget}
visual tokens of a video. **Encoder**, **compression**, **prefill** and **the rest** as in serving.md: all frames are
encoded, whatever is kept of them, but in servers that are named for a share of it. **Memory of a request**: how far the
worker's memory rose above what it was before the request, median (its resident set, looked at five times a second; the
KV cache is part of it as far as its pages were never used before). **Peak memory**: the highest of the cell, weights
included.
"""


def groups_of(options: argparse.Namespace) -> list[Group]:
    """Two servers, a cell for each number of frames."""
    target = target_of_model(options.model) if options.model else target_of_shape(options.shape)
    budget = options.token_budget or min(FRAMES) * SHAPES[options.shape].tokens_per_frame
    span = max(SPAN, *options.frames)
    clips = {count: make_clips(options.requests + 1, span, count) for count in options.frames}
    common = common_arguments(target, max(options.frames), clips[options.frames[0]][0], False, ALL)
    compressing = ["--plugin", "flashvid", "--flashvid-token-budget", f"{budget}"]
    groups = []
    servers = [("plain", "vLLM without options", []), ("flashvid", "this plugin's", compressing)]
    for share in options.encoder_ratios:
        less = [*compressing, "--flashvid-encoder-ratio", share]
        servers.append((f"flashvid-encoder-{share}", "this plugin's", less))
    for server, peer, arguments in servers:
        about: Cell = {"server": server, "peer": peer, "model": target.name, "about": target.about, "budget": budget}
        load = Load(options.requests, concurrency=1)
        runs = tuple(Run({**about, "frames": count}, load, tuple(clips[count][1:])) for count in options.frames)
        everything = (*common, *arguments, *options.serve_args)
        warm_up = clips[options.frames[0]][0]
        groups.append(Group(runs, options.max_tokens, warm_up, target, everything, timeout=options.timeout))
    return groups


def run(options: argparse.Namespace) -> Cell:
    """Measure what is missing, and put the results together."""
    print("cutting clips, making a model: a minute the first time ...", file=sys.stderr, flush=True)
    groups = groups_of(options)
    cells = run_all(groups, store("frames", options.fresh))
    settings = {
        "max_tokens": options.max_tokens,
        "environment": vllm_variables(),
        "servers": [
            {"server": group.runs[0].about["server"], "model": group.runs[0].about["model"]}
            | {"arguments": " ".join(group.arguments)}
            for group in groups
        ],
    }
    return {"machine": machine(), "settings": settings, "cells": cells}


def rise(cell: Cell) -> float:
    """Memory of a request [MiB], median."""
    return statistics.median(entry["rss_rise_mib"] for entry in cell["each"])


def rows_of(results: Cell) -> list[list[str]]:
    """The rows under COLUMNS."""
    rows = []
    for cell in sorted(results["cells"], key=lambda cell: cell["frames"]):  # stable: plain stays first
        same = [other for other in results["cells"] if other["frames"] == cell["frames"]]
        kv = f"{cell['kv']['peak_tokens']}" if cell["kv"] else "?"
        peak = cell["worker"]["gpu_peak_mib"] or cell["peak_rss_mib"]
        *first, encoder, compression, prefill, rest, _ = split_row(cell, same)
        parts = f"{encoder} / {compression} / {prefill} / {rest}"
        rows.append([f"{cell['frames']}", *first, parts, kv, f"{rise(cell):.0f}", f"{peak:.0f}"])
    return rows


def table(results: Cell) -> Table:
    """The table for a terminal."""
    found = Table(title=f"{results['cells'][0]['model']}: more frames under one budget", title_justify="left")
    for index, name in enumerate(COLUMNS):
        found.add_column(escape(name), justify="left" if index == 1 else "right")
    for row in rows_of(results):
        found.add_row(*map(escape, row))
    return found


def write_markdown(results: Cell, path: Path) -> None:
    """The table and where it comes from."""
    cell = results["cells"][0]
    text = LEGEND.format(**{**cell, **results["settings"], "requests": cell["requests"]})
    lines = ["<!-- made by `make frames` from frames.json -->", "# More frames under one budget", "", text]
    path.write_text("\n".join([*lines, *markdown_table(list(COLUMNS), rows_of(results)), *provenance(results)]))


def write_plot(results: Cell, path: Path) -> None:
    """Prompt tokens, time to the first token with its parts, and memory over the number of frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(19, 4.4), constrained_layout=True)
    values: list[tuple[str, Any]] = [
        ("prompt tokens", lambda cell: cell["prompt_tokens"]),
        ("time to first token [s], median", lambda cell: split(cell)["ttft"] / 1e3),
        ("memory of a request [MiB], median", rise),
    ]
    for server in ("plain", "flashvid"):
        cells = sorted((c for c in results["cells"] if c["server"] == server), key=lambda c: c["frames"])
        x = [cell["frames"] for cell in cells]
        colour, marker = STYLES[server]
        for axis, (name, value) in zip((axes[0], axes[1], axes[3]), values, strict=True):
            axis.plot(x, [value(cell) for cell in cells], color=colour, marker=marker, label=server)
            axis.set(title=name, xlabel="frames", xticks=x)
        offset = -2.6 if server == "plain" else 2.6
        left = [0.0] * len(cells)
        for part, shade in PARTS.items():
            heights = [split(cell)[part] / 1e3 for cell in cells]
            label = part if server == "plain" else None
            axes[2].bar([n + offset for n in x], heights, 4.8, left, color=shade, label=label)
            left = [a + b for a, b in zip(left, heights, strict=True)]
    axes[2].set(title="where it goes [s] (left plain, right flashvid)", xlabel="frames", xticks=x)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(fontsize=9)
    where = results["machine"]
    figure.suptitle(f"{results['cells'][0]['about']}; {where['cpu']}, {where['cores']} cores")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. What is not the whole programme goes into .cache, not over the results that are committed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.frames", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="clip-b-0.1b", help="a model made here (%(default)s)")
    parser.add_argument("--model", help="a model on a hub or a directory instead; with --token-budget")
    parser.add_argument("--frames", type=listed(int), default=FRAMES, help="numbers of frames (default: 16 to 160)")
    parser.add_argument("--token-budget", type=int, help="visual tokens to keep (default: those of 16 frames)")
    shares = ", ".join(ENCODERS.values())
    parser.add_argument("--encoder-ratios", type=_shares, default=(), help=f"further servers, of {shares}")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each cell (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="length of an answer (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until a server must answer")
    parser.add_argument("--output", type=Path, help="folder for frames.json, .md and .png")
    parser.add_argument("serve_args", nargs="*", help="after --: further arguments of vllm serve, for both servers")
    options, default = parser.parse_args(arguments), parser.parse_args([])
    if options.model and options.token_budget is None:
        parser.error("--model needs --token-budget: how many tokens a frame of it has is not known here")
    if min(options.requests, options.max_tokens, options.token_budget or 1) < 1:
        parser.error("--requests, --max-tokens and --token-budget must be at least 1")
    options.frames = tuple(sorted(options.frames))
    same = {name: value for name, value in vars(options).items() if name not in ("fresh", "output", "timeout")}
    whole = all(getattr(default, name) == value for name, value in same.items())
    options.output = options.output or (RESULTS if whole else cache_directory().parent / "frames")
    return options


def _shares(text: str) -> tuple[str, ...]:
    """An argparse type: some of ENCODERS' shares, with commas between them."""
    values = tuple(text.split(","))
    if unknown := set(values) - set(ENCODERS.values()):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(ENCODERS.values())}, got {', '.join(unknown)}")
    return values


def main() -> int:
    """The command line."""
    return benchmark("frames", parse(), run, write_markdown, write_plot, lambda results: [table(results)], width=170)


if __name__ == "__main__":
    sys.exit(main())
