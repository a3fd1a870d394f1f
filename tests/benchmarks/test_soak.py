# SPDX-License-Identifier: MIT
"""benchmarks.soak: what it sends, and what it makes of what comes back; no server."""

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.common.clips import probe
from benchmarks.soak.__main__ import LEFT, cases_of
from benchmarks.soak.findings import (
    LEAK,
    Findings,
    Outcome,
    compare,
    expected,
    judge_memory,
    memory_table,
    outcome_of,
    report,
    slope,
)
from benchmarks.soak.requests import SHARES, SIZES, Case, make_broken_clips, make_clips, mix

CASE = Case("a question", "answer", {})
BAD = Case("a bad one", "refused", {}, "retention_ratio")


def answer(*steps: dict[str, float], prompt_tokens: int = 9) -> Outcome:
    """Of a greedy model: each step's best token."""
    return Outcome(200, "", prompt_tokens, tuple((max(step, key=lambda t: step[t]), step) for step in steps))


SURE, NEAR = {"a": -0.1, "b": -3.0}, {"a": -0.70000, "b": -0.70003}


def faults(case: Case, alone: Outcome, found: Outcome) -> list[str]:
    findings = Findings()
    compare(case, alone, found, findings)
    return findings.faults


def test_clips_are_what_they_say(tmp_path: Path) -> None:
    paths = make_clips(tmp_path)
    for path, (frames, height, width) in zip(paths, SIZES, strict=True):
        video = probe(path)
        assert (video.frames, video.height, video.width) == (frames, height, width)
    broken = make_broken_clips(tmp_path, paths[3])
    assert len(broken) == 4
    for path in broken:
        with pytest.raises(ValueError, match="not a video"):
            probe(path)


def test_the_same_seed_gives_the_same_mix(tmp_path: Path) -> None:
    cases = cases_of(tmp_path, 3)
    again = cases_of(tmp_path, 3)
    assert cases == again
    drawn = list(itertools.islice(mix(cases, 5), 2000))
    assert drawn == list(itertools.islice(mix(cases, 5), 2000))
    counts: Counter[str] = Counter(case.kind for case in drawn)
    for kind, share in SHARES.items():
        assert abs(counts[kind] / 2000 - share) < 0.05
    assert len({id(case) for case in drawn}) == len(cases)  # every one has its turn
    bodies = [case.body for case in cases]
    assert any("video_url" in str(body) and "image_url" in str(body) for body in bodies)


def test_equal_answers_are_no_fault() -> None:
    assert faults(CASE, answer(SURE, NEAR), answer(SURE, NEAR)) == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Outcome(500, "Internal"), "500, 0 prompt tokens, instead of 200, 9; Internal"),
        (answer(SURE, prompt_tokens=8), "200, 8 prompt tokens, instead of 200, 9"),
        (answer({"a": -0.2, "b": -3.0}), "a log-probability is 1.0e-01 off"),
        (Outcome(200, "", 9, (("b", SURE),)), "b instead of a, which is ahead by 2.9e"),
    ],
)
def test_wrong_answers_are_faults(found: Outcome, message: str) -> None:
    assert message in faults(CASE, answer(SURE), found)[0]


def test_a_near_tie_is_told_and_is_no_fault() -> None:
    """What follows it stands behind another token and is not compared."""
    findings = Findings()
    other = Outcome(200, "", 9, (("b", {"a": -0.70002, "b": -0.70001}), ("x", {"x": -9.0, "a": -9.5})))
    compare(CASE, answer(NEAR, SURE), other, findings)
    assert findings.faults == []
    assert len(findings.near_ties) == 1
    assert findings.largest == pytest.approx(2e-5)


def test_refusals() -> None:
    alone = Outcome(400, "retention_ratio must be, id 0123456789abcdef01")
    assert expected(BAD, alone) is None
    assert "expected 400" in str(expected(BAD, Outcome(400, "no")))
    assert "expected 400" in str(expected(BAD, Outcome(500, "retention_ratio")))
    assert "the client's fault" in str(expected(Case("broken", "refused", {}), Outcome(500, "")))
    assert expected(Case("broken", "refused", {}), Outcome(422, "")) is None
    assert expected(CASE, Outcome(400, "")) is not None
    assert faults(BAD, alone, Outcome(400, "retention_ratio must be, id 9999999999abcdef01")) == []
    assert "says something else" in faults(BAD, alone, Outcome(400, "something else"))[0]


def points(rise: float, noise: float = 0.0) -> list[tuple[int, float, float]]:
    """MiB in 1,000 requests, behind a steep start."""
    rng = random.Random(0)
    return [(10 * i, float(i), 500 + rise * i / 100 + noise * rng.random() + min(i, 30)) for i in range(100)]


def test_memory_that_rises_is_a_fault() -> None:
    findings = Findings(rss={"flat": points(0, 20), "leaks": points(3 * LEAK, 5), "warms up": points(0)})
    judge_memory(findings)
    assert len(findings.faults) == 1
    assert findings.faults[0].startswith("leaks grows by ")
    table = memory_table(findings)
    assert [name in table for name in findings.rss] == [True] * 3
    assert "flat" in report(findings, 60, 0, 8)


def test_slope() -> None:
    assert slope([(1000 * i, 0.0, 3.0 * i) for i in range(9)])[0] == pytest.approx(3)
    assert slope([(0, 0.0, 1.0)] * 5) == (0.0, float("inf"))


def test_a_run_that_is_too_short_does_not_tell_about_memory() -> None:
    """And says so: a fresh server's memory rises as it warms up."""
    findings = Findings(rss={"worker": points(1000)[:60]})
    judge_memory(findings)
    assert findings.faults == []
    assert "too few requests" in memory_table(findings)


def test_what_a_server_says() -> None:
    step: dict[str, Any] = {"token": "token_id:3", "top_logprobs": [{"token": "token_id:3", "logprob": -0.5}]}
    body = {"choices": [{"logprobs": {"content": [step]}}], "usage": {"prompt_tokens": 12}}
    outcome = outcome_of(httpx.Response(200, json=body))
    assert outcome == Outcome(200, "", 12, (("token_id:3", {"token_id:3": -0.5}),))
    assert outcome_of(httpx.Response(400, text="no")) == Outcome(400, "no")
    metrics = 'vllm:num_requests_running{engine="0"} 2.0\nvllm:kv_cache_usage_perc{engine="0"} 0.0\n'
    assert LEFT.findall(metrics) == [("num_requests_running", "2.0"), ("kv_cache_usage_perc", "0.0")]
