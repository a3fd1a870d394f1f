# SPDX-License-Identifier: MIT
"""How much of a real video every method keeps: the encoder's last layers run on the compressed tokens.

    make fidelity        sets itself up, measures what is not yet measured, writes benchmarks/results/fidelity.*

Features and received attention are those of CLIP ViT-B/16 after its tenth layer, 16 frames x 196 tokens x 768. The two
layers that are left, the last norm and the projection run on what a method returns (`adaptive` for an LLM that sees
tokens at their positions), and the class embedding is compared with that of the full run (`measures.Views` says who
attends to whom). `density` is reported beside it: the cosine of each token to the one that stands for it. It is not
quality: it counts every token alike, so it rewards whoever spreads tokens where the video has many, sky and wall before
faces; uniform sampling does well on it.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flashvid_vllm import FlashVidConfig, compress
from flashvid_vllm.core.config import Method

from ..common import clip_model, record
from ..common.clips import cache_directory
from ..common.record import RESULTS, Cell, fingerprint, machine, plugin_sources, write_json
from .clips import FRAMES, SCENES, features
from .measures import VIEWS, bootstrap, density, fidelity, linking, nothing, views, whole
from .report import table, write_markdown, write_plot

METHODS: tuple[str, ...] = get_args(Method)
RATIOS = (0.25, 0.20, 0.15, 0.10)
THRESHOLDS = (0.7, 0.8, 0.9)
DEPTH = 10  # layers before the compression; LLaVA reads CLIP's last but one, which leaves only one to run
REPEATS, LONG = 3, 0.5  # LONG [s]
NONE = "no tokens"  # the floor: the class tokens alone


def code_fingerprint() -> str:
    """What the figures depend on in this repository, as 12 hexadecimal digits."""
    here = ("../common/clip_model.py", "../common/clips.py", "clips.py", "measures.py")
    return fingerprint([*plugin_sources(), *(Path(__file__).parent / name for name in here)])


class Cells(record.Cells):
    """The results so far: a clip, a method, a ratio."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, lambda cell: (cell["video"], cell["method"], cell["ratio"]))

    def missing(self, clip: str, ratios: tuple[float, ...]) -> list[tuple[str, float]]:
        """(method, ratio) still to measure for a clip."""
        wanted = [(NONE, 0.0), *((method, ratio) for ratio in ratios for method in METHODS)]
        return [(method, ratio) for method, ratio in wanted if (clip, method, ratio) not in self.known]


def timed(encoded: clip_model.Encoded, config: FlashVidConfig) -> tuple[Any, float]:
    """A compression and its seconds: the median of REPEATS after the first, or of all if that took longer than LONG."""
    seconds: list[float] = []
    while len(seconds) < 1 + REPEATS and (not seconds or seconds[0] < LONG):
        start = time.perf_counter()
        video = compress(encoded.features, encoded.attention, config)
        seconds.append(time.perf_counter() - start)
    return video, statistics.median(seconds[1:] or seconds)


