# SPDX-License-Identifier: MIT
"""Servers started in turn, each asked for its cells; what was measured before is not measured again."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..common.ask import ask
from ..common.clips import ROOT, cache_directory
from ..common.record import Cell, Cells, fingerprint, fingerprint_of, gpu, plugin_sources, versions, write_json
from ..common.server import ServerError, VllmServer
from .measure import QUESTION, Endpoint, Load, LoadError, connect, measure
from .servers import Target, environment

# that figures depend on
SOURCES = ("clips", "measure", "servers", "worker_times", "../common/ask", "../common/clips", "../common/server")


@dataclass(frozen=True)
class Run:
    """A cell to measure: a request for each clip. ``about``: what the results say of it."""

    about: Cell
    load: Load
    clips: tuple[Path, ...]


@dataclass(frozen=True)
class Group:
    """What one server is asked: one that is started for it, or, without a target, the endpoint at ``base_url``.

    ``arguments``: of `vllm serve`. ``warm_up`` is sent before the first run.
    """

    runs: tuple[Run, ...]
    max_tokens: int
    warm_up: Path
    target: Target | None = None
    arguments: tuple[str, ...] = ()
    base_url: str = ""
    model: str | None = None
    timeout: float = 3600


def code_fingerprint() -> str:
    """What the figures depend on in this repository."""
    here = [Path(__file__).parent / f"{name}.py" for name in SOURCES]
    return fingerprint([*plugin_sources(), *(ROOT / "flashvid_vllm").rglob("*.py"), *here])


def key_of(group: Group, run: Run) -> str:
    """What tells a cell from every other: request, server, model, code, versions, machine.

    Nobody knows how an endpoint that others started was started, so its cells are measured each time.
    """
    served = group.target.identity if group.target else uuid.uuid4().hex
    what = (run.about, asdict(run.load), [clip.name for clip in run.clips], group.max_tokens, group.arguments, served)
    here = (platform.python_version(), versions("torch", "transformers", "vllm"), platform.node(), gpu())
    return fingerprint_of((what, here, vllm_variables(), code_fingerprint()))


def vllm_variables() -> dict[str, str]:
    """vLLM's settings in the environment, which the servers inherit."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("VLLM_")}


def store(name: str, fresh: bool) -> Cells:
    """The cells of a benchmark so far; ``fresh``: begin anew."""
    path = cache_directory().parent / name / "cells.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    return Cells(path, lambda cell: cell["key"])


def run_all(groups: Sequence[Group], cells: Cells, console: Console | None = None) -> list[Cell]:
    """Measure what is missing and return a cell for every run, in order.

    Raises:
        ServerError: a server did not start, or a request failed; with the end of the server's log.
        LoadError: the endpoint refused, or does not tell what it should.
    """
    console = console or Console(stderr=True)
    keys = [[key_of(group, run) for run in group.runs] for group in groups]
    missing = [
        [(run, key) for run, key in zip(group.runs, of_group, strict=True) if key not in cells.known]
        for group, of_group in zip(groups, keys, strict=True)
    ]
    count = sum(map(len, keys)) - sum(map(len, missing))
    console.print(f"{count} of {sum(map(len, keys))} cells are there already ({cells.path})", soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as bar:
        requests = sum(run.load.requests for of_group in missing for run, _ in of_group)
        task = bar.add_task("requests", total=requests)
        for group, of_group in zip(groups, missing, strict=True):
            if of_group:
                run_group(group, of_group, cells, bar, task)
    at = {cell["key"]: cell for cell in cells.cells}
    return [at[key] for of_group in keys for key in of_group]


def run_group(group: Group, missing: list[tuple[Run, str]], cells: Cells, bar: Progress, task: object) -> None:
    """Start one server and measure its missing cells."""
    label = f"{missing[0][0].about['server']}, {missing[0][0].about['model']}"
    bar.update(task, description=f"{label}: starting")  # type: ignore[arg-type]
    server = None
    if group.target is not None:
        log = cells.path.with_name("serve.log")
        settings = {"log": log, "env": environment(group.target), "timeout": group.timeout, "progress": False}
        server = VllmServer(group.target.model, *group.arguments, **settings)  # type: ignore[arg-type]
    with server or nullcontext():
        endpoint = connect(server.base_url if server else group.base_url, group.model, local=server is not None)
        if server is not None and not endpoint.timed:
            raise ServerError(f"the server does not tell its worker's times\n{server.tail()}")
        try:
            warm_up(endpoint, group.warm_up, server)
            for run, key in missing:
                bar.update(task, description=f"{label}, {run.about['frames']} frames, {run.load.name}")  # type: ignore[arg-type]
                done = lambda: bar.advance(task)  # type: ignore[arg-type]  # noqa: E731
                found = asyncio.run(measure(endpoint, run.clips, run.load, group.max_tokens, done))
                named = run.about if server else {**run.about, "model": endpoint.model}
                cell = {**named, "load": run.load.name, **asdict(run.load), **found, "key": key}
                cells.add(cell)
                bar.console.print(line(cell), soft_wrap=True)
        except (LoadError, openai.APIError) as error:
            if server is None:
                raise
            raise ServerError(f"{label}: {error}\n{server.tail()}") from error


def warm_up(endpoint: Endpoint, clip: Path, server: VllmServer | None) -> None:
    """One request that is not measured; the `openai` client tells why a server refuses one."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = server.client() if server else openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0)
    ask(client, endpoint.model, clip, QUESTION, max_tokens=4)


def line(cell: Cell) -> str:
    """A cell in a line."""
    return (
        f"{cell['server']}, {cell['model']}, {cell['frames']} frames, {cell['load']}: "
        f"{cell['requests_per_s']:.2f} requests/s, first token after {cell['ttft_ms']['p50'] / 1e3:.2f} s (median), "
        f"{cell['prompt_tokens']:.0f} prompt tokens"
    )


def benchmark(
    name: str,
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace], Cell],
    write_markdown: Callable[[Cell, Path], None],
    write_plot: Callable[[Cell, Path], None],
    tables: Callable[[Cell], list[Table]],
    width: int,
) -> int:
    """Run a benchmark, write `name`.json, .md and .png into ``options.output``, print its tables. The exit status."""
    start = time.monotonic()
    path = options.output / f"{name}.json"
    try:
        results = run(options)
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(results, path)
        results = json.loads(path.read_text())
        write_markdown(results, path.with_suffix(".md"))
        write_plot(results, path.with_suffix(".png"))
    except (KeyboardInterrupt, ServerError, LoadError, ValueError, RuntimeError, OSError, openai.APIError) as error:
        return explain(error, f"the {name} benchmark")
    terminal = Console()
    console = Console(width=min(width, terminal.width) if terminal.is_terminal else width)
    for table in tables(results):
        console.print(table)
    console.print(f"{path.with_suffix('.md')} has the rest. It took {time.monotonic() - start:.0f} s.")
    return 0


def explain(error: BaseException, command: str) -> int:
    """Print why a benchmark ended and return its exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("\ninterrupted; the next run goes on from here", file=sys.stderr)
        return 130
    print(f"\n{command} failed: {error}\nWhat was measured is kept: the next run goes on from here.", file=sys.stderr)
    return 1
