# SPDX-License-Identifier: MIT
"""Serving under load: plain vLLM, EVS, VidCom2 and FlashVID, a server each, the same distinct real clips.

    make serving                                          the whole programme, into benchmarks/results/serving.*
    python -m benchmarks.serving --shape clip-b-0.1b             one of the models that are made here
    python -m benchmarks.serving --model Qwen/Qwen2.5-VL-7B-Instruct --rates 0.5,1,2 -- --tensor-parallel-size 2
    python -m benchmarks.serving --base-url http://HOST:8000        a server that runs already

Requests, arrivals (Poisson) and percentiles are those of `vllm bench serve`. No clip is sent twice to a server, so
nothing comes out of a cache. EVS and VidCom2 are vLLM's own where it has them (Qwen2.5-VL and Qwen3-VL on a GPU),
otherwise they run through this plugin under the same budget; the results say which. A cell that was measured with the
same code, model, versions and options is not measured again, so an interrupted run goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.clips import cache_directory
from ..common.options import listed
from ..common.record import RESULTS, Cell, machine
from ..load.clips import make_clips
from ..load.measure import Load
from ..load.runs import Group, Run, benchmark, run_all, store, vllm_variables
from ..load.servers import (
    ON_DEMAND,
    SERVERS,
    SHAPES,
    Target,
    common_arguments,
    compression,
    target_of_model,
    target_of_shape,
    vllms_own_pruning,
)
from .report import tables, write_markdown, write_plot

CONCURRENCY, RATES = (1, 2, 4, 8, 16, 32), (0.25, 0.5, 1.0)
SINGLE_SHAPE = "llava-onevision-0.5b"  # too slow on a CPU for more: by default one request at a time, two servers
SINGLE_SERVERS = ("plain", "flashvid")
SINGLE_REQUESTS, LEAST_REQUESTS, RATE_REQUESTS = 5, 6, 12  # of a cell: of that shape, at a concurrency, at a rate
PROGRAMME = [name for name, shape in SHAPES.items() if not shape.on_demand]
SPAN = 48  # frames of the source that a clip spans


def loads(options: argparse.Namespace, shape: str | None) -> list[Load]:
    """What a server is asked: as the options say, or as the shape is meant."""
    concurrency: tuple[int, ...] = options.concurrency or ()
    rates: tuple[float, ...] = options.rates or ()
    single = shape == SINGLE_SHAPE
    if options.concurrency is None and options.rates is None:
        concurrency, rates = ((1,), ()) if single else (CONCURRENCY, RATES)
    least = SINGLE_REQUESTS if single else LEAST_REQUESTS
    found = [Load(options.requests or max(least, 3 * number // 2), concurrency=number) for number in concurrency]
    return [*found, *(Load(options.requests or RATE_REQUESTS, rate=rate) for rate in rates)]


def runs_of(about: Cell, todo: Sequence[Load], clips: Sequence[Path], repeat: bool) -> tuple[Run, ...]:
    """A cell for each load, with clips of its own, or with the first ones each time."""
    runs, start = [], 1  # the first clip is for warming up
    for load in todo:
        runs.append(Run(about, load, tuple(clips[start : start + load.requests])))
        start += 0 if repeat else load.requests
    return tuple(runs)


def needed(todo: Sequence[Load], repeat: bool) -> int:
    """How many clips `runs_of` takes."""
    counts = [load.requests for load in todo]
    return 1 + (max(counts) if repeat else sum(counts))


def groups_of(options: argparse.Namespace) -> list[Group]:
    """The programme: a group for each server, or one for the endpoint."""
    span = max(SPAN, options.frames)
    about: Cell = {"frames": options.frames, "ratio": options.retention_ratio}
    if options.base_url:
        todo = loads(options, None)
        clips = make_clips(needed(todo, options.repeat_clips), span)
        about |= {"server": "endpoint", "peer": "as it was found", "model": options.model or "its first"}
        about |= {"about": "whatever it serves", "frames": 0, "ratio": 0.0}
        runs = runs_of(about, todo, clips, options.repeat_clips)
        return [Group(runs, options.max_tokens, clips[0], base_url=options.base_url, model=options.model)]
    groups = []
    for shape in [None] if options.model else [options.shape] if options.shape else PROGRAMME:
        todo = loads(options, shape)
        clips = make_clips(needed(todo, options.repeat_clips), span)
        target: Target = target_of_shape(shape) if shape else target_of_model(options.model)
        common = common_arguments(target, options.frames, clips[0], options.repeat_clips)
        servers = options.servers or (SINGLE_SERVERS if shape == SINGLE_SHAPE else SERVERS)
        own = vllms_own_pruning(target.model) if {"evs", "vidcom2"} & set(servers) else ()
        for server in servers:
            peer, arguments = compression(server, options.retention_ratio, own)
            named = {"server": server, "peer": peer, "model": target.name, "about": target.about, **about}
            runs = runs_of(named, todo, clips, options.repeat_clips)
            arguments = [*common, *arguments, *options.serve_args]
            groups.append(Group(runs, options.max_tokens, clips[0], target, tuple(arguments), timeout=options.timeout))
    return groups


def run(options: argparse.Namespace) -> Cell:
    """Measure what is missing, and put the results together."""
    print("cutting clips, making models: a minute the first time ...", file=sys.stderr, flush=True)
    groups = groups_of(options)
    cells = run_all(groups, store("serving", options.fresh))
    settings = {
        "max_tokens": options.max_tokens,
        "clips": "repeated" if options.repeat_clips else "no clip twice",
        "environment": vllm_variables(),
        "servers": [
            {"server": about["server"], "model": about["model"], "arguments": " ".join(group.arguments)}
            for group in groups
            for about in [group.runs[0].about]
        ],
    }
    return {"machine": machine(), "settings": settings, "cells": cells}


def server_names(text: str) -> tuple[str, ...]:
    """An argparse type: names of SERVERS and ON_DEMAND, with commas between them."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in (*SERVERS, *ON_DEMAND)]:
        raise argparse.ArgumentTypeError(f"servers are {', '.join([*SERVERS, *ON_DEMAND])}, got {', '.join(unknown)}")
    return names


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--shape", choices=tuple(SHAPES), help=f"a model made here (default: {', '.join(PROGRAMME)})")
    found.add_argument("--model", help="a model on a hub or a directory instead (with --base-url: its name there)")
    found.add_argument("--base-url", help="measure the OpenAI server that runs there, and start none")
    found.add_argument(
        "--servers",
        type=server_names,
        help=f"of {','.join([*SERVERS, *ON_DEMAND])}; default: the first {len(SERVERS)}, 0.5b: plain,flashvid",
    )
    found.add_argument("--concurrency", type=listed(int), help="requests at a time, e.g. 1,2,4 (default: 1 to 32)")
    found.add_argument("--rates", type=listed(float), help="requests a second, e.g. 0.5,1 (Poisson arrivals)")
    found.add_argument(
        "--requests", type=int, help="of each cell (default: 1.5 times the concurrency, at least 5 or 6; 12 at a rate)"
    )
    found.add_argument("--frames", type=int, default=16, help="of a video (default: %(default)s)")
    found.add_argument("--retention-ratio", type=float, default=0.1, help="of all but plain (default: %(default)s)")
    found.add_argument("--max-tokens", type=int, default=16, help="length of an answer (default: %(default)s)")
    found.add_argument("--repeat-clips", action="store_true", help="every cell sends the same clips: caches get warm")
    found.add_argument("--fresh", action="store_true", help="forget what was measured before")
    found.add_argument("--timeout", type=float, default=3600, help="seconds until a server must answer")
    found.add_argument("--output", type=Path, help="folder for serving.json, .md and .png")
    found.add_argument("serve_args", nargs="*", help="after --: further arguments of vllm serve, for every server")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. What is not the whole programme goes into .cache, not over the results that are committed."""
    options = parser().parse_args(arguments)
    default = parser().parse_args([])
    if options.shape and (options.model or options.base_url):
        parser().error("--shape makes a model of its own: leave out --model and --base-url, or leave it out")
    if options.base_url and (options.serve_args or options.servers):
        parser().error("--base-url starts no server: leave out --servers and what is after --")
    if not 0 < options.retention_ratio < 1:
        parser().error(f"--retention-ratio must be above 0 and below 1, got {options.retention_ratio}")
    if min(options.frames, options.max_tokens, 1 if options.requests is None else options.requests) < 1:
        parser().error("--frames, --max-tokens and --requests must be at least 1")
    same = {name: value for name, value in vars(options).items() if name not in ("fresh", "output", "timeout")}
    whole = all(getattr(default, name) == value for name, value in same.items())
    options.output = options.output or (RESULTS if whole else cache_directory().parent / "serving")
    return options


def main() -> int:
    """The command line."""
    return benchmark("serving", parse(), run, write_markdown, write_plot, tables, width=150)


if __name__ == "__main__":
    sys.exit(main())
