# SPDX-License-Identifier: MIT
"""A server under a random mix of requests for as long as you like: sound and broken ones, and clients that leave.

    make soak                  an hour
    make soak MINUTES=10

Starts `vllm serve --plugin flashvid` with a tiny model in float32 whose answers depend on what it sees, without a
processor cache and without prefix caching, so that every request goes all the way. First each request is sent alone;
then CONCURRENCY at a time, drawn at random with a fixed seed. It fails where an answer is not the one that the request
gets alone, where a bad request is not refused as it is alone, where a process ends, where memory keeps rising, and
where something is left running or waiting at the end.
"""

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from ..common.server import VllmServer
from .findings import Findings, Outcome, compare, expected, judge_memory, outcome_of, report
from .requests import Case, aborted, answered, make_broken_clips, make_clips, mix, refused

MAX_MODEL_LEN = 4096
# what is freed goes back at once: what rises is held, and not the room between blocks of many sizes
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
SERVE = [
    *("--plugin", "flashvid", "--flashvid-retention-ratio", "0.25"),
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-batched-tokens", "1024", "--max-num-seqs", "16"),
    # a cache that a minute of requests has touched every page of: after that, what rises is a leak
    *("--num-gpu-blocks-override", "128"),
    *("--mm-processor-cache-gb", "0", "--no-enable-prefix-caching"),
]
CASES = 56  # that are answered
LOOK = 10.0  # seconds between two looks at the memory
LEFT = re.compile(r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)", re.MULTILINE)


