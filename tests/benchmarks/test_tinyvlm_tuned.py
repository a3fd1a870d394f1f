# SPDX-License-Identifier: MIT
"""`flashvid tune` held against benchmarks.tinyvlm's tables: that a report which says otherwise is found."""

import json
from typing import Any

import pytest

pytest.importorskip("cv2")

from benchmarks.tinyvlm import tuned
from benchmarks.tinyvlm.report import RESULTS


@pytest.fixture
def tables() -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / "accuracy.json").read_text())["test"]["rows"])


def report(accuracies: dict[tuple[str, float], float], width: float = 0.05) -> dict[str, Any]:
    """A report of these accuracies by positions and ratio."""
    rows = []
    for (positions, ratio), value in accuracies.items():
        plain = positions == "plain"
        rows.append({
            "name": f"{positions} {ratio}", "request": {} if plain else {"retention_ratio": ratio},
            "positions": None if plain else positions, "options": None if plain else "--plugin flashvid",
            "prompt_tokens": [700 * ratio] * 3, "agreement": [value] * 3, "known": 100, "videos": 30,
            "accuracy": [value, value - width, value + width],
        })  # fmt: skip
    return {"rows": rows, "advice": {"sentence": "None of them."}, "model": "m", "vllm": "0.32.0"}


TRUE = {
    ("plain", 1.0): 0.925, ("consecutive", 0.25): 0.8, ("consecutive", 0.1): 0.559, ("original", 0.25): 0.88,
    ("original", 0.1): 0.657,
}  # fmt: skip


def test_what_the_tables_say_is_held(tables: list[dict[str, Any]]) -> None:
    text, held = tuned.compare(report(TRUE), tables)
    assert held
    assert "| original 0.1 | 70 | 65.7 (65.7 to 65.7) | 65.7 (60.7 to 70.7) | 65.7 (62.5 to 68.7) | yes |" in text


def test_another_accuracy_is_not(tables: list[dict[str, Any]]) -> None:
    """As it would be if positions were mixed up between the servers, or a ratio were not applied."""
    swapped = TRUE | {("consecutive", 0.1): TRUE["original", 0.1], ("original", 0.1): TRUE["consecutive", 0.1]}
    assert not tuned.compare(report(swapped), tables)[1]
    assert not tuned.compare(report(TRUE | {("consecutive", 0.1): 0.925}), tables)[1]


def test_intervals_so_wide_that_they_hold_anything_do_not_hide_the_order(tables: list[dict[str, Any]]) -> None:
    swapped = TRUE | {("consecutive", 0.1): TRUE["original", 0.1], ("original", 0.1): TRUE["consecutive", 0.1]}
    assert not tuned.compare(report(swapped, width=0.5), tables)[1]


def test_videos_are_spread_and_fewer_are_among_more() -> None:
    """So that a run goes on from a smaller one."""
    assert tuned.numbers(4) == [0, 80, 160, 240]
    assert set(tuned.numbers(16)) < set(tuned.numbers(80))
