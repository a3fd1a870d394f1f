# SPDX-License-Identifier: MIT
"""What lmms-eval and the ledger wrote, and the table of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .paper import rows_for
from .recipes import Recipe

FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # how lmms-eval's answer to a refused request begins


class ResultsError(RuntimeError):
    """lmms-eval left no results, or not the ones expected."""


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    Attributes:
        run: "plain", or the ratio and the method.
        ratio: share of the video tokens kept; None is the plain model.
        frames: of each video; None where a running server decides.
        metric: lmms-eval's name of the score.
        accuracy: in per cent for the five benchmarks, as lmms-eval gives it for another task.
        questions: how many were asked.
        failures: of these, requests that the server refused, counted as wrong.
        prompt_tokens: of a request, mean.
        video_tokens: visual tokens before compression, mean over the witnesses.
        kept: visual tokens after it, mean over the witnesses.
        witnesses: requests that got the exact check.
    """

    run: str
    ratio: float | None
    frames: int | None
    metric: str
    accuracy: float
    questions: int
    failures: int
    prompt_tokens: float
    video_tokens: float
    kept: float
    witnesses: int

    def write(self, folder: Path) -> None:
        """Write it as outcome.json."""
        (folder / "outcome.json").write_text(json.dumps(asdict(self), indent=1))


def outcomes_in(folder: Path) -> list[Outcome]:
    """Every finished run under `folder`, plain first, then by falling ratio."""
    found = [Outcome(**json.loads(path.read_text())) for path in folder.glob("*/outcome.json")]
    return sorted(found, key=lambda outcome: (-(outcome.ratio or 2), outcome.run))


def lengths(ledger: Path) -> dict[str, int]:
    """Content of a request -> its prompt tokens, from a run's ledger; empty without one."""
    return {line["content"]: line["prompt_tokens"] for line in _lines(ledger)}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def score(results: dict[str, Any], metric: str | None) -> tuple[str, float, int]:
    """The metric's name, its value (the mean over the tasks of a group) and the number of questions.

    `metric` None takes the only one that there is. Raises ResultsError if there is none, or a choice.
    """
    found: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            name = key.partition(",")[0]
            if task in results["n-samples"] and "_stderr" not in name and isinstance(value, int | float):
                found.setdefault(name, {})[task] = value
    if metric is None and len(found) == 1:
        metric = next(iter(found))
    if metric not in found:
        raise ResultsError(
            f"which of lmms-eval's scores is the accuracy? --metric {'|'.join(sorted(found)) or '(none)'}"
        )
    questions = sum(results["n-samples"][task]["effective"] for task in found[metric])
    return metric, statistics.mean(found[metric].values()), questions


def collect(folder: Path, run: str, ratio: float | None, frames: int | None, recipe: Recipe | None,
            metric: str | None) -> Outcome:  # fmt: skip
    """The outcome of the run in `folder`: the newest results below it. Raises ResultsError."""
    files = sorted(folder.rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ResultsError(f"lmms-eval wrote no results into {folder}")
    name, value, questions = score(json.loads(files[-1].read_text()), metric or (recipe.metric if recipe else None))
    stamp = files[-1].name.removesuffix("_results.json")
    samples = [line for path in files[-1].parent.glob(f"{stamp}_samples_*.jsonl") for line in _lines(path)]
    failures = sum(FAILED in json.dumps(sample["filtered_resps"]) for sample in samples)
    answers = _lines(folder / "ledger.jsonl")
    witnesses = [line for line in answers if "kept" in line]
    if not answers or not witnesses:
        raise ResultsError(f"no answer went through the guard: {folder / 'ledger.jsonl'} is empty")
    return Outcome(
        run, ratio, frames, name, value * (recipe.scale if recipe else 1), questions, failures,
        statistics.mean(line["prompt_tokens"] for line in answers),
        statistics.mean(line["video_tokens"] for line in witnesses),
        statistics.mean(line["kept"] for line in witnesses), len(witnesses),
    )  # fmt: skip


def table(outcomes: Sequence[Outcome], model: str, benchmark: str, title: str) -> Table:
    """The outcomes and the paper's figures for the same model, benchmark and ratio."""
    shown = Table(title=title, title_justify="left")
    for heading in (
        "",
        "accuracy",
        "of plain",
        "questions",
        "prompt tokens",
        "video tokens kept",
        "the paper's FlashVID",
    ):
        shown.add_column(heading, justify="left" if heading in ("", "the paper's FlashVID") else "right")
    plain = next((outcome for outcome in outcomes if outcome.ratio is None), None)
    for outcome in outcomes:
        relative = f"{outcome.accuracy / plain.accuracy:.1%}" if plain and plain.accuracy else "-"
        rows = rows_for(model, benchmark, outcome.ratio) if outcome.run.endswith(("plain", " flashvid")) else []
        shown.add_row(
            outcome.run,
            f"{outcome.accuracy:.4g}",
            relative,
            f"{outcome.questions}" + (f" ({outcome.failures} failed)" if outcome.failures else ""),
            f"{outcome.prompt_tokens:.1f}",
            f"{outcome.kept:.1f} of {outcome.video_tokens:.1f}",
            "\n".join(f"{row.of(benchmark)} ({row.frames} frames, {row.table})" for row in rows) or "-",
        )
    return shown
