# SPDX-License-Identifier: MIT
"""benchmarks.tinyvlm: what is asked in which settings, and what becomes of the answers."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from benchmarks.tinyvlm import stats
from benchmarks.tinyvlm.answers import Encoded
from benchmarks.tinyvlm.evaluate import answers_in, coverage, summarise
from benchmarks.tinyvlm.grid import PLAIN, Cell, cells, chosen
from benchmarks.tinyvlm.questions import FIRST, Question
from flashvid_vllm import FlashVidConfig, compress

VIDEOS = 150


def test_chosen_takes_as_many_of_each_family() -> None:
    taken = Counter(q.family for questions in chosen("test", VIDEOS, 20).values() for q in questions)
    assert taken == dict.fromkeys(FIRST, 20)


def test_grid_has_each_setting_once() -> None:
    keys = [cell.key for cell in cells()]
    assert len(set(keys)) == len(keys)
    assert {"plain@1", "flashvid@0.1", "tome@0.05", "alpha 0.1@0.25"} <= set(keys)


def test_frames_are_left_out_before_a_video_is_compressed() -> None:
    draw = torch.Generator().manual_seed(0)
    video = Encoded(torch.randn(9, 49, 16, generator=draw), torch.rand(9, 49, generator=draw))
    cell = Cell("some", 0.1, FlashVidConfig(token_budget=20), frames=5, spread=True)
    shown = cell.shown(video).tokens
    assert torch.equal(shown, video.tokens[[0, 2, 4, 6, 8]])
    tokens, place = cell.tokens(video)
    assert place is not None
    assert len(tokens) == 20
    assert int(place.max()) < 5 * 49  # positions in what is shown


def test_adaptive_is_told_whether_positions_are_kept() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(1, 49, 16, generator=draw) + 0.3 * torch.randn(9, 49, 16, generator=draw)
    video, config = Encoded(features, torch.rand(9, 49)), FlashVidConfig(token_budget=150, method="adaptive")
    left = {spread: Cell("ours", 0.3, config, spread=spread).tokens(video)[0] for spread in (False, True)}
    for spread, tokens in left.items():
        assert torch.equal(tokens, compress(features, None, config, keeps_positions=spread).tokens)
    assert not torch.equal(left[False], left[True])


def test_mcnemar_and_holm_by_hand() -> None:
    first = np.array([True] * 6 + [False] * 4)
    second = np.array([False] * 5 + [True] + [False] * 4)
    assert stats.mcnemar(first, second) == pytest.approx(2 / 2**5)
    assert stats.mcnemar(first, first) == 1.0
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_summary_of_answers_known_beforehand(tmp_path: Path) -> None:
    """Accuracies, differences and p-values as counted by hand; a family that plain does not answer counts nowhere."""
    questions = {
        n: [Question(family, "which", ("a", "b", "c", "d"), "a") for family in ("attribute", "count")]
        for n in range(40)
    }
    grid = [Cell(PLAIN, 1.0, None)] + [Cell(name, 0.1, FlashVidConfig()) for name in ("flashvid", "mop")]
    answers = answers_in(tmp_path / "answers.jsonl")
    for n in range(40):
        for cell, is_right in zip(grid, (n < 36, n < 30, n < 20), strict=True):
            answers.add({"cell": cell.key, "video": n, "right": [is_right, n < 8], "coverage": 0.5})
    again = answers_in(tmp_path / "answers.jsonl")
    assert again.known == answers.known
    found = summarise(again, grid, questions, f"{PLAIN}@1")
    assert (found["learned"], found["left out"], found["questions"]) == (["attribute"], {"count": 0.2}, 40)
    plain, ours, mop = found["rows"]
    assert [row["accuracy"][0] for row in found["rows"]] == [0.9, 0.75, 0.5]
    assert ours["minus plain"][0] == pytest.approx(-0.15)
    assert mop["minus flashvid"][0] == pytest.approx(-0.25)
    assert mop["minus flashvid"][2] < 0
    assert mop["p (Holm)"] == pytest.approx(2 / 2**10)  # ten questions, all against it
    assert "minus flashvid" not in ours
    assert "minus flashvid" not in plain
    everything = summarise(again, grid, questions, f"{PLAIN}@1", "flashvid@0.1", ["attribute", "count"])
    assert everything["rows"][0]["minus flashvid"][0] == pytest.approx(6 / 80)
    assert everything["rows"][0]["p"] == pytest.approx(2 / 2**6)


def test_coverage_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # of mean 0
    assert coverage(rows, rows[:1]) == pytest.approx((1 - 1 + 0 + 0) / 4)
    assert coverage(rows, rows) == pytest.approx(1.0)


def test_interval_draws_whole_videos() -> None:
    rng = np.random.default_rng(1)
    values = rng.random(400) < 0.7
    alone = stats.interval(values.astype(float), np.arange(400))
    assert alone[0] < values.mean() < alone[1]
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * 0.5 * 0.9165 / 20, rel=0.15)
    together = stats.interval(np.repeat(values[:40], 10).astype(float), np.repeat(np.arange(40), 10))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
