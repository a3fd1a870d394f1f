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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from .record import markdown_table
from .server import VllmServer
from .soak_requests import Case, aborted, answered, make_broken_clips, make_clips, mix, refused

MAX_MODEL_LEN = 4096
SERVE = [
    *("--plugin", "flashvid", "--flashvid-retention-ratio", "0.25"),
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-batched-tokens", "1024", "--max-num-seqs", "16"),
    # a cache that a minute of requests has touched every page of: after that, what rises is a leak
    *("--num-gpu-blocks-override", "128"),
    *("--mm-processor-cache-gb", "0", "--no-enable-prefix-caching"),
]
CASES = 56  # that are answered
SETTLED = 1 / 3  # of the time: warm-up
LOOK = 10.0  # seconds between two looks at the memory
# MiB that a process may grow by in 1,000 requests after warm-up, beyond twice the slope's standard error. What leaks
# with a video is its pixels (1 to 4 MiB here), its tokens (0.1 MiB) or a request's text with the video in it (0.1 MiB)
LEAK = 16.0
# of a log-probability, between a batch and alone: rounding in float32 moves one by 1e-5
TOLERANCE = 2e-4
LEFT = re.compile(r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    Attributes:
        status: of HTTP.
        text: of an error.
        prompt_tokens: of an answer, and ``steps``: the chosen token and the log-probabilities of the best, each step.
    """

    status: int
    text: str = ""
    prompt_tokens: int = 0
    steps: tuple[tuple[str, dict[str, float]], ...] = ()


@dataclass
class Findings:
    """What a soak test has found."""

    faults: list[str] = field(default_factory=list)
    near_ties: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    largest: float = 0.0  # difference of a log-probability
    rss: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)  # process -> requests, seconds, MiB

    @property
    def done(self) -> int:
        """Requests that have ended."""
        return sum(self.counts.values())


def outcome_of(response: httpx.Response) -> Outcome:
    """What a chat completion's response says."""
    if response.status_code != 200:
        return Outcome(response.status_code, response.text)
    answer = response.json()
    steps = tuple(
        (step["token"], {top["token"]: top["logprob"] for top in step["top_logprobs"]})
        for step in answer["choices"][0]["logprobs"]["content"]
    )
    return Outcome(200, "", answer["usage"]["prompt_tokens"], steps)


def compare(case: Case, alone: Outcome, found: Outcome, findings: Findings) -> None:
    """Enter what is wrong with ``found``, the outcome in company of what alone gave ``alone``."""
    if found.status != alone.status or found.prompt_tokens != alone.prompt_tokens:
        findings.faults.append(
            f"{case.kind} {case.name}: {found.status}, {found.prompt_tokens} prompt tokens, instead of {alone.status}, "
            f"{alone.prompt_tokens}; {found.text[:300]}"
        )
        return
    if alone.status != 200:
        if _without_ids(found.text) != _without_ids(alone.text):
            findings.faults.append(f"{case.kind} {case.name}: says {found.text[:300]} instead of {alone.text[:300]}")
        return
    for index, ((token, tops), (other, others)) in enumerate(zip(alone.steps, found.steps, strict=True)):
        moved = max((abs(tops[name] - others[name]) for name in tops.keys() & others.keys()), default=0.0)
        findings.largest = max(findings.largest, moved)
        where = f"{case.name}, step {index}"
        if moved > TOLERANCE:
            findings.faults.append(f"{where}: a log-probability is {moved:.1e} off")
            return
        if token != other:  # what follows stands behind another token
            values = sorted(tops.values())
            gap = values[-1] - values[-2]
            if gap > TOLERANCE:
                findings.faults.append(f"{where}: {other} instead of {token}, which is ahead by {gap:.1e}")
            else:
                findings.near_ties.append(f"{where}: {other} and {token} are {gap:.1e} apart")
            return


def _without_ids(text: str) -> str:
    """An error without what differs between two equal requests: addresses, ids, files' random names."""
    return re.sub(r"0x[0-9a-f]+|[0-9a-f]{16,}|/tmp/\S+", "#", text)


def expected(case: Case, alone: Outcome) -> str | None:
    """What is wrong with the outcome alone, if anything."""
    if case.kind == "answer" and alone.status != 200:
        return f"{case.name}: {alone.status} {alone.text[:300]}"
    if case.kind == "refused" and case.message and not (alone.status == 400 and re.search(case.message, alone.text)):
        return f"{case.name}: {alone.status} {alone.text[:300]}, expected 400 with {case.message!r}"
    if case.kind == "refused" and alone.status != 200 and not 400 <= alone.status < 500:
        return f"{case.name}: {alone.status} {alone.text[:300]}, expected an answer or the client's fault"
    return None


def slope(points: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """MiB in 1,000 requests, and its standard error: a straight line through (requests, seconds, MiB)."""
    x, y = np.array([point[0] for point in points]) / 1000, np.array([point[2] for point in points])
    if len(points) < 3 or np.ptp(x) == 0:
        return 0.0, float("inf")
    x, y = x - x.mean(), y - y.mean()
    rise = float((x * y).sum() / (x * x).sum())
    return rise, float(np.sqrt(((y - rise * x) ** 2).sum() / (len(x) - 2) / (x * x).sum()))


def settled(points: Sequence[tuple[int, float, float]]) -> Sequence[tuple[int, float, float]]:
    """Those after the warm-up."""
    last = points[-1][1] if points else 0.0
    return [point for point in points if point[1] >= SETTLED * last]


def judge_memory(findings: Findings) -> None:
    """Enter the processes that grow."""
    for name, points in findings.rss.items():
        rise, error = slope(settled(points))
        if rise - 2 * error > LEAK:
            findings.faults.append(f"{name} grows by {rise:.1f} +- {error:.1f} MiB in 1,000 requests, {LEAK:g} allowed")


def memory_table(findings: Findings) -> str:
    """Resident memory of each process over time, as Markdown."""
    rows = []
    for name, points in findings.rss.items():
        rise, error = slope(settled(points))
        picked = [points[round(share * (len(points) - 1))] for share in (0, SETTLED, 2 / 3, 1)]
        allowance = f"{rise:+.1f} ± {error:.1f}" if np.isfinite(error) else "too few points"
        rows.append([name, *(f"{mib:.0f}" for _, _, mib in picked), allowance])
    header = ["process", "MiB at the start", "after warm-up", "at two thirds", "at the end", "MiB in 1,000 requests"]
    return "\n".join(markdown_table(header, rows))


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
        limits = httpx.Limits(max_connections=None)
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
        patience = 300 if streaming else self.random.uniform(0.01, 2)
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


def report(findings: Findings, seconds: float, seed: int, concurrency: int) -> str:
    """The result as Markdown."""
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(findings.counts.items()))
    lines = [
        f"{seconds / 60:g} minutes, {concurrency} at a time, seed {seed}: {findings.done} requests ({counts}).",
        f"{len(findings.faults)} faults. {len(findings.near_ties)} answers went another way at a near tie; the largest "
        f"difference of a log-probability between company and alone was {findings.largest:.1e}.",
        "",
        memory_table(findings),
    ]
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="a Markdown file for the result")
    options = parser.parse_args()
    from tests.sharp import make_sharp_model  # its answers depend on what it sees and where

    with tempfile.TemporaryDirectory(prefix="flashvid-soak-") as name:
        folder = Path(name)
        model = make_sharp_model("qwen2_5_vl", folder / "model")
        cases = cases_of(folder / "clips", options.seed)
        with VllmServer(model, *SERVE, log=folder / "server.log", timeout=1200) as server:
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
        options.results.write_text(f"{text}\n")
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
