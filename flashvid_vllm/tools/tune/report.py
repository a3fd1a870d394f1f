# SPDX-License-Identifier: MIT
"""Writes report.html and report.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from .advice import Advice
from .page import page
from .pictures import frames_of
from .summary import Different, Summary

SHOWN = 40  # questions with other answers on the page; report.json has all


def write_report(
    path: Path, summary: Summary, advice: Advice, served: Mapping[str, Any], keep: float, failures: Sequence[str]
) -> list[Path]:
    """Write ``path`` and the .json beside it; returns both. Raises UserError if that fails."""
    shown = summary.different[:SHOWN]
    frames, problems = _frames(shown)
    facts = f"vLLM {served['vllm']}, flashvid-vllm {served['plugin']}"
    text = page(served["model"], facts, summary, advice, keep, frames, shown, [*failures, *problems])
    data = path.with_suffix(".json")
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a server may send half a surrogate pair
        data.write_text(json.dumps(as_data(summary, advice, served, keep, failures), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return [path, data]


def as_data(
    summary: Summary, advice: Advice, served: Mapping[str, Any], keep: float, failures: Sequence[str]
) -> dict[str, Any]:
    """What report.json has. Estimates are [value, low, high], an end that is not known null."""
    return {
        **served,
        "keep": keep,
        "by": summary.by,
        "same_tokens": summary.same_tokens,
        "advice": asdict(advice),
        "floor": summary.floor,
        "unscored": summary.unscored,
        "rows": [row.to_dict() for row in summary.rows],
        "different": [
            {
                "video": different.item.video.name,
                "question": different.item.question,
                "answer": different.item.answer,
                "answers": different.answers,
                "differs": different.differs,
            }
            for different in summary.different
        ],
        "failures": list(failures),
    }


def _frames(shown: Sequence[Different]) -> tuple[dict[str, list[str]], list[str]]:
    """Frames by a video's digest, and why some have none."""
    frames: dict[str, list[str]] = {}
    problems: dict[str, None] = {}
    for different in shown:
        video = different.item.video
        if video.digest in frames:
            continue
        try:
            frames[video.digest] = frames_of(video)
        except UserError as error:
            frames[video.digest] = []
            problems[f"no frames of {video.name}: {error}"] = None
    return frames, list(problems)
