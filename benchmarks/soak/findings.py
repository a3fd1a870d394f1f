# SPDX-License-Identifier: MIT
"""What a soak test makes of the answers and of the memory that it has seen."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np

from ..common.record import machine, markdown_table
from .requests import Case

# warm-up: of the time, and of the requests at least. A fresh worker rises by 200 MiB in its first 600
SETTLED, WARM_UP = 1 / 3, 500
SPAN = 300  # requests that a slope needs
# MiB that a process may grow by in 1,000 requests after warm-up, beyond twice the slope's standard error. What leaks
# with a video is its pixels (1 to 4 MiB here), its tokens (0.1 MiB) or a request's text with the video in it (0.1 MiB)
LEAK = 16.0
# of a log-probability, between a batch and alone: rounding in float32 moves one by 1e-5
TOLERANCE = 2e-4


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
    """MiB in 1,000 requests, and its standard error: a straight line through (requests, seconds, MiB).

    The error is infinite where these are too few requests to tell.
    """
    x, y = np.array([point[0] for point in points]) / 1000, np.array([point[2] for point in points])
    if len(points) < 3 or np.ptp(x) < SPAN / 1000:
        return 0.0, float("inf")
    x, y = x - x.mean(), y - y.mean()
    rise = float((x * y).sum() / (x * x).sum())
    return rise, float(np.sqrt(((y - rise * x) ** 2).sum() / (len(x) - 2) / (x * x).sum()))


def settled(points: Sequence[tuple[int, float, float]]) -> Sequence[tuple[int, float, float]]:
    """Those after the warm-up."""
    last = points[-1][1] if points else 0.0
    return [point for point in points if point[1] >= SETTLED * last and point[0] >= WARM_UP]


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
        allowance = f"{rise:+.1f} ± {error:.1f}" if np.isfinite(error) else "too few requests"
        rows.append([name, *(f"{mib:.0f}" for _, _, mib in picked), allowance])
    header = ["process", "MiB at the start", "after warm-up", "at two thirds", "at the end", "MiB in 1,000 requests"]
    return "\n".join(markdown_table(header, rows))


def report(findings: Findings, seconds: float, seed: int, concurrency: int) -> str:
    """The result as Markdown."""
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(findings.counts.items()))
    lines = [
        f"{seconds / 60:g} minutes, {concurrency} at a time, seed {seed}: {findings.done} requests ({counts}).",
        f"{len(findings.faults)} faults. {len(findings.near_ties)} answers went another way at a near tie; the largest "
        f"difference of a log-probability between company and alone was {findings.largest:.1e}.",
        "",
        memory_table(findings),
        ", ".join(f"{key} {value}" for key, value in machine().items()),
    ]
    return "\n".join(lines)