class Soak:
    """One run against a server that is up."""

    def __init__(self, server: VllmServer, cases: Sequence[Case], seed: int, concurrency: int) -> None:
        self.server, self.cases, self.seed, self.concurrency = server, cases, seed, concurrency
        self.findings = Findings()
        self.alone: dict[int, Outcome] = {}
        self.random = random.Random(seed + 1)  # of when a client leaves

    async def run(self, seconds: float) -> Findings:
        """Each request alone, then all of them mixed for ``seconds``, then each answer alone once more."""
        timeout = httpx.Timeout(600)
        # no connection is used twice: the server closes one that idles, which a busy client learns too late
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self.server.base_url, trust_env=False, timeout=timeout, limits=limits
        ) as http:
            self.http = http
            steady = [case for case in self.cases if case.kind in ("answer", "refused")]
            print(f"{len(steady)} requests, one at a time", flush=True)
            for case in steady:
                self.alone[id(case)] = alone = await self.ask(case)
                if wrong := expected(case, alone):
                    self.findings.faults.append(wrong)
            self.processes = {self._name(process): process for process in self.server.processes()}
            draws, end = mix(list(self.cases), self.seed), time.monotonic() + seconds
            watch = asyncio.create_task(self._watch())
            workers = [asyncio.create_task(self._work(draws, end)) for _ in range(self.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in (watch, *workers):
                    task.cancel()
            self._look(seconds)
            await self._nothing_left()
            for case in self.cases:
                if case.kind == "answer":
                    compare(case, self.alone[id(case)], await self.ask(case), self.findings)
        self._processes_live()
        judge_memory(self.findings)
        return self.findings

    async def ask(self, case: Case) -> Outcome:
        """Send a request and wait for what comes of it."""
        body = {"model": self.server.model, **case.body}
        return outcome_of(await self.http.post("/v1/chat/completions", json=body))

    async def leave(self, case: Case) -> None:
        """Send a request and leave: after some tokens, or before the first."""
        streaming = case.kind == "abort while streaming"
        patience = 600 if streaming else self.random.uniform(0.01, 2)
        try:
            await asyncio.wait_for(self._read(case, self.random.randint(1, 40) if streaming else 1), patience)
        except asyncio.TimeoutError:
            if streaming:
                self.findings.faults.append(f"{case.kind} {case.name}: no tokens within {patience} s")

    async def _read(self, case: Case, chunks: int) -> None:
        body = {"model": self.server.model, **case.body}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode()
                self.findings.faults.append(f"{case.kind} {case.name}: {response.status_code} {text[:300]}")
                return
            async for line in response.aiter_lines():
                chunks -= line.startswith("data:")
                if chunks <= 0:
                    return

    async def _work(self, draws: Any, end: float) -> None:
        while time.monotonic() < end:
            case = next(draws)
            try:
                if case.kind in ("answer", "refused"):
                    compare(case, self.alone[id(case)], await self.ask(case), self.findings)
                else:
                    await self.leave(case)
            except httpx.HTTPError as error:
                self.findings.faults.append(f"{case.kind} {case.name}: {error!r}")
                await asyncio.sleep(1)
            self.findings.counts[case.kind] += 1

    async def _watch(self) -> None:
        start, shown = time.monotonic(), 0.0
        while True:
            now = time.monotonic() - start
            self._look(now)
            if now - shown >= 30:
                shown, total = now, sum(points[-1][2] for points in self.findings.rss.values())
                found = f"{len(self.findings.faults)} faults, {len(self.findings.near_ties)} near ties"
                print(f"{now:5.0f} s: {self.findings.done} requests, {found}, {total:.0f} MiB", flush=True)
            await asyncio.sleep(LOOK)

    def _look(self, now: float) -> None:
        for name, process in self.processes.items():
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                mib = process.memory_info().rss / 2**20
                self.findings.rss.setdefault(name, []).append((self.findings.done, now, mib))

    def _name(self, process: psutil.Process) -> str:
        """For people: what the process is."""
        command = " ".join(process.cmdline())
        for part, name in (("resource_tracker", "tracker"), ("EngineCore", "engine"), ("serve", "API server")):
            if part in command:
                return f"{name} ({process.pid})"
        return f"{command[:30]} ({process.pid})"

    def _processes_live(self) -> None:
        for name, process in self.processes.items():
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                self.findings.faults.append(f"{name} has ended\n{self.server.tail()}")

    async def _nothing_left(self) -> None:
        """Requests whose client has left end within seconds, and leave nothing in the KV cache."""
        left: dict[str, float] = {}
        for _ in range(60):
            text = (await self.http.get("/metrics")).text
            left = {name: float(value) for name, value in LEFT.findall(text) if float(value)}
            if len(LEFT.findall(text)) >= 3 and not left:
                return
            await asyncio.sleep(0.5)
        self.findings.faults.append(f"left at the end: {left or 'the metrics do not say'}")


def cases_of(folder: Path, seed: int) -> list[Case]:
    """The requests of a run; their clips are made in ``folder``."""
    rng, clips = random.Random(seed), make_clips(folder)
    broken = make_broken_clips(folder, clips[3])
    return [*answered(clips, CASES, rng), *refused(clips, broken, MAX_MODEL_LEN), *aborted(clips, rng)]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="a Markdown file for the result")
    options = parser.parse_args()
    from tests.support.sharp import make_sharp_model  # its answers depend on what it sees and where

    with tempfile.TemporaryDirectory(prefix="flashvid-soak-") as name:
        folder = Path(name)
        model = make_sharp_model("qwen2_5_vl", folder / "model")
        cases = cases_of(folder / "clips", options.seed)
        with VllmServer(model, *SERVE, log=folder / "server.log", env=MALLOC, timeout=1200) as server:
            soak = Soak(server, cases, options.seed, options.concurrency)
            findings = asyncio.run(soak.run(60 * options.minutes))
            if findings.faults:
                print(server.tail(), file=sys.stderr)
    text = report(findings, 60 * options.minutes, options.seed, options.concurrency)
    print(text)
    for title, found in (("near tie", findings.near_ties), ("FAULT", findings.faults)):
        for line, count in Counter(found).most_common(40):
            print(f"{title}: {line}" + (f" ({count} times)" if count > 1 else ""))
    if options.results:
        options.results.write_text(f"<!-- made by `python -m benchmarks.soak --results` -->\n# Soak test\n\n{text}\n")
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