def measure(clip: str, encoded: clip_model.Encoded, model: Any, todo: list[tuple[str, float]]) -> Iterator[Cell]:
    """A result for every (method, ratio) of ``todo``."""
    full = views(model, whole(encoded), encoded.class_token, DEPTH)
    for method, ratio in todo:
        cell: Cell = {"video": clip, "method": method, "ratio": ratio}
        if method == NONE:
            yield cell | fidelity(views(model, nothing(encoded), encoded.class_token, DEPTH), full)
            continue
        config = FlashVidConfig(retention_ratio=ratio, method=method)  # type: ignore[arg-type]
        video, seconds = timed(encoded, config)
        if len(video.tokens) != int(ratio * encoded.attention.numel() + 1e-9):
            raise RuntimeError(f"{method} kept {len(video.tokens)} tokens of {clip} at {ratio}")
        mean, worst = density(encoded.features, video)
        per_frame = torch.bincount(video.source_index // encoded.attention.shape[1], minlength=FRAMES)
        cell |= fidelity(views(model, video, encoded.class_token, DEPTH), full)
        cell |= {"density": mean, "density_worst": worst, "seconds": seconds}
        cell |= {"least_of_a_frame": int(per_frame.min()), "dropped": int((video.assignment < 0).sum())}
        yield {key: round(value, 6) if isinstance(value, float) else value for key, value in cell.items()}


def summarise(cells: list[Cell], clips: tuple[str, ...], ratios: tuple[float, ...]) -> list[Cell]:
    """The mean over clips, its 95 % interval and the paired difference to flashvid, for each method and ratio."""
    at = {(cell["video"], cell["method"], cell["ratio"]): cell for cell in cells}
    rows: list[Cell] = []
    for ratio, method in [(0.0, NONE), *((ratio, method) for ratio in ratios for method in METHODS)]:
        row: Cell = {"method": method, "ratio": ratio}
        mine = [at[clip, method, ratio] for clip in clips]
        for name in (*VIEWS, *(() if method == NONE else ("density", "density_worst"))):
            values = [cell[name] for cell in mine]
            row[name] = bootstrap(values)
            if method not in (NONE, "flashvid"):
                differences = [cell[name] - at[cell["video"], "flashvid", ratio][name] for cell in mine]
                row[f"{name}-flashvid"] = bootstrap(differences)
                row[f"{name}>flashvid"] = sum(difference > 0 for difference in differences)
        if method != NONE:
            row["ms"] = 1e3 * statistics.median(cell["seconds"] for cell in mine)
            times = [cell["seconds"] / at[cell["video"], "flashvid", ratio]["seconds"] for cell in mine]
            row["time/flashvid"] = statistics.median(times)
        rows.append(row)
    return rows


def link_table(encoded: dict[str, clip_model.Encoded]) -> list[Cell]:
    """TSTM against TTM: at the same thresholds, and TSTM's strongest links, as many as TTM makes at a threshold."""
    settings = FlashVidConfig()
    segments = (settings.segment_threshold, settings.min_segments)
    rows = []
    for threshold in THRESHOLDS:
        ttm = [linking(clip.features, "position", threshold, *segments) for clip in encoded.values()]
        tstm = [linking(clip.features, "tree", threshold, *segments) for clip in encoded.values()]
        as_many = [
            linking(clip.features, "tree", threshold, *segments, most=merged)
            for clip, (merged, *_) in zip(encoded.values(), ttm, strict=True)
        ]
        for kind, found in (("same threshold", tstm), ("as many links", as_many)):
            row: Cell = {"threshold": threshold, "kind": kind}
            for column, name in enumerate(("merged", "to_parent", "to_tree")):
                pairs = [(a[column], b[column]) for a, b in zip(found, ttm, strict=True)]
                pairs = [(a, b) for a, b in pairs if a == a and b == b]  # NaN: nothing merged
                row[f"tstm_{name}"], row[f"ttm_{name}"] = (bootstrap(values) for values in zip(*pairs, strict=True))
                row[f"difference_{name}"] = bootstrap([a - b for a, b in pairs])
                row[f"higher_{name}"] = [sum(a > b for a, b in pairs), len(pairs)]
            rows.append(row)
    return rows


def run(options: argparse.Namespace) -> Cell:
    """Measure what is missing, and put the results together."""
    torch.set_num_threads(min(options.threads, len(os.sched_getaffinity(0))))
    clips, ratios = tuple(options.clips or SCENES), tuple(options.ratios)
    cells = Cells(cache_directory().parent / "fidelity" / f"cells-{code_fingerprint()}.jsonl")
    print(f"the results so far: {cells.path}", file=sys.stderr)
    model = clip_model.load()
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    encoded = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("features", total=len(clips), now="")
        for clip in clips:
            bar.update(task, now=clip)
            encoded[clip] = features(clip, model, DEPTH)
            bar.advance(task)
        missing = {clip: cells.missing(clip, ratios) for clip in clips}
        task = bar.add_task("methods", total=sum(map(len, missing.values())), now="")
        if any(missing.values()):
            for method in METHODS:  # what is imported or compiled on first use is not timed
                compress(encoded[clips[0]].features, encoded[clips[0]].attention, FlashVidConfig(method=method))  # type: ignore[arg-type]
        for clip, todo in missing.items():
            for cell in measure(clip, encoded[clip], model, todo):
                cells.add(cell)
                bar.update(task, advance=1, now=f"{clip}, {cell['method']}, {cell['ratio']:.0%}")
    wanted = [cell for cell in cells.cells if cell["video"] in clips and cell["ratio"] in (0.0, *ratios)]
    return {
        "machine": machine(),
        "settings": {"frames": FRAMES, "tokens": 196, "layers_before": DEPTH, "layers_after": 12 - DEPTH},
        "clips": {clip: {"kind": SCENES[clip].kind, "about": SCENES[clip].about} for clip in clips},
        "summary": summarise(wanted, clips, ratios),
        "linking": link_table(encoded),
        "cells": sorted(wanted, key=lambda cell: (cell["video"], -cell["ratio"], cell["method"])),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", nargs="+", choices=tuple(SCENES), help="default: all")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for fidelity.json, .md and .png")
    parser.add_argument("--report-only", action="store_true", help="the table and the plot of what is in fidelity.json")
    options = parser.parse_args()
    start = time.monotonic()
    path = options.output / "fidelity.json"
    try:
        if not options.report_only:
            options.output.mkdir(parents=True, exist_ok=True)
            write_json(run(options), path)
        results = json.loads(path.read_text())
        write_markdown(results, options.output / "fidelity.md")
        write_plot(results, options.output / "fidelity.png")
    except KeyboardInterrupt:
        print("\ninterrupted; the next run goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"\nmake fidelity failed: {error}", file=sys.stderr)
        return 1
    console = Console()
    console = Console(width=min(140, console.width) if console.is_terminal else 130)
    for ratio in sorted({row["ratio"] for row in results["summary"]} - {0.0}):
        console.print(table(results, ratio))
    print(f"{path.with_suffix('.md')} has the rest. It took {time.monotonic() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
